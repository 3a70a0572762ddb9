"""W.A.L.T's text-to-video base model, on videos and images (2312.06662, section 5.3 and table 8).

    python -m walt_jax.prepare --input videos.csv --output out/videos
    python -m walt_jax.prepare --input images.csv --output out/images
    python -m walt_jax.encode --workdir out/tokenizer_t2v --output out/video_latents \
        --config.data.fps=8
    python -m walt_jax.encode --workdir out/tokenizer_t2v --output out/image_latents \
        --config.data.path=out/images --config.data.num_frames=1
    python -m walt_jax.train --config configs/walt_t2v.py --workdir out/walt_t2v \
        --config.task.tokenizer=out/tokenizer_t2v --config.data.path=out/video_latents \
        --config.images.path=out/image_latents
    python -m walt_jax.sample --workdir out/walt_t2v --prompt "a red fox runs through snow" \
        --guidance 7.5 --out out/samples

The manifests have a caption for each video and image. The tokenizer is that of
`configs/tokenizer_t2v.py`; all but what is here is `configs/walt_ucf101.py`'s, whose docstring says
more. Then another aspect (table 6), the images' latents being made likewise:

    python -m walt_jax.encode --workdir out/tokenizer_t2v --output out/wide_video_latents \
        --config.data.fps=8 --config.data.sizes="((128,224),)"
    python -m walt_jax.train --config configs/walt_t2v.py:aspect --workdir out/walt_t2v_aspect \
        --config.task.tokenizer=out/tokenizer_t2v --config.data.path=out/wide_video_latents \
        --config.images.path=out/wide_image_latents

Higher resolutions are `configs/walt_sr1.py`'s and `configs/walt_sr2.py`'s.

The paper reads text by T5-XL, frozen, in 2048 features. That encoder is not in this package yet: a
byte-level transformer of 2048 features, 102M parameters, is trained jointly in its place. The
denoiser is as the paper's; what it understands of a text it learns from these captions alone.

Hardware: a TPU pod, `:3b` with parameters over `--config.mesh.fsdp=128`; neither run nor measured
by us at this size. 1.7e21 FLOPs for L, 1.1e22 for 3B, self-conditioning's pass included: 5900 and
40,000 chip-hours of TPU v5e at 40 % of its peak, if that is reached.
Expect an FVD of 344.5 and an IS of 31.7 on UCF-101 zero-shot from L, 258.1 and 35.1 from 3B
(table 5, with guidance of a strength that the paper does not give), from 89M videos and 970M
images with captions and with T5-XL; less from other data and this encoder.
Not in the paper and chosen by us, besides what is said in `configs/walt_ucf101.py`: an image beside
each of the 512 videos of a batch, half of the loss; a third of the videos is given one or two
latent frames (p_fp); no text for a tenth of the clips; L's training, which is that of table 8's 3B;
that model's width, 1792, since the "hidden size" of 9216 can only be that of its MLP.
Variants: `3b`, `aspect` (of L); `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    base = "debug" if arg == "debug" else ""
    size = "walt-base-3b" if arg == "3b" else "walt-l-t2v"
    config = ConfigDict(load(f"{Path(__file__).with_name('walt_ucf101.py')}:{base}"))
    config.task.tokenizer = "out/tokenizer_t2v"
    config.task.model = to_dict(DENOISERS[size])
    config.task.text = {"width": 2048, "num_heads": 16, "max_bytes": 256}
    config.task.text_dropout = 0.1
    config.task.given = {"first": 1 / 3, "first_frames": (1, 2)}
    config.data.path = "out/video_latents"
    config.data.fps = 8.0
    config.data.caption_bytes = 256
    config.images = config.data.to_dict() | {
        "path": "out/image_latents",
        "num_frames": 1,
        "fps": 0.0,
        "eval_fraction": 0.0,
    }
    config.optimizer.update({"name": "adafactor", "learning_rate": 2e-4, "ema_decay": 0.0})
    config.update(change)
    return config


_BASE = {"num_steps": 550_000, "batch_size": 512, "image_batch_size": 512}
_WIDE = {"sizes": ((128, 224),)}
_VARIANTS = {
    "": _BASE,
    "3b": _BASE,
    "aspect": _BASE
    | {
        "task": {
            "model": {"grid": (5, 16, 28), "windows": ((1, 0, 0), (0, 8, 14))},
            "init_from": "out/walt_t2v",
        },
        "data": _WIDE | {"path": "out/wide_video_latents"},
        "images": _WIDE | {"path": "out/wide_image_latents"},
        "num_steps": 250_000,
        "optimizer": {"learning_rate": 5e-5, "schedule": "constant"},
    },
    "debug": {
        "task": {
            "model": {
                "grid": (2, 4, 4),
                "width": 16,
                "num_heads": 2,
                "num_layers": 2,
                "windows": ((1, 0, 0), (0, 2, 2)),
                "text_features": 8,
                "dtype": "float32",
            },
            "text": {"width": 8, "num_heads": 2, "num_layers": 1, "dtype": "float32"},
            "given": {"first_frames": (1,)},
        },
        "image_batch_size": 8,
    },
}
