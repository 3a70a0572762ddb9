"""What a denoiser's whole training step costs on a TPU pod, by the TPU compiler's estimate.

    python -m benchmarks.training_step [--config configs/walt_ucf101.py:l] [--topology v5e:4x4]
        [--clips 16] [--mesh fsdp=16] [--config.task.model.attention=xla]

Compiles the very step that `walt_jax.train` runs, on cached latents, for a topology that is not
there: loss, gradients, clipping, AdamW, moving average. Prints cycles by kind of operation, the
share of peak (model FLOPs utilisation), the bytes that collectives give, and HBM.

All figures are the compiler's, but for the kernels of window attention: each is priced alone on
`--price-clips` clips and scaled to a chip's, as its work is. Estimates are no readings from a chip;
transfers and collectives that the schedule does not hide are not in them.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.denoiser_speed import passes
from benchmarks.tpu_estimate import (
    CHIPS,
    NOTE,
    Estimate,
    Instruction,
    devices,
    estimate,
    of_compiled,
    peak_share,
)
from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig, TokenizerConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import AXES, MeshConfig, make_mesh
from walt_jax.tasks import DenoiserTask
from walt_jax.training.experiment import Experiment
from walt_jax.training.program import Program


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    args, overrides = cli.parse(_parser())
    record = price(args, overrides)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/walt_ucf101.py:l")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--clips", type=int, default=16, help="a chip")
    parser.add_argument("--mesh", nargs="+", metavar="AXIS=N", help="default: all chips on fsdp")
    parser.add_argument("--price-clips", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def price(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Compiles, prices and prints.

    Raises:
      UserError: no TPU compiler, no such topology, or a config of something else than a denoiser.
    """
    chips, chip = devices(args.topology), args.topology.split(":")[0]
    if chip not in CHIPS:
        raise UserError(f"--topology is one of {', '.join(CHIPS)}, such as v5e:4x4; got {chip!r}.")
    values = config_lib.load(args.config, overrides)
    values["batch_size"] = args.clips * len(chips)
    experiment = config_lib.build(Experiment, values)
    if not isinstance(experiment.task, DenoiserTask):
        raise UserError(f"{args.config} trains no denoiser.")
    if experiment.images is not None or experiment.task.model.upsampling is not None:
        raise UserError(f"{args.config} trains on more than cached latents of videos.")
    mesh = make_mesh(_mesh(args.mesh, len(chips)), chips)
    program, inputs = Program(experiment, mesh), stand_ins(experiment)
    compiled = program.lower(*inputs).compile()
    prices = Prices(experiment.task.model, chip, args.clips, args.price_clips)
    cost = of_compiled(compiled, prices)
    flops = program.flops(*inputs) / len(chips)
    share = peak_share(flops, cost.cycles, chip)
    print(
        f"{args.config} {' '.join(overrides)}: {args.clips} clips a chip of {args.topology}, "
        f"{' x '.join(f'{axis} {n}' for axis, n in mesh.shape.items())}; {NOTE}"
    )
    _print(cost, share, chip)
    return {"share_of_peak": share, "flops_a_chip": flops, **dataclasses.asdict(cost)}


def _mesh(sizes: list[str] | None, chips: int) -> MeshConfig:
    found = dict(size.partition("=")[::2] for size in sizes or [f"fsdp={chips}"])
    if not set(found) <= set(AXES) or not all(n.lstrip("-").isdigit() for n in found.values()):
        raise UserError(f"--mesh takes {', '.join(AXES)}, such as fsdp=16; got {sizes}.")
    return MeshConfig(**({"data": 1} | {axis: int(n) for axis, n in found.items()}))


def stand_ins(experiment: Experiment) -> tuple[FrozenTokenizer, dict[str, jax.ShapeDtypeStruct]]:
    """A tokenizer without weights, which cached latents do without, and shapes of a batch."""
    model, b = experiment.task.model, experiment.batch_size
    channels = jax.ShapeDtypeStruct((model.latent_channels,), jnp.float32)
    config = TokenizerConfig(latent_channels=model.latent_channels)
    shapes = {
        "latents": jax.ShapeDtypeStruct((b, *model.grid, model.latent_channels), jnp.bfloat16),
        "label": jax.ShapeDtypeStruct((b,), jnp.int32),
    }
    if length := experiment.data.caption_bytes:
        shapes["text"] = jax.ShapeDtypeStruct((b, length), jnp.uint8)
    return FrozenTokenizer({}, channels, channels, config, "none"), shapes


class Prices:
    """Cycles of the kernels of window attention, each priced on a few clips and scaled."""

    def __init__(self, model: DenoiserConfig, chip: str, clips: int, priced: int) -> None:
        layers = len(model.windows) if model.order in ("alternate", "stages") else 1
        self._model = dataclasses.replace(model, num_layers=layers, skips=False)
        self._chip, self._clips, self._priced = chip, clips, priced

    def __call__(self, kernels: dict[str, Instruction]) -> dict[str, int]:
        """Cycles by name."""
        found = {} if not kernels else self._of_layers()
        return {name: found[_stem(name)] for name in kernels if _stem(name) in found}

    def _of_layers(self) -> dict[str, int]:
        """Those of one layer for each window, by name without number."""
        *_, (_, gradients, arguments, _) = passes(self._model, clips=self._priced)
        cost = estimate(gradients, *arguments, chip=self._chip)
        scale = self._clips / self._priced
        return {_stem(name): round(c * scale) for name, c in cost.instructions.items()}


def _stem(name: str) -> str:
    return re.sub(r"(\.(\d+|clone|remat\d*))+$", "", name)


def _print(cost: Estimate, share: float, chip: str) -> None:
    seconds = cost.cycles / CHIPS[chip].hertz
    print(f"{cost.cycles / 1e6:.1f} Mcycles, {seconds:.3f} s, {share:.1%} of peak")
    for kind, cycles in cost.kinds.items():
        print(f"  {kind:<12}{cycles / 1e6:>10.1f} Mcycles{cycles / cost.cycles:>8.1%}")
    for operation, moved in cost.moved.items():
        print(f"  {operation:<22}{moved / 2**20:>10.0f} MiB a chip")
    gib = [n / 2**30 for n in (cost.arguments, cost.temporaries)]
    print(f"  HBM: {gib[0]:.2f} GiB of arguments, {gib[1]:.2f} of temporaries")
    if cost.unpriced:
        print(f"  kernels without a price: {', '.join(cost.unpriced)}")


if __name__ == "__main__":
    cli.run(main)
