"""A 2D tokenizer of images on ImageNet by MAGVIT-v2's recipe (2312.06662, table 8).

    python -m walt_jax.prepare --input imagenet:IMAGENET --output out/imagenet --short-side 256
    python -m walt_jax.train --config configs/tokenizer_imagenet.py \
        --workdir out/tokenizer_imagenet --config.data.path=out/imagenet \
        --config.task.perceptual.weights=resnet50.safetensors

All but what is here is `configs/tokenizer_ucf101.py`'s, whose docstring says more. The default is
W.A.L.T's for ImageNet at 256x256, 103.3M parameters; `for_video` has the multipliers of the video
tokenizers at 128x128, 113.0M, to be inflated by them; `for_video_lfq` is the same with 18 bits.

Hardware: as there, with fewer chips. Expect an rFID near 1.15 at 128x128 from `for_video_lfq`
(MAGVIT-v2, table 5b); W.A.L.T gives none.
Variants: `for_video`, `for_video_lfq`; `debug` takes a few steps of tiny networks in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, variants


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    base = {"for_video_lfq": "lfq", "debug": "debug"}.get(arg, "")
    config = ConfigDict(load(f"{Path(__file__).with_name('tokenizer_ucf101.py')}:{base}"))
    config.task.model.dimensions = 2
    config.task.model.temporal_downsample = (False, False, False)
    config.data.path = "out/imagenet"
    config.data.num_frames = 1
    config.optimizer.warmup_steps = 5005  # an epoch
    config.update(change)
    return config


def _square(side: int, multipliers: tuple[int, ...]) -> dict:
    return {
        "task": {
            "model": {"multipliers": multipliers},
            "adversarial": {"discriminator": {"clip": (1, side, side)}},
        },
        "data": {"sizes": ((side, side),)},
        "num_steps": 1_351_000,  # 270 epochs of 1,281,167 images
    }


_VARIANTS = {
    "": _square(256, (1, 1, 2, 4)),
    "for_video": _square(128, (1, 2, 2, 4)),
    "for_video_lfq": _square(128, (1, 2, 2, 4)),
    "debug": _square(32, (1, 1, 1, 1)) | {"num_steps": 3, "optimizer": {"warmup_steps": 1}},
}
