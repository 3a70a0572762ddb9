"""W.A.L.T on ImageNet at 256x256, by class (2312.06662, section 5.1 and table 8).

    python -m walt_jax.prepare --input imagenet:IMAGENET --output out/imagenet --short-side 256
    python -m walt_jax.encode --workdir out/tokenizer_imagenet --output out/imagenet_latents
    python -m walt_jax.train --config configs/walt_imagenet.py --workdir out/walt_imagenet \
        --config.task.tokenizer=out/tokenizer_imagenet --config.data.path=out/imagenet_latents
    python -m walt_jax.sample --workdir out/walt_imagenet --num 100 --out out/samples
    python -m walt_jax.sample --workdir out/walt_imagenet --num 100 --out out/guided \
        --guidance 3.8 --guidance_schedule power_cosine

The tokenizer is that of `configs/tokenizer_imagenet.py`, which trains on the same records and needs
no classes; all but what is here is `configs/walt_ucf101.py`'s, whose docstring says more. The model
is L with a modulation of each layer instead of AdaLN-LoRA, 460M parameters; its spatial layers see
the whole frame of 32x32 latents. 437,900 steps are 350 epochs. The latents of an epoch take 21 GB.

Hardware: as there; 1.2e21 FLOPs, 4300 chip-hours of TPU v5e at an assumed 40 % of its peak.
Expect an FID of 2.56 and an IS of 215.1 without guidance (table 2), and 2.40 and 290.5 with it
(table 7), of 50,000 samples by ADM's evaluation code. That guidance is MDT's power-cosine; the
paper does not give its values, 3.8 (and the power 4) are MDT's.
Variants: `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    config = ConfigDict(load(f"{Path(__file__).with_name('walt_ucf101.py')}:{arg}"))
    config.task.tokenizer = "out/tokenizer_imagenet"
    config.task.model = to_dict(DENOISERS["walt-l-imagenet"])
    config.data.path = "out/imagenet_latents"
    config.data.num_frames = 1
    config.update(change)
    return config


_VARIANTS = {
    "": {"data": {"sizes": ((256, 256),)}, "num_steps": 437_900, "batch_size": 1024},
    "debug": {
        "task": {
            "model": {
                "grid": (1, 4, 4),
                "width": 16,
                "num_heads": 2,
                "num_layers": 2,
                "windows": ((1, 0, 0), (0, 2, 2)),
                "dtype": "float32",
            }
        },
    },
}
