"""W.A.L.T's second super-resolution: 17x256x448 to 17x512x896 (2312.06662, sections 3.5 and 5.3).

    python -m walt_jax.prepare --input videos.csv --output out/videos_512 --short-side 512
    python -m walt_jax.train --config configs/walt_sr2.py --workdir out/walt_sr2 \
        --config.task.tokenizer=out/tokenizer_t2v --config.data.path=out/videos_512

All but what is here is `configs/walt_sr1.py`'s, whose docstring says more.

417M parameters (24 layers of width 1024). The patches are table 8's, 4x4; section 5.3 says 2x2,
which is --config.task.model.patch_size='(1,2,2)', 419M parameters and four times the tokens.

Hardware: as there; 2.4e22 FLOPs, 83,000 chip-hours of TPU v5e at an assumed 40 % of its peak. Of
these the denoiser's are 9.1e20 and 3200: all the rest goes into encoding the clips.
Expect no number: the paper scores its base models only.
Variants: `debug` takes a few steps of a tiny network in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load, to_dict, variants
from walt_jax.models.named import DENOISERS


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    change = variants(arg, _VARIANTS, __file__)
    config = ConfigDict(load(f"{Path(__file__).with_name('walt_sr1.py')}:{arg}"))
    config.task.model = to_dict(DENOISERS["walt-sr2"])
    config.data.path = "out/videos_512"
    config.update(change)
    return config


_VARIANTS = {
    "": {"data": {"sizes": ((512, 896),)}, "num_steps": 275_000},
    "debug": {
        "task": {
            "model": {
                "grid": (2, 8, 8),
                "width": 16,
                "num_heads": 2,
                "num_layers": 2,
                "windows": ((1, 0, 0), (0, 2, 2)),
                "text_features": 8,
                "dtype": "float32",
            }
        },
    },
}
