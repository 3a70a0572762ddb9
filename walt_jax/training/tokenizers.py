"""Loading a trained tokenizer from its run, and keeping a copy with what depends on it."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.models import Params, TokenizerConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, network
from walt_jax.parallel.sharding import path_of
from walt_jax.training.checkpoints import Checkpoints, absolute, numbered
from walt_jax.training.exports import is_export, read_tokenizer

FOLDER = "tokenizer"


def load_tokenizer(workdir: str | Path, step: int | None = None) -> FrozenTokenizer:
    """The tokenizer of a run of the tokenizer task (its moving average), of a denoiser's copy, or
    of an export.

    Raises:
      UserError: the folder holds neither, or no checkpoint yet.
    """
    if is_export(workdir):
        return read_tokenizer(workdir)
    copy = epath.Path(workdir) / FOLDER
    if copy.exists():
        return _read(copy)
    task = config_lib.read_resolved(workdir)["task"]
    if task["name"] != "tokenizer":
        raise UserError(f"{workdir} is a run of another task: give the workdir of a tokenizer.")
    model = config_lib.build(TokenizerConfig, task["model"], f"{workdir}: task.model")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        parts = checkpoints.restore_part(("ema", "extra"), step)
    shapes = network(model).shapes()
    params = {name: parts["ema"].get(name) for name in shapes}  # no discriminator
    if _sizes(params) != _sizes(shapes):
        raise UserError(
            f"The checkpoint in {workdir} is of another architecture than its config.json: restore "
            "the config that it was trained with."
        )
    extra = parts["extra"]
    return FrozenTokenizer.create(model, params, extra["latent_mean"], extra["latent_square"])


def _sizes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_of(path): tuple(leaf.shape) for path, leaf in leaves}


def find_tokenizer(source: str, workdir: str | Path) -> FrozenTokenizer:
    """The tokenizer kept in `workdir`, or else the one in `source`.

    Raises:
      UserError: `source` holds no tokenizer, or another one than `workdir` keeps.
    """
    folder = epath.Path(workdir) / FOLDER
    if not folder.exists():
        return load_tokenizer(source)
    ours = _read(folder)
    if epath.Path(source).exists() and load_tokenizer(source).hash != ours.hash:
        raise UserError(
            f"{source} is not the tokenizer ({ours.hash}) that {workdir} was started with: start "
            "the denoiser in another --workdir."
        )
    return ours


def keep_tokenizer(tokenizer: FrozenTokenizer, workdir: str | Path) -> None:
    """Copies a tokenizer into `workdir`, if none is there yet, so that the run stands alone."""
    folder = epath.Path(workdir) / FOLDER
    if not folder.exists():
        _write(folder, tokenizer)


def _write(folder: epath.Path, tokenizer: FrozenTokenizer) -> None:
    """Every process calls it; orbax writes once and under a temporary name until it is whole."""
    about = {"config": config_lib.to_dict(tokenizer.config), "hash": tokenizer.hash}
    tree = {"params": tokenizer.params, "mean": tokenizer.mean, "std": tokenizer.std}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            absolute(folder),
            args=ocp.args.Composite(
                weights=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(about)
            ),
        )


def _read(folder: epath.Path) -> FrozenTokenizer:
    about = json.loads((folder / "about" / "metadata").read_text())
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = numbered(checkpointer.restore(absolute(folder / "weights")))
    return FrozenTokenizer(
        tree["params"],
        np.asarray(tree["mean"]),
        np.asarray(tree["std"]),
        config_lib.build(TokenizerConfig, about["config"], "tokenizer"),
        about["hash"],
    )
