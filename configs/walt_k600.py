"""W.A.L.T on Kinetics-600: prediction of frames (2312.06662, section 3.4 and table 8).

    python -m walt_jax.prepare --input kinetics:K600 --split train --output out/k600
    python -m walt_jax.encode --workdir out/tokenizer_k600 --output out/k600_latents --epochs 4
    python -m walt_jax.train --config configs/walt_k600.py --workdir out/walt_k600 \
        --config.task.tokenizer=out/tokenizer_k600 --config.data.path=out/k600_latents

The tokenizer is that of `configs/tokenizer_k600.py`; all but what is here is
`configs/walt_ucf101.py`'s, whose docstring says more. The L model is given the first two latent
frames, which are five of pixels, and generates the other three; it has no classes. Four clips of
each of 384,000 videos take 31 GB as latents. `walt_jax.generation.Generator.sample` takes the given
latents as `given` and `given_mask`.

Hardware: as there; 4.5e20 FLOPs, 1600 chip-hours of TPU v5e at an assumed 40 % of its peak.
Expect an FVD of 3.3 for 16 frames of which 5 are given, without guidance (table 1). It depends on
the protocol, presumably MAGVIT's, and is bounded by the tokenizer.
Not in the paper and chosen by us, besides what is said there: p_fp, the share of clips that are
given frames, 0.9. The rest teach what guidance by the given frames starts from.
Variants: `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    config = ConfigDict(load(f"{Path(__file__).with_name('walt_ucf101.py')}:{arg}"))
    config.task.tokenizer = "out/tokenizer_k600"
    config.task.model = to_dict(DENOISERS["walt-l-k600"])
    config.task.given = {"first": 0.9, "first_frames": (2,)}
    config.data.path = "out/k600_latents"
    config.update(change)
    return config


_VARIANTS = {
    "": {"num_steps": 270_000, "batch_size": 512},
    "debug": {
        "task": {
            "model": {
                "grid": (2, 4, 4),
                "width": 16,
                "num_heads": 2,
                "num_layers": 2,
                "windows": ((1, 0, 0), (0, 2, 2)),
                "dtype": "float32",
            },
            "given": {"first_frames": (1,)},
        },
    },
}
