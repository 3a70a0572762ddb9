"""A small tokenizer for videos of 64x64, for the built-in sprite videos or any small folder.

    python -m walt_jax.data.sprites --output out/sprites --num 480 \
        --backgrounds black --sizes 0.4 0.4 --seconds 2.2 2.3 --crossing
    python -m walt_jax.prepare --input out/sprites/manifest.jsonl --output out/records
    python -m walt_jax.train --config configs/sprites_tokenizer.py --workdir out/tokenizer \
        --config.data.path=out/records

Hardware: 2 CPU cores, about 6 minutes. Expect a held-out PSNR of about 27 dB on these sprites.
Variants: `debug` takes a few steps of a tiny network in seconds.
"""

from ml_collections import ConfigDict

from walt_jax.config import variants


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    config = ConfigDict()
    config.task = {
        "name": "tokenizer",
        "model": {
            "channels": 8,
            "multipliers": (1, 2, 4, 8),
            # At full resolution a residual block would cost more than all the others.
            "num_res_blocks": (0, 1, 2, 2),
            "norm_groups": 4,
            "dtype": "float32",  # CPUs emulate bfloat16
        },
    }
    config.data = {"path": "out/records", "sizes": ((64, 64),), "num_frames": 9, "fps": 4.0}
    config.num_steps = 800
    config.batch_size = 2
    config.optimizer = {"learning_rate": 4e-3, "warmup_steps": 20, "ema_decay": 0.99}
    config.log_every = 50
    config.eval_every = 400
    config.eval_batches = 16
    config.preview_every = 800
    config.checkpoint_every = 400
    config.update(variants(arg, {"": {}, "debug": _DEBUG}, __file__))
    return config


_DEBUG = {
    "task": {"model": {"channels": 8, "multipliers": (1, 1, 1, 1), "norm_groups": 2}},
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
