"""A small denoiser for videos of a minute, of the built-in sprites that turn every half second.

    python -m walt_jax.data.sprites --output out/turning --num 48 --scenes actions --aspects 1:1 \
        --backgrounds gray --sizes 0.4 0.4 --fps 8 --seconds 64.2 64.3
    python -m walt_jax.prepare --input out/turning/manifest.jsonl --output out/turning_records \
        --max-seconds 70
    python -m walt_jax.encode --workdir out/tokenizer --output out/turning_latents \
        --batch_size 1 --config.data.path=out/turning_records \
        --config.data.num_frames=513 --config.data.fps=8
    python -m walt_jax.train --config configs/sprites_long.py --workdir out/long \
        --config.task.tokenizer=out/tokenizer --config.data.path=out/turning_latents

The tokenizer is any of sprites; `benchmarks/long_video.py` takes that of
`walt_jax/assets/sprites`. A record holds 129 latent frames, 513 of pixels; training takes 6 of
them at a time from anywhere in the video, nine in ten clips as the plans of
`config.task.frames.schemes` do, the others by FDM's mixture (2205.11495), and tells the network
where they lie. The benchmark trains this and generates minutes by every scheme; docs/long_video.md
says what to expect.

Hardware: 1 CPU core, about 30 minutes.
Variants: `debug` takes a few steps of a tiny network in seconds, on clips of 9 frames of 32x32.
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
            "grid": (6, 8, 8),
            "patch_size": (1, 2, 2),
            "width": 128,
            "num_heads": 4,
            "num_layers": 8,
            "windows": ((1, 0, 0), (0, 0, 0)),
            "relative_bias": False,
            "given": "channels",
            "frame_times": True,
            "dtype": "float32",  # CPUs emulate bfloat16
        },
        "frames": {"planned": 0.9},
    }
    config.data = {
        "path": "out/turning_latents",
        "sizes": ((64, 64),),
        "num_frames": 513,
        "fps": 8.0,
    }
    config.num_steps = 4000
    config.batch_size = 16
    config.optimizer = {"learning_rate": 2e-3, "warmup_steps": 50, "ema_decay": 0.995}
    config.log_every = 100
    config.eval_every = 1000
    config.preview_every = 0
    config.checkpoint_every = 500
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
        "frames": {"schemes": ("autoregressive",)},
        "sampler": {"name": "ddim", "num_steps": 2},
    },
    "data": {"sizes": ((32, 32),), "num_frames": 9},
    "num_steps": 3,
    "batch_size": 8,
    "optimizer": {"warmup_steps": 1},
    "log_every": 1,
    "eval_every": 2,
    "eval_batches": 1,
    "checkpoint_every": 2,
}
