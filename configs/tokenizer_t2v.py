"""The W.A.L.T tokenizer for text to video: joint training on videos and images (2312.06662).

    python -m walt_jax.prepare --input videos --output out/videos
    python -m walt_jax.prepare --input images --output out/images
    python -m walt_jax.train --config configs/tokenizer_t2v.py --workdir out/tokenizer_t2v \
        --config.data.path=out/videos --config.images.path=out/images \
        --config.task.perceptual.weights=resnet50.safetensors

All but what is here is `configs/tokenizer_ucf101.py`'s, whose docstring says more. One million
steps (table 8), each on 256 clips and 256 images; the paper does not give the tokenizer's mixture.

Hardware: as there. The paper gives no rFVD; the 18-bit tokenizer's on UCF-101 is 8.6 (MAGVIT-v2,
table 5c).
Variants: `lfq` quantises to 2^18 codes; `debug` takes a few steps of tiny networks in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    config = ConfigDict(load(f"{Path(__file__).with_name('tokenizer_ucf101.py')}:{arg}"))
    config.data.path = "out/videos"
    config.images = {
        "path": "out/images",
        "sizes": config.data.sizes,
        "num_frames": 1,
        "fps": 0.0,
        "eval_fraction": 0.0,
    }
    config.image_batch_size = config.batch_size
    if arg != "debug":
        config.num_steps = 1_000_000
        config.optimizer.warmup_steps = 1500  # our choice, as for K600
    return config
