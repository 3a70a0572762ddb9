"""The W.A.L.T tokenizer on Kinetics-600 by MAGVIT-v2's recipe (2312.06662, table 8).

    python -m walt_jax.prepare --input kinetics:K600 --split train --output out/k600
    python -m walt_jax.train --config configs/tokenizer_k600.py --workdir out/tokenizer_k600 \
        --config.data.path=out/k600 --config.task.perceptual.weights=resnet50.safetensors

All but the data and the length is `configs/tokenizer_ucf101.py`'s, whose docstring says more.

Hardware: as there.
Expect frame prediction's FVD to be bounded by the tokenizer: MAGVIT-v2 reaches 4.3 with its 18-bit
one (`:lfq`), W.A.L.T 3.3 with the continuous one (the default); neither gives an rFVD on K600.
Variants: `lfq` quantises to 2^18 codes; `debug` takes a few steps of tiny networks in seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict

from walt_jax.config import load


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; see the file's docstring."""
    config = ConfigDict(load(f"{Path(__file__).with_name('tokenizer_ucf101.py')}:{arg}"))
    config.data.path = "out/k600"
    if arg != "debug":
        config.num_steps = 270_000
        config.optimizer.warmup_steps = 1500  # an epoch
    return config
