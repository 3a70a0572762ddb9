"""A small W.A.L.T for captions and given frames, the one of `walt_jax.load("sprites")`.

    python -m benchmarks.sprite_generation --out out/sprite_generation

makes the videos, trains the tokenizer (`:tokenizer`) and this, and judges samples. Step by step, on
videos that have circles too:

    python -m walt_jax.data.sprites --output out/sprites --num 3000 --aspects 1:1 --fps 8 16 \
        --backgrounds gray yellow --seconds 2.2 2.3 --sizes 0.4 0.44 --crossing
    python -m walt_jax.prepare --input out/sprites/manifest.jsonl --output out/records
    python -m walt_jax.train --config configs/sprites_text.py:tokenizer --workdir out/tokenizer \
        --config.data.path=out/records
    python -m walt_jax.encode --workdir out/tokenizer --output out/latents --epochs 2 \
        --config.data.fps=4
    python -m walt_jax.train --config configs/sprites_text.py --workdir out/walt \
        --config.task.tokenizer=out/tokenizer --config.data.path=out/latents
    python -m walt_jax.sample --workdir out/walt --guidance 3 --out out/samples \
        --prompt "a green triangle moves up over a yellow background"

Captions are read by a byte encoder that is trained along. A fifth of the clips is given latents, so
that one model makes videos from text, images and other videos.

Hardware: one CPU core, about 14 minutes for the tokenizer and 20 to 30 for the denoiser. What to
expect is in docs/sprites.md.
Variants: `tokenizer`; `debug` takes a few steps of a tiny network in seconds.
"""

from ml_collections import ConfigDict

from walt_jax.config import variants


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, {"": _DENOISER, "tokenizer": _TOKENIZER, "debug": _DEBUG}, __file__)
    config = ConfigDict(_TOKENIZER if arg == "tokenizer" else _DENOISER)
    if arg == "debug":
        config.update(change)
    return config


_TOKENIZER = {
    "task": {
        "name": "tokenizer",
        "model": {
            "channels": 8,
            "multipliers": (1, 2, 4, 7),
            # At full resolution a residual block would cost more than all the others.
            "num_res_blocks": (0, 1, 2, 1),
            "norm_groups": 4,
            "dtype": "float32",  # CPUs emulate bfloat16
        },
    },
    # At the denoiser's frame rate, so that its motion is what the tokenizer knows.
    "data": {"path": "out/records", "sizes": ((64, 64),), "num_frames": 9, "fps": 4.0},
    "num_steps": 2000,
    "batch_size": 2,
    "optimizer": {"learning_rate": 4e-3, "warmup_steps": 20, "ema_decay": 0.99},
    "log_every": 50,
    "eval_every": 600,
    "eval_batches": 16,
    "preview_every": 900,
    "checkpoint_every": 600,
}
_DENOISER = {
    "task": {
        "name": "denoiser",
        "tokenizer": "out/tokenizer",
        "model": {
            "grid": (3, 8, 8),
            "patch_size": (1, 2, 2),  # the paper's is 1; at 2 a step costs a quarter
            "width": 128,
            "num_heads": 4,
            "num_layers": 6,
            # On 48 tokens windows have nothing to save.
            "windows": ((1, 0, 0), (0, 0, 0)),
            "text_features": 128,
            "pooled_text": True,
            "cross_attention": {"queries": False, "norm": "plain"},
            "given": "channels",
            "remat": False,
            "dtype": "float32",  # CPUs emulate bfloat16
        },
        "text": {
            "width": 128,
            # A transformer would first learn the background, and forget the other words for it.
            "num_layers": 0,
            "max_bytes": 56,
            "words": 1024,
            "dtype": "float32",
        },
        "given": {"first": 0.1, "last": 0.05, "ends": 0.05},
    },
    "data": {
        "path": "out/latents",
        "sizes": ((64, 64),),
        "num_frames": 9,
        "fps": 4.0,
        "caption_bytes": 56,
    },
    "num_steps": 9000,
    "batch_size": 16,
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50, "ema_decay": 0.995},
    "log_every": 100,
    "eval_every": 2000,
    "preview_every": 0,
    "checkpoint_every": 1000,
}
_DEBUG = {
    "task": {
        "model": {
            "grid": (2, 4, 4),
            "patch_size": (1, 1, 1),
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
            "text_features": 8,
        },
        "text": {"width": 8, "num_heads": 2, "num_layers": 1},
        "given": {"first_frames": (1,)},
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
