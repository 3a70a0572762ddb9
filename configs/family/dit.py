"""DiT on ImageNet at 256x256, by class (2212.09748).

    python -m walt_jax.prepare --input imagenet:IMAGENET --output out/imagenet --short-side 256
    python -m walt_jax.encode --workdir out/tokenizer_4 --output out/imagenet_latents
    python -m walt_jax.train --config configs/family/dit.py --workdir out/dit \
        --config.task.tokenizer=out/tokenizer_4 --config.data.path=out/imagenet_latents
    python -m walt_jax.sample --workdir out/dit --num 100 --guidance 1.5 --steps 250 \
        --out out/samples

The paper's latents are Stable Diffusion's, 32x32 of 4 channels. A tokenizer of ours with such
latents is `configs/tokenizer_imagenet.py` with --config.task.model.latent_channels=4, here in
out/tokenizer_4. The paper's recipe: AdamW at a constant 1e-4 without warm-up or decay of weights,
256 images a step, a moving average of 0.9999, 1000 linear betas without zero terminal SNR, noise
and variance as targets, no class for a tenth of the images, 250 steps of DDPM. Its horizontal flips
are left out.

Hardware: `--config.mesh.fsdp=8`; neither run nor measured by us at this size. XL's 400,000 steps
come to 7e19 FLOPs, recomputation not included: 260 chip-hours of TPU v5e at 40 % of its peak, if
that is reached; its 7 million steps to 4500.
Expect, without guidance and after 400,000 steps, an FID of 68.4 (S), 43.5 (B), 23.3 (L), 19.5 (XL)
(table 4); of XL after 7 million steps, --config.num_steps=7000000, 9.62 and with guidance of 1.5
2.27 (table 2). These are with Stable Diffusion's decoder, of 50,000 samples by ADM's code.
Variants: `s`, `b`, `l`, `xl` (the default), with patches of 2 (the paper's 4 and 8 by
--config.task.model.patch_size='(1,4,4)'); XL with the other ways of conditioning, `in_context`,
`cross_attention`, `adaln`; `debug` takes a few steps of a tiny network in seconds.
"""

from ml_collections import ConfigDict

from walt_jax.config import to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    size = variants(arg, _SIZES, __file__)
    config = ConfigDict()
    config.task = {
        "name": "denoiser",
        "tokenizer": "out/tokenizer_4",
        "model": to_dict(DENOISERS[size]),
        "diffusion": {
            "process": {"name": "linear", "zero_terminal_snr": False},
            "target": {"name": "eps_sigma"},
        },
        "class_dropout": 0.1,
        "sampler": {"name": "ddpm", "num_steps": 250, "variance": "learned"},
    }
    config.data = {
        "path": "out/imagenet_latents",
        "sizes": ((256, 256),),
        "num_frames": 1,
        "fps": 0.0,
    }
    config.num_steps = 400_000
    config.batch_size = 256
    config.optimizer = {
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup_steps": 0,
        "b2": 0.999,
        "grad_clip": 0.0,
        "ema_decay": 0.9999,
    }
    config.log_every = 100
    config.eval_every = 10_000
    config.preview_every = 10_000
    config.checkpoint_every = 5000
    if arg == "debug":
        config.update(_DEBUG)
    return config


_SIZES = {
    "": "dit-xl-2",
    "s": "dit-s-2",
    "b": "dit-b-2",
    "l": "dit-l-2",
    "xl": "dit-xl-2",
    "in_context": "dit-xl-2-in-context",
    "cross_attention": "dit-xl-2-cross-attention",
    "adaln": "dit-xl-2-adaln",
    "debug": "dit-xl-2",
}
_DEBUG = {
    "task": {
        "model": {
            "grid": (1, 4, 4),
            "latent_channels": 8,
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
            "dtype": "float32",
        },
        "sampler": {"num_steps": 2},
    },
    "data": {"sizes": ((32, 32),)},
    "num_steps": 3,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 2,
    "eval_batches": 1,
    "preview_every": 2,
    "checkpoint_every": 2,
}
