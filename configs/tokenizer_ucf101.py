"""The W.A.L.T tokenizer on UCF-101 by MAGVIT-v2's recipe (2312.06662, table 8; 2310.05737).

    python -m walt_jax.prepare --input ucf101:UCF --split train01 --output out/ucf101
    python -m walt_jax.train --config configs/tokenizer_ucf101.py --workdir out/tokenizer_ucf101 \
        --config.data.path=out/ucf101 --config.task.perceptual.weights=resnet50.safetensors

`docs/weights.md` says how to make the weights' file. To start from a 2D tokenizer trained on
images, as the paper does, train `configs/tokenizer_imagenet.py:for_video` (for `lfq`:
`for_video_lfq`) and add `--config.task.init_from=WORKDIR`.

Hardware: a TPU pod of 128 chips, `--config.mesh.fsdp=16`, two clips a chip; never run by us at this
size. By the TPU compiler's estimate encode and decode of a clip with their gradients take 0.32 s of
a v5e, 1700 chip-hours in all, and 4.3 GiB of activations (2.0 with --config.task.model.remat=True);
the discriminator's and the perceptual network's are not in these figures. Warm-up is one epoch, as
in MAGVIT's code.
Expect an rFVD near 8.6 from the 18-bit tokenizer (`lfq`; MAGVIT-v2, table 5c, presumably on the
training set); W.A.L.T gives no figure for its continuous one (the default).
Variants: `lfq` quantises to 2^18 codes; `debug` takes a few steps of tiny networks in seconds.
"""

from ml_collections import ConfigDict

from walt_jax.config import variants


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    known = {"": {}, "lfq": {"task": {"model": _LFQ}}, "debug": _DEBUG}
    config = ConfigDict()
    config.task = {
        "name": "tokenizer",
        "model": {"multipliers": (1, 2, 2, 4)},
        "perceptual": {"name": "resnet50", "dtype": "bfloat16"},
        "adversarial": {"discriminator": {"clip": (17, 128, 128)}},
    }
    config.data = {"path": "out/ucf101", "sizes": ((128, 128),), "num_frames": 17, "fps": 0.0}
    config.num_steps = 74_500  # 2000 epochs of 9,537 videos
    config.batch_size = 256
    config.optimizer = {
        "learning_rate": 1e-4,
        "warmup_steps": 37,
        "b1": 0.0,
        "b2": 0.99,
        "grad_clip": 0.0,
        "ema_decay": 0.999,
    }
    config.log_every = 100
    config.eval_every = 5000
    config.preview_every = 5000
    config.checkpoint_every = 2500
    if arg == "debug":  # no weights' file: the term is off
        config.task.perceptual = None
    config.update(variants(arg, known, __file__))
    return config


_LFQ = {"latent_channels": 18, "quantizer": {"name": "lfq"}}
_DEBUG = {
    "task": {
        "model": {
            "channels": 4,
            "multipliers": (1, 1, 1, 1),
            "num_res_blocks": (0, 0, 0, 1),
            "norm_groups": 2,
            "dtype": "float32",
        },
        "adversarial": {
            "discriminator": {
                "channels": 4,
                "multipliers": (1, 1),
                "clip": (5, 32, 32),
                "dtype": "float32",
            }
        },
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
