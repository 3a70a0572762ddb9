"""`python -m walt_jax.export --workdir DIR --output F.safetensors`: weights as one plain file."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.parallel.sharding import path_of
from walt_jax.training.checkpoints import Checkpoints

PARTS = ("ema", "params")


def export(
    workdir: str | Path, output: str | Path, *, step: int | None = None, part: str = "ema"
) -> int:
    """Writes a run's parameters; names are their paths, such as `stages/0/qkv/kernel`.

    The file's metadata hold the resolved config as JSON (`config`), `step` and `part`; of a
    tokenizer's run the arrays `latent_mean` and `latent_square`, by which latents are normalised,
    come along.

    Args:
      workdir: of the run, local or gs://.
      output: the file, local or gs://; it appears when it is whole.
      step: of the checkpoint; the newest that is whole by default.
      part: "ema", the weights that are sampled and evaluated, or "params".

    Returns:
      The step.

    Raises:
      UserError: no such run or checkpoint, or another kind of file.
    """
    path = epath.Path(output)
    if path.suffix != ".safetensors":
        raise UserError(f"{output} must end in .safetensors: that is what is written.")
    config = config_lib.read_resolved(workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        parts = checkpoints.restore_part((part, "extra"), step)
        step = checkpoints.restored
    moments = {k: v for k, v in parts["extra"].items() if k in ("latent_mean", "latent_square")}
    leaves = jax.tree_util.tree_leaves_with_path(parts[part] | moments)
    arrays = {path_of(place): np.ascontiguousarray(x) for place, x in leaves}
    metadata = {"config": json.dumps(config), "step": str(step), "part": part, "format": "walt_jax"}
    data = safetensors.numpy.save(arrays, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the file."""
    parser = cli.config_parser(
        "Writes a run's weights to a safetensors file.", config=False, overrides=False
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="*.safetensors")
    parser.add_argument("--checkpoint", type=int, help="its step (default: newest)")
    parser.add_argument("--part", choices=PARTS, default="ema", help="(default ema)")
    args, overrides = cli.parse(parser, argv)
    if overrides:
        raise UserError("export takes the config of its --workdir: leave --config.* out.")
    step = export(args.workdir, args.output, step=args.checkpoint, part=args.part)
    print(f"{args.part} of step {step} in {args.output}")


if __name__ == "__main__":
    cli.run(main)
