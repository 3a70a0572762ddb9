"""U-ViT on ImageNet at 256x256, by class (2209.12152).

    python -m walt_jax.train --config configs/family/uvit.py --workdir out/uvit \
        --config.task.tokenizer=out/tokenizer_4 --config.data.path=out/imagenet_latents
    python -m walt_jax.sample --workdir out/uvit --num 100 --guidance 1.4 --out out/samples

All but what is here is `configs/family/dit.py`'s, whose docstring says how to make the latents.
Time and class are tokens, long skips join shallow and deep layers. The paper's recipe: AdamW at
2e-4 after 5000 steps of warm-up, betas of 0.99 both, weight decay 0.03, 1024 images a step, the
noise as target, no class for 15 % of the images (10 % for H), 50 steps of DPM-Solver. Its betas
rise by their square roots, as Stable Diffusion's do; here they rise on a line.

Hardware: as there; 1.4e20 FLOPs for L, 4.1e20 for H: 490 and 1400 chip-hours of TPU v5e at an
assumed 40 % of its peak.
Expect an FID of 3.40 from L after 300,000 steps and of 2.29 from H after 500,000, both with a
guidance of 1.4 (the paper counts it as 0.4), with Stable Diffusion's decoder, of 50,000 samples.
Variants: `s`, `m` (sizes that the paper trains on other data), `l` (the default), `h`; `debug`
takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    size, change = variants(arg, _VARIANTS, __file__)
    base = "debug" if arg == "debug" else ""
    config = ConfigDict(load(f"{Path(__file__).with_name('dit.py')}:{base}"))
    config.task.model = to_dict(DENOISERS[size])
    config.task.diffusion.target = {"name": "eps"}
    config.task.class_dropout = 0.15
    config.task.sampler = {"name": "dpmpp_2m", "num_steps": 50}
    config.optimizer.update(
        {"learning_rate": 2e-4, "warmup_steps": 5000, "b1": 0.99, "b2": 0.99, "weight_decay": 0.03}
    )
    config.update(change)
    return config


_RUN = {"num_steps": 300_000, "batch_size": 1024}
_VARIANTS = {
    "": ("uvit-l-2", _RUN),
    "s": ("uvit-s-2", _RUN),
    "m": ("uvit-m-2", _RUN),
    "l": ("uvit-l-2", _RUN),
    "h": ("uvit-h-2", _RUN | {"num_steps": 500_000, "task": {"class_dropout": 0.1}}),
    "debug": (
        "uvit-l-2",
        {
            "task": {
                "model": {
                    "grid": (1, 4, 4),
                    "latent_channels": 8,
                    "width": 16,
                    "num_heads": 2,
                    "num_layers": 3,
                    "dtype": "float32",
                },
                "sampler": {"num_steps": 2},
            },
            "optimizer": {"warmup_steps": 1},
        },
    ),
}
