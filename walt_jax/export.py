"""`python -m walt_jax.export --workdir DIR --output OUT`: a model as plain files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.parallel.sharding import path_of
from walt_jax.training import exports
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.tokenizers import load_tokenizer

PARTS = ("ema", "params")
DTYPES = ("float32", "bfloat16")
_PATHS = (("data", "path"), ("images", "path"), ("task", "tokenizer"), ("task", "init_from"))


def export(
    workdir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    part: str = "ema",
    dtype: str = "float32",
) -> int:
    """Writes a run's parameters; names are their paths, such as `stages/0/qkv/kernel`.

    A file's metadata hold the resolved config as JSON (`config`), `step` and `part`; of a
    tokenizer's run the arrays `latent_mean` and `latent_square`, by which latents are normalised,
    come along. A folder (see `training/exports.py`) holds all that sampling or encoding needs:
    `walt_jax.load` takes it, and so does `config.task.tokenizer`.

    Args:
      workdir: of the run, local or gs://.
      output: a file `*.safetensors`, which appears when it is whole, or a folder; local or gs://.
      step: of the checkpoint; the newest that is whole by default.
      part: "ema", the weights that are sampled and evaluated, or "params".
      dtype: of the weights with two axes or more; the others stay float32. A folder's tokenizer
        has the same.

    Returns:
      The step.

    Raises:
      UserError: no such run or checkpoint, another kind of file, or a folder that holds something
        else.
    """
    path, kind = epath.Path(output), np.dtype(jax.numpy.dtype(dtype))
    if path.suffix and path.suffix != ".safetensors":
        raise UserError(f"{output} must end in .safetensors, or be a folder: that is written.")
    config = config_lib.read_resolved(workdir)
    if not path.suffix:
        return _export_folder(workdir, path, config, step, part, kind)
    parts, step = _parts(workdir, (part, "extra"), step)
    moments = {k: v for k, v in parts["extra"].items() if k in ("latent_mean", "latent_square")}
    metadata = {"config": json.dumps(config), "step": str(step), "part": part}
    data = _bytes(exports.rounded(parts[part] | moments, kind), metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
    return step


def _export_folder(
    workdir: str | Path,
    folder: epath.Path,
    config: dict[str, Any],
    step: int | None,
    part: str,
    dtype: np.dtype,
) -> int:
    denoises = config["task"]["name"] == "denoiser"
    if folder.exists() and any(folder.iterdir()) and not exports.is_export(folder):
        raise UserError(f"{folder} holds something else than an export: give another --output.")
    files = {}
    if denoises:
        parts, step = _parts(workdir, (part,), step)
        files[exports.DENOISER] = _bytes(exports.rounded(parts[part], dtype), {"part": part})
        files[config_lib.DATASET] = (epath.Path(workdir) / config_lib.DATASET).read_bytes()
    elif part != "ema":
        raise UserError("Of a tokenizer a folder holds the moving average: leave --part out.")
    else:
        _, step = _parts(workdir, ("extra",), step)
    tokenizer = load_tokenizer(workdir, None if denoises else step)
    moments = {"mean": np.asarray(tokenizer.mean), "std": np.asarray(tokenizer.std)}
    tree = {"params": exports.rounded(tokenizer.params, dtype), **moments}
    files[exports.TOKENIZER] = _bytes(tree, {"part": "ema"})
    for group, key in _PATHS:  # which mean nothing elsewhere
        if key in (config.get(group) or {}):
            config[group][key] = ""
    files[config_lib.RESOLVED] = (json.dumps(config, indent=2) + "\n").encode()
    about = {
        "format": exports.FORMAT,
        "step": step,
        "part": part,
        "dtype": dtype.name,
        "tokenizer": {"config": config_lib.to_dict(tokenizer.config)},
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / exports.ABOUT).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / exports.ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return step


def _parts(
    workdir: str | Path, names: tuple[str, ...], step: int | None
) -> tuple[dict[str, Any], int]:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        parts = checkpoints.restore_part(names, step)
        return parts, checkpoints.restored


def _bytes(tree: Any, metadata: Mapping[str, str]) -> bytes:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {path_of(place): x for place, x in leaves}
    return safetensors.numpy.save(arrays, {**metadata, "format": "walt_jax"})


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the files."""
    parser = cli.config_parser(
        "Writes a run's weights to a safetensors file, or a folder that samples by itself.",
        config=False,
        overrides=False,
    )
    parser.add_argument("--output", required=True, help="*.safetensors, or a folder")
    parser.add_argument("--checkpoint", type=int, help="its step (default: newest)")
    parser.add_argument("--part", choices=PARTS, default="ema", help="(default ema)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default float32)")
    args, overrides = cli.parse(parser, argv)
    if overrides:
        raise UserError("export takes the config of its --workdir: leave --config.* out.")
    step = export(args.workdir, args.output, step=args.checkpoint, part=args.part, dtype=args.dtype)
    print(f"{args.part} of step {step} in {args.output}")


if __name__ == "__main__":
    cli.run(main)
