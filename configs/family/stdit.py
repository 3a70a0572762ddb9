"""STDiT, Open-Sora's text-to-video model, in its stages: images, videos, a higher resolution.

    python -m walt_jax.prepare --input images.csv --output out/images
    python -m walt_jax.prepare --input videos.csv --output out/videos
    python -m walt_jax.encode --workdir out/tokenizer_4 --output out/image_frames \
        --config.data.path=out/images
    python -m walt_jax.encode --workdir out/tokenizer_4 --output out/video_frames \
        --config.data.path=out/videos --config.data.num_frames=16 --config.data.fps=8
    python -m walt_jax.encode --workdir out/tokenizer_4 --output out/large_frames \
        --config.data.path=out/videos --config.data.num_frames=16 --config.data.fps=8 \
        --config.data.sizes="((512,512),)"

Stage 1 is an image model at 256x256. Stage 2 starts from it with a temporal attention added to each
layer that at first does nothing, and trains on 16 frames at 256x256. Stage 3 goes on at 512x512:

    python -m walt_jax.train --config configs/family/stdit.py:image --workdir out/stdit_image \
        --config.task.tokenizer=out/tokenizer_4
    python -m walt_jax.train --config configs/family/stdit.py:video --workdir out/stdit_video \
        --config.task.tokenizer=out/tokenizer_4
    python -m walt_jax.train --config configs/family/stdit.py:high --workdir out/stdit_high \
        --config.task.tokenizer=out/tokenizer_4
    python -m walt_jax.sample --workdir out/stdit_high --prompt "waves on a beach" --guidance 7 \
        --steps 100 --out out/samples

All but what is here is `configs/family/latte.py`'s, whose docstring says more. Layers read text by
cross-attention; time acts by adaLN-single. Open-Sora 1.0 has PixArt-alpha for stage 1, Stable
Diffusion's tokenizer, T5-XXL, IDDPM (noise and variance as targets), a learning rate of 2e-5 and
gradients clipped to 1; later versions have rectified flow (`flow`). T5 is not in this package yet:
a byte-level transformer of 1024 features, 26M parameters, is trained jointly in its place. Lengths,
batches and the learning rate of stage 1 are ours.

Hardware: a TPU slice, `--config.mesh.fsdp=8`; neither run nor measured by us at this size. The
100,000 steps of stage 2 come to 4.5e20 FLOPs, 1600 chip-hours of TPU v5e at 40 % of its peak, if
that is reached.
Expect no number: Open-Sora 1.0 reports none.
Variants: `image`, `video`, `high`; the default is `video` from scratch, `flow` the same by
rectified flow; `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    base = "debug" if arg == "debug" else ""
    config = ConfigDict(load(f"{Path(__file__).with_name('latte.py')}:{base}"))
    config.task.model = to_dict(DENOISERS["stdit-xl-2"])
    config.task.model.text_features = 1024
    config.task.text = {"width": 1024, "num_heads": 16, "max_bytes": 256}
    config.data.path = "out/video_frames"
    config.data.caption_bytes = 256
    config.optimizer.update({"learning_rate": 2e-5, "warmup_steps": 1000, "grad_clip": 1.0})
    if arg == "flow":
        config.task.model.learned_sigma = False
        config.task.diffusion = {
            "process": {"name": "rectified_flow"},
            "target": {"name": "velocity"},
        }
        config.task.sampler = {"name": "euler", "num_steps": 50}
    config.update(change)
    return config


_VIDEO = {"data": {"fps": 8.0}, "num_steps": 100_000, "batch_size": 256}
_VARIANTS = {
    "": _VIDEO,
    "image": {
        "task": {"model": {"grid": (1, 32, 32), "windows": ((1, 0, 0),)}},
        "data": {"path": "out/image_frames", "num_frames": 1, "fps": 0.0},
        "num_steps": 400_000,
        "batch_size": 1024,
        "optimizer": {"learning_rate": 1e-4},
    },
    "video": _VIDEO | {"task": {"init_from": "out/stdit_image"}},
    "high": {
        "task": {"model": {"grid": (16, 64, 64)}, "init_from": "out/stdit_video"},
        "data": {"path": "out/large_frames", "sizes": ((512, 512),), "fps": 8.0},
        "num_steps": 20_000,
        "batch_size": 64,
    },
    "flow": _VIDEO,
    "debug": {
        "task": {
            "model": {
                "grid": (2, 4, 4),
                "latent_channels": 8,
                "width": 16,
                "num_heads": 2,
                "num_layers": 2,
                "text_features": 8,
                "dtype": "float32",
            },
            "text": {"width": 8, "num_heads": 2, "num_layers": 1, "dtype": "float32"},
        },
        "optimizer": {"warmup_steps": 1},
    },
}
