"""Sora as the literature reconstructs it: a diffusion transformer on spacetime patches, with text.

    python -m walt_jax.train --config configs/family/sora.py --workdir out/sora \
        --config.task.tokenizer=out/tokenizer_4 --config.data.path=out/video_frames \
        --config.images.path=out/image_frames
    python -m walt_jax.sample --workdir out/sora --prompt "a ship in a cup of coffee" \
        --guidance 5 --out out/samples

All but what is here is `configs/family/latte.py`'s; how to make the latents of videos and images
says `configs/family/stdit.py`. Every token sees all others, or in `causal` spatial layers and
temporal ones that see no later frame take turns. An image is a video of one frame and joins every
batch. It is trained by rectified flow, which is as open as everything about Sora; `v` trains the
same on W.A.L.T's linear betas. Text is read by a byte-level transformer of 1024 features, 26M
parameters, trained jointly. Here all clips have one shape; `configs/walt_any_size.py:tokens` packs
patches of many sizes, lengths and aspects into one batch.

Hardware: a TPU pod, `--config.mesh.fsdp=16`; neither run nor measured by us at this size. 400,000
steps of 256 clips and as many images (our choice) come to 3e21 FLOPs, 10,600 chip-hours of TPU v5e
at 40 % of its peak, if that is reached; `causal` to 6000.
Expect no number: none is published.
Variants: `causal`, `v`; `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    size, change = variants(arg, _VARIANTS, __file__)
    base = "debug" if arg == "debug" else ""
    config = ConfigDict(load(f"{Path(__file__).with_name('latte.py')}:{base}"))
    config.task.model = to_dict(DENOISERS[size])
    config.task.model.update({"learned_sigma": False, "text_features": 1024})
    config.task.text = {"width": 1024, "num_heads": 16, "max_bytes": 256}
    config.task.diffusion = {"process": {"name": "rectified_flow"}, "target": {"name": "velocity"}}
    config.task.sampler = {"name": "euler", "num_steps": 50}
    config.data.update({"path": "out/video_frames", "fps": 8.0, "caption_bytes": 256})
    config.images = config.data.to_dict() | {
        "path": "out/image_frames",
        "num_frames": 1,
        "fps": 0.0,
        "eval_fraction": 0.0,
    }
    config.optimizer.update({"warmup_steps": 1000, "grad_clip": 1.0})
    config.update(change)
    return config


_RUN = {"num_steps": 400_000, "batch_size": 256, "image_batch_size": 256}
_LINEAR_V = {
    "diffusion": {"process": {"name": "linear"}, "target": {"name": "v"}},
    "sampler": {"name": "ddim"},
}
_VARIANTS = {
    "": ("sora-xl-2", _RUN),
    "causal": ("sora-xl-2-causal", _RUN),
    "v": ("sora-xl-2", _RUN | {"task": _LINEAR_V}),
    "debug": (
        "sora-xl-2",
        {
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
                "sampler": {"num_steps": 2},
            },
            "image_batch_size": 8,
            "optimizer": {"warmup_steps": 1},
        },
    ),
}
