"""Latte-XL on UCF-101 at 16x256x256, by class (2401.03048).

    python -m walt_jax.prepare --input ucf101:UCF --split train01 --output out/ucf101
    python -m walt_jax.encode --workdir out/tokenizer_4 --output out/ucf101_frames --epochs 8 \
        --config.data.path=out/ucf101 --config.data.num_frames=16 --config.data.fps=8.33
    python -m walt_jax.train --config configs/family/latte.py --workdir out/latte \
        --config.task.tokenizer=out/tokenizer_4 --config.data.path=out/ucf101_frames
    python -m walt_jax.sample --workdir out/latte --num 101 --steps 250 --out out/samples

The tokenizer is that of `configs/family/dit.py`, of images: it takes each frame by itself, so that
a clip is 16x32x32 latents, 131 KB. Clips have every third frame of the videos' 25 a second. Spatial
and temporal layers take turns (the paper's variant 1); the target, the betas and the optimizer are
DiT's. The public code's recipe: 40 clips a step, a million steps, gradients clipped to a norm of
0.1 (there from step 100,000, here from the first), 250 steps of DDPM.

Hardware: the paper's is 8 GPUs with 5 clips each, `--config.mesh.fsdp=8` here; neither run nor
measured by us at this size. 4.5e20 FLOPs, 1600 chip-hours of TPU v5e at 40 % of its peak, if that
is reached.
Expect an FVD of 478, or 334 with images trained jointly (here by `config.images`), by StyleGAN-V's
protocol and with Stable Diffusion's decoder: not to be compared with W.A.L.T's, which is of
128x128.
Variants: `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    config = ConfigDict(load(f"{Path(__file__).with_name('dit.py')}:{arg}"))
    config.task.model = to_dict(DENOISERS["latte-xl-2"])
    config.task.model.num_classes = 101
    config.data.path = "out/ucf101_frames"
    config.optimizer.grad_clip = 0.1
    config.update(change)
    return config


_VARIANTS = {
    "": {
        "data": {"num_frames": 16, "fps": 8.33},
        "num_steps": 1_000_000,
        "batch_size": 40,
    },
    "debug": {
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
        "data": {"num_frames": 5},
    },
}
