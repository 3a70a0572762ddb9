"""ViViT's four ways to look at space and time (2103.15691, section 3.3), as denoisers.

    python -m walt_jax.train --config configs/family/vivit.py:3 --workdir out/vivit_3 \
        --config.task.tokenizer=out/tokenizer_4 --config.data.path=out/ucf101_frames
    python -m walt_jax.sample --workdir out/vivit_3 --num 101 --steps 250 --out out/samples

All but what is here is `configs/family/latte.py`'s, whose docstring says how to make the latents.
At DiT-B's size. In model 1 every token sees all others; model 2 has spatial layers, then temporal
ones; model 3 has both in each layer; in model 4 half of the heads are spatial, half temporal.
Patches are of single frames; --config.task.model.patch_size='(2,2,2)' makes them tubelets.

Hardware: as there, with fewer chips; model 1's 400,000 steps of 64 clips (our choice) come to 1e20
FLOPs, 360 chip-hours of TPU v5e at an assumed 40 % of its peak, the others' to three quarters of
that or less.
Expect no number: ViViT classifies videos. The four are there to be compared with each other.
Variants: `1` (the default), `2`, `3`, `4`; `debug` takes a few steps of a tiny network in seconds.
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
    config.task.model.num_classes = 101
    config.update(_DEBUG if arg == "debug" else {"num_steps": 400_000, "batch_size": 64})
    return config


_SIZES = {
    "": "vivit-b-1",
    "1": "vivit-b-1",
    "2": "vivit-b-2",
    "3": "vivit-b-3",
    "4": "vivit-b-4",
    "debug": "vivit-b-4",
}
_DEBUG = {
    "task": {
        "model": {
            "grid": (2, 4, 4),
            "latent_channels": 8,
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
            "dtype": "float32",
        }
    },
}
