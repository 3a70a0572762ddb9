"""A small class-conditional W.A.L.T on the latents of `configs/sprites_tokenizer.py`.

    python -m walt_jax.encode --workdir out/tokenizer --output out/latents --epochs 2
    python -m walt_jax.train --config configs/sprites_walt.py --workdir out/walt \
        --config.task.tokenizer=out/tokenizer --config.data.path=out/latents
    python -m walt_jax.sample --workdir out/walt --num 16 --out out/samples

`--config.data.path` may also be the prepared videos: clips are then encoded in every step.

Hardware: 2 CPU cores, about 7 minutes. Expect a held-out loss of about 0.2 on these sprites.
Variants: `debug` takes a few steps of a tiny network in seconds.
"""

from ml_collections import ConfigDict

from walt_jax.config import variants


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    config = ConfigDict()
    config.task = {
        "name": "denoiser",
        "tokenizer": "out/tokenizer",
        "model": {
            "grid": (3, 8, 8),
            "patch_size": (1, 2, 2),  # the paper's is 1; at 2 a step costs a quarter
            "width": 128,
            "num_heads": 4,
            "num_layers": 8,
            "windows": ((1, 0, 0), (0, 4, 4)),
            "num_classes": 48,
            "dtype": "float32",  # CPUs emulate bfloat16
        },
    }
    config.data = {"path": "out/latents", "sizes": ((64, 64),), "num_frames": 9, "fps": 4.0}
    config.num_steps = 3600
    config.batch_size = 16
    config.optimizer = {"learning_rate": 2e-3, "warmup_steps": 50, "ema_decay": 0.995}
    config.log_every = 100
    config.eval_every = 1800
    config.preview_every = 3600
    config.checkpoint_every = 1800
    config.update(variants(arg, {"": {}, "debug": _DEBUG}, __file__))
    return config


_DEBUG = {
    "task": {
        "model": {
            "grid": (2, 4, 4),
            "patch_size": (1, 1, 1),
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
        },
        "sampler": {"name": "ddim", "num_steps": 2},
    },
    "data": {"sizes": ((32, 32),), "num_frames": 5},
    "num_steps": 3,
    "batch_size": 8,
    "optimizer": {"warmup_steps": 1},
    "log_every": 1,
    "eval_every": 2,
    "eval_batches": 1,
    "preview_every": 2,
    "checkpoint_every": 2,
}
