"""VDT: one model for generation, prediction, interpolation and completion (2305.13311).

    python -m walt_jax.prepare --input videos --output out/videos
    python -m walt_jax.encode --workdir out/tokenizer_4 --output out/video_frames \
        --config.data.path=out/videos --config.data.num_frames=16 --config.data.fps=8
    python -m walt_jax.train --config configs/family/vdt.py --workdir out/vdt \
        --config.task.tokenizer=out/tokenizer_4 --config.data.path=out/video_frames
    python -m walt_jax.sample --workdir out/vdt --num 16 --out out/samples

All but what is here is `configs/family/latte.py`'s, whose docstring says more. Each block has
temporal attention, then spatial attention. The unified mask says which latents are given, and these
stand in the place of the noisy ones. `config.task.given` says how often which task is drawn; the
paper lists the tasks and not their shares, so these are ours: 15 % first frames, 10 % last ones,
10 % both ends, 15 % every other frame, 15 % random frames, 15 % all but a region, 20 % nothing
(generation). `walt_jax.generation.Generator.sample` takes the given latents as `given` and
`given_mask`.

Hardware: as there; 400,000 steps of 256 clips (our choice) come to 1.5e21 FLOPs, 5400 chip-hours of
TPU v5e at an assumed 40 % of its peak; `cross_attention` to 9100, `tokens` to 10,900.
Expect no number: the paper's are of other sizes and data.
Variants: the other ways in which given frames enter (section 3.2), `adaln`, `cross_attention` and
`tokens`, which the paper found to be the best; `debug` takes a few steps of a tiny network in
seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    size = variants(arg, _SIZES, __file__)
    base = "debug" if arg == "debug" else ""
    config = ConfigDict(load(f"{Path(__file__).with_name('latte.py')}:{base}"))
    config.task.model = to_dict(DENOISERS[size])
    config.task.given = {
        "first": 0.15,
        "last": 0.1,
        "ends": 0.1,
        "every_other": 0.15,
        "random": 0.15,
        "region": 0.15,
        "first_frames": (1, 2, 4, 8),
    }
    config.data.path = "out/video_frames"
    config.update(_DEBUG if arg == "debug" else _RUN)
    return config


_SIZES = {
    "": "vdt-l",
    "adaln": "vdt-l-adaln",
    "cross_attention": "vdt-l-cross-attention",
    "tokens": "vdt-l-tokens",
    "debug": "vdt-l",
}
_RUN = {"data": {"fps": 8.0}, "num_steps": 400_000, "batch_size": 256}
_DEBUG = {
    "task": {
        "model": {
            "grid": (2, 4, 4),
            "latent_channels": 8,
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
            "dtype": "float32",
        },
        "given": {"first_frames": (1,)},
    },
}
