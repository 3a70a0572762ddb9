"""Folders that `walt_jax.export` writes: a model as plain files, without its run.

    config.json             the run's resolved config, without paths
    dataset.json            names of the classes and frames a second
    denoiser.safetensors    weights, named by their paths
    tokenizer.safetensors   the same of the tokenizer, with `mean` and `std` of its latents
    export.json             step, part, sizes of the tokenizer, sha256 of each of the others

`export.json` is written last: a folder without it is not whole.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.models import Params, TokenizerConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.training.checkpoints import numbered
from walt_jax.weights import parse

ABOUT, DENOISER, TOKENIZER = "export.json", "denoiser.safetensors", "tokenizer.safetensors"
FORMAT = 1


def is_export(folder: str | Path) -> bool:
    """Whether a folder, local or gs://, was written by `walt_jax.export`."""
    return (epath.Path(folder) / ABOUT).exists()


def about_export(folder: str | Path) -> dict[str, Any]:
    """What `export.json` says.

    Raises:
      UserError: it is damaged, or of a later version.
    """
    file = epath.Path(folder) / ABOUT
    try:
        about = json.loads(file.read_text())
        version = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): export the model again.") from error
    if version != FORMAT:
        raise UserError(
            f"{file} is of format {version}, and this walt_jax reads {FORMAT}: update walt_jax."
        )
    return about


def read_weights(folder: str | Path, name: str = DENOISER) -> Params:
    """Weights of a file of an export, float32 numpy arrays.

    Raises:
      UserError: the file is missing, or is not the one that was written.
    """
    path, sums = epath.Path(folder) / name, about_export(folder)["sha256"]
    if name not in sums or not path.exists():
        raise UserError(f"{folder} holds no {name}: export the run of such a model.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sums[name]:
        raise UserError(f"{path} is not the file that {ABOUT} names: export the model again.")
    tree: Params = {}
    for place, array in parse(path, data).items():
        *parents, leaf = place.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array.astype(np.float32)
    return numbered(tree)


def read_tokenizer(folder: str | Path) -> FrozenTokenizer:
    """The tokenizer of an export.

    Raises:
      UserError: as `read_weights`.
    """
    about, tree = about_export(folder)["tokenizer"], read_weights(folder, TOKENIZER)
    config = config_lib.build(TokenizerConfig, about["config"], "tokenizer")
    return FrozenTokenizer.of(config, tree["params"], tree["mean"], tree["std"])


def rounded(tree: Params, dtype: np.dtype) -> Params:
    """Weights as an export holds them: `dtype`, vectors in float32."""
    return jax.tree.map(
        lambda x: np.ascontiguousarray(x, dtype if np.ndim(x) > 1 else np.float32), tree
    )
