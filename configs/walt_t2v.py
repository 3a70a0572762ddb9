"""W.A.L.T's text-to-video base model, on videos and images (2312.06662, section 5.3 and table 8).

    python -m walt_jax.prepare --input videos.csv --output out/videos
    python -m walt_jax.prepare --input images.csv --output out/images
    python -m walt_jax.encode --workdir out/tokenizer_t2v --output out/video_latents \
        --config.data.fps=8 --text_encoder out/t5_v1_1_xl
    python -m walt_jax.encode --workdir out/tokenizer_t2v --output out/image_latents \
        --config.data.path=out/images --config.data.num_frames=1 --text_encoder out/t5_v1_1_xl
    python -m walt_jax.train --config configs/walt_t2v.py --workdir out/walt_t2v \
        --config.task.tokenizer=out/tokenizer_t2v --config.data.path=out/video_latents \
        --config.images.path=out/image_latents
    python -m walt_jax.sample --workdir out/walt_t2v --prompt "a red fox runs through snow" \
        --guidance 7.5 --out out/samples

The manifests have a caption for each video and image. The text encoder is the paper's, T5-XL,
frozen: 1.2B parameters, of which the files are made by the four lines of docs/text.md; or give a
hub id and a commit. The latents' records carry its embeddings, 4 KB a token, so that a caption
takes more than its clip's 20 KB of latents. Where that is too much, encode without --text_encoder:
the encoder then runs in every step, divided as the parameters are, which adds 11 % to L's work and
1.5 % to 3B's. The tokenizer is that of `configs/tokenizer_t2v.py`; all but what is here is
`configs/walt_ucf101.py`'s, whose docstring says more. Then another aspect (table 6), the images'
latents being made likewise:

    python -m walt_jax.encode --workdir out/tokenizer_t2v --output out/wide_video_latents \
        --config.data.fps=8 --config.data.sizes="((128,224),)" --text_encoder out/t5_v1_1_xl
    python -m walt_jax.train --config configs/walt_t2v.py:aspect --workdir out/walt_t2v_aspect \
        --config.task.tokenizer=out/tokenizer_t2v --config.data.path=out/wide_video_latents \
        --config.images.path=out/wide_image_latents

Higher resolutions are `configs/walt_sr1.py`'s and `configs/walt_sr2.py`'s.

Without T5's files there is `:bytes`: a byte-level transformer of 2048 features, 102M parameters,
trained jointly in its place. What it understands of a text it learns from these captions alone.

Hardware: a TPU pod, `:3b` with parameters over `--config.mesh.fsdp=16`; never run by us at this
size, docs/scaling.md has the compiler's estimates. 1.5e21 FLOPs for L, 1.1e22 for 3B,
self-conditioning's pass included, T5's not: 5400 and 39,000 chip-hours of TPU v5e at 40 % of its
peak, if that is reached.
Expect an FVD of 344.5 and an IS of 31.7 on UCF-101 zero-shot from L, 258.1 and 35.1 from 3B
(table 5, with guidance of a strength that the paper does not give), from 89M videos and 970M
images with captions; less from other data.
Not in the paper and chosen by us, besides what is said in `configs/walt_ucf101.py`: an image beside
each of the 512 videos of a batch, half of the loss; a third of the videos is given one or two
latent frames (p_fp); no text for a tenth of the clips; L's training, which is that of table 8's 3B;
that model's width, 1792, since the "hidden size" of 9216 can only be that of its MLP; captions of
at most 128 tokens.
Variants: `3b`, `aspect` (of L), `bytes` (L); `debug` takes a few steps of a tiny network that reads
bytes, in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS
from walt_jax.models.text import T5_SIZES


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    base = "debug" if arg == "debug" else ""
    size = "walt-base-3b" if arg == "3b" else "walt-l-t2v"
    config = ConfigDict(load(f"{Path(__file__).with_name('walt_ucf101.py')}:{base}"))
    config.task.tokenizer = "out/tokenizer_t2v"
    config.task.model = to_dict(DENOISERS[size])
    if arg in ("bytes", "debug"):
        config.task.text = {"name": "bytes", "width": 2048, "num_heads": 16, "max_bytes": 256}
        config.data.caption_bytes = 256
    else:
        config.task.text = {
            "name": "t5",
            "path": "out/t5_v1_1_xl",
            "model": to_dict(T5_SIZES["t5-v1_1-xl"]),
        }
    config.task.text_dropout = 0.1
    config.task.given = {"first": 1 / 3, "first_frames": (1, 2)}
    config.data.path = "out/video_latents"
    config.data.fps = 8.0
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
    "bytes": _BASE,
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
