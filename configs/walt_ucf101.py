"""W.A.L.T on UCF-101, by class (2312.06662, section 5.1 and table 8).

    python -m walt_jax.prepare --input ucf101:UCF --split train01 --output out/ucf101
    python -m walt_jax.encode --workdir out/tokenizer_ucf101 --output out/ucf101_latents \
        --epochs 16
    python -m walt_jax.train --config configs/walt_ucf101.py --workdir out/walt_ucf101 \
        --config.task.tokenizer=out/tokenizer_ucf101 --config.data.path=out/ucf101_latents
    python -m walt_jax.sample --workdir out/walt_ucf101 --num 101 --out out/samples

The tokenizer is that of `configs/tokenizer_ucf101.py`. UCF is the folder of the unpacked archives,
UCF-101/ and ucfTrainTestlist/; of your own videos, a subfolder a class, prepare takes the classes
by --label-from-folder. A clip's latents take 20 KB, so 16 clips of each video 3 GB.
`--config.data.path` may also be the prepared videos: then clips are cut anew in every step, and
encoding them about doubles its work.

Hardware: a TPU slice of 32 chips, `--config.mesh.fsdp=8`, eight clips a chip; never run by us at
this size, docs/scaling.md has the compiler's estimates. XL's matrix products come to 7e19 FLOPs,
self-conditioning's pass included, recomputation and the tokenizer not: 260 chip-hours of TPU v5e at
40 % of its peak, if that is reached.
Expect an FVD of 36 from XL and of 46 from L without guidance (table 1), both +-2, and 34.6 from L
with separate adaLN (table 4). The paper does not say of how many samples; it compares with MAGVIT's
numbers, so presumably by MAGVIT's protocol. A score depends on that and on the tokenizer.
Not in the paper and chosen by us: warm-up, betas, clipping, no weight decay, the decay of the
moving average, the tenth of the clips trained without their class (so that guidance is possible),
how latents are normalised (each channel to mean 0 and variance 1).
Variants: `xl` (table 8's column and the default), `l` and `separate` (table 4; of the ablations in
table 3 with --config.num_steps=35000, and for instance --config.task.model.adaln_rank=16); `debug`
takes a few steps of a tiny network in seconds.
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
        "tokenizer": "out/tokenizer_ucf101",
        "model": to_dict(DENOISERS[size]),
        "self_conditioning": 0.9,
        "class_dropout": 0.1,
        "sampler": {"name": "ddim", "num_steps": 50},
    }
    config.data = {
        "path": "out/ucf101_latents",
        "sizes": ((128, 128),),
        "num_frames": 17,
        "fps": 0.0,
    }
    config.num_steps = 60_000
    config.batch_size = 256
    config.optimizer = {"learning_rate": 5e-4, "warmup_steps": 5000, "ema_decay": 0.9999}
    config.log_every = 100
    config.eval_every = 5000
    config.preview_every = 5000
    config.checkpoint_every = 2500
    if arg == "debug":
        config.update(_DEBUG)
    return config


_SIZES = {
    "": "walt-xl-ucf101",
    "xl": "walt-xl-ucf101",
    "l": "walt-l-ucf101",
    "separate": "walt-l-ucf101-separate",
    "debug": "walt-xl-ucf101",
}
_DEBUG = {
    "task": {
        "model": {
            "grid": (2, 4, 4),
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
            "windows": ((1, 0, 0), (0, 2, 2)),
            "dtype": "float32",
        },
        "sampler": {"num_steps": 2},
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
