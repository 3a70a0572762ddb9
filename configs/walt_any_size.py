"""W.A.L.T-L on videos of any size and length: packed by windows, packed by tokens, or in buckets.

    python -m walt_jax.encode --workdir out/tokenizer --output out/latents \
        --config.data.path=out/records --config.data.buckets.multiple=64 \
        --config.data.buckets.aspects="()" --config.data.buckets.stretch=0.07 \
        --config.data.buckets.table="({'resolution': 256, 'num_frames': 17, 'keep': 0.5}, \
            {'resolution': 128, 'num_frames': 17})"
    python -m walt_jax.train --config configs/walt_any_size.py --workdir out/walt_any_size \
        --config.task.tokenizer=out/tokenizer --config.data.path=out/latents
    python -m walt_jax.sample --workdir out/walt_any_size --guidance 2 --out out/samples

Latents are cut into blocks of (5, 8, 8), W.A.L.T's spatiotemporal window (2312.06662, section 3.2),
and a row of a batch is 32 blocks of any videos: W.A.L.T-L's 8 clips of 128 pixels, or 2 of 256. The
spatiotemporal layers are as ever, spatial ones see their own video by segment ids. Positions are
fractions of the axes (NaViT, 2307.06304), so that samples may have other sizes. `tokens` packs
patches instead: full attention as in Sora, sizes cut to 16 pixels (multiple=16, stretch=0.04),
images too, and in the beginning a fifth of the tokens dropped. `buckets` trains on batches of one
shape: its table is that of `encode` (`python -m walt_jax.data.buckets` suggests one).

Hardware: a TPU v5e-32, `--config.mesh.fsdp=8`; neither run nor measured by us at this size.
Expect no number: none is published. docs/data.md has what packing pads and cuts off.
Variants: `tokens`, `buckets`; `debug` takes a few steps of a tiny network in seconds.
"""

from ml_collections import ConfigDict

from walt_jax.config import to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    size, change = variants(arg, _VARIANTS, __file__)
    config = ConfigDict()
    config.task = {
        "name": "denoiser",
        "tokenizer": "out/tokenizer",
        "model": to_dict(DENOISERS[size]),
        "sampler": {"name": "ddim", "num_steps": 50},
    }
    config.data = {"path": "out/latents", "sizes": ((256, 256),), "num_frames": 17}
    config.num_steps = 60_000
    config.batch_size = 32
    config.optimizer = {"learning_rate": 5e-4, "warmup_steps": 5000, "ema_decay": 0.9999}
    config.log_every = 100
    config.eval_every = 5000
    config.checkpoint_every = 5000
    config.update(change)
    return config


_WINDOWS = {"block": (5, 8, 8), "blocks": 32, "videos": 8}
_TOKENS = {
    "block": (1, 2, 2),
    "blocks": 2048,
    "videos": 32,
    "drop": {"distribution": "beta", "start": 0.2, "rate": 0.0, "clips": 10_000_000},
}
_TABLE = {
    "table": (
        {"resolution": 256, "num_frames": 17, "batch_size": 64, "keep": 0.5},
        {"resolution": 128, "num_frames": 17, "batch_size": 256},
    ),
    "aspects": (),
    "multiple": 64,
    "stretch": 0.07,
}
_DEBUG = {
    "task": {
        "model": {
            "grid": (2, 4, 4),
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
            "windows": ((1, 0, 0), (2, 4, 4)),
            "dtype": "float32",
        },
        "sampler": {"name": "ddim", "num_steps": 2},
    },
    "num_steps": 3,
    "batch_size": 8,
    "optimizer": {"warmup_steps": 1},
    "log_every": 1,
    "eval_every": 2,
    "eval_batches": 1,
    "preview_every": 2,
    "checkpoint_every": 2,
}
_VARIANTS = {
    "": ("walt-l-any-size", {"data": {"packing": _WINDOWS}}),
    "tokens": ("walt-l-tokens", {"data": {"packing": _TOKENS}}),
    "buckets": ("walt-l-any-size", {"data": {"buckets": _TABLE}}),
    "debug": (
        "walt-l-any-size",
        _DEBUG | {"data": {"packing": {"block": (2, 4, 4), "blocks": 6, "videos": 4}}},
    ),
}
