"""`python -m walt_jax.rehearse --config C --topology v5e:4x4`: a job on a pod that is not there."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.parallel.mesh import parse_mesh
from walt_jax.rehearsal.attention_prices import AttentionPrices
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.report import Report, lines, rehearse
from walt_jax.rehearsal.search import CLIPS, candidates, remat, table, with_clips
from walt_jax.rehearsal.steps import KINDS, steps
from walt_jax.tasks import DenoiserTask
from walt_jax.training.experiment import Experiment

_DESCRIPTION = """Compiles the very step of a config for TPUs that are not there, and reports what
the compiler says: does it fit, how long does a step take, where does the time go, what do the chips
send each other. One chip too (v5e:1x1). Needs pip install "jax[tpu]" on Linux, and no TPU.

The compiler's: bytes of memory, cycles of each instruction and Pallas kernel, operations that move
data and their bytes. Derived from these: seconds (cycles / clock), the share of peak (model FLOPs,
without recomputation, / seconds / peak), the kernels' share (priced on few videos and scaled), the
time of communication (bytes / links' rate; not hidden is what exceeds the cycles that the schedule
has between its start and end). None is a reading from a chip.

Any key of the config is overridden by --config.key=value."""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, compiles and reports."""
    jax.config.update("jax_platforms", "cpu")
    args, overrides = cli.parse(_parser(), argv)
    _check(args)
    topology = Topology.parse(args.topology, args.num_slices)
    values = config_lib.load(args.config, overrides)
    if args.clips is not None:
        values = with_clips(values, args.clips, topology)
    devices = topology.devices()
    if args.search:
        reports = _search(values, topology, devices, args)
        shown = table(reports)
    else:
        values["mesh"] = dataclasses.asdict(_mesh(args, topology))
        reports = run(config_lib.build(Experiment, values), topology, devices, args.job)
        shown = [line for report in reports for line in lines(report)]
    if args.json:
        records = [dataclasses.asdict(report) for report in reports]
        text = json.dumps(records if args.search or len(records) > 1 else records[0], indent=1)
        if args.json == "-":
            shown = [text]
        else:
            Path(args.json).write_text(text + "\n")
    print("\n".join(shown))
    if not any(report.fits for report in reports):
        sys.exit(1)


def _check(args: argparse.Namespace) -> None:
    """Refuses, before minutes of compiling, what would fail after them or not be heeded."""
    if args.clips is not None and args.clips < 1:
        raise UserError(f"--clips must be at least 1 a chip, got {args.clips}.")
    if args.search and args.mesh:
        raise UserError("--search tries meshes of its own: leave --mesh out.")
    path = Path(args.json or "-")
    if path.is_dir() or not path.parent.is_dir():
        wrong = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(f"--json {path} cannot be written: {wrong}.")


def run(
    experiment: Experiment, topology: Topology, devices: Sequence[jax.Device], job: str
) -> list[Report]:
    """Rehearses every program of an experiment's job.

    Raises:
      UserError: the job, or the mesh, does not fit the experiment.
    """
    mesh = make_mesh(experiment.mesh, devices)
    task = experiment.task
    price: Any = lambda kernels: {}  # noqa: E731
    if isinstance(task, DenoiserTask):
        price = AttentionPrices(task.model, topology.kind)
    return [rehearse(step, topology, mesh, price) for step in steps(experiment, mesh, job)]


def _search(
    values: dict[str, Any],
    topology: Topology,
    devices: Sequence[jax.Device],
    args: argparse.Namespace,
) -> list[Report]:
    """One report for each candidate, printed as they come; of errors too."""
    found = []
    for changed in candidates(values, topology, args.job, [args.clips] if args.clips else CLIPS):
        try:
            reports = run(config_lib.build(Experiment, changed), topology, devices, args.job)
        except UserError as e:
            print(f"left out: {e}", file=sys.stderr)
            continue
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as e:
            reports = [_failed(changed, topology, e)]
        slowest = max(reports, key=lambda r: (not r.fits, r.est_cycles))
        found.append(dataclasses.replace(slowest, remat=remat(changed, args.job)))
        print(lines(slowest)[1].strip(), changed["mesh"], found[-1].remat, file=sys.stderr)
    return found


def _failed(values: dict[str, Any], topology: Topology, error: Exception) -> Report:
    """The row of a candidate at which the compiler fails, other than for want of memory."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return Report(
        f"{values['batch_size']} clips",
        str(topology),
        values["mesh"],
        fits=False,
        hbm_bytes=0,
        hbm_limit_bytes=topology.chip.hbm,
        compile_seconds=0.0,
        error=said[0],
    )


def _mesh(args: argparse.Namespace, topology: Topology) -> MeshConfig:
    """AXIS=N ...; by default the chips of a slice's longest side on `fsdp`, all else on `data`."""
    if args.job != "train":
        if args.mesh:
            raise UserError(f"--job {args.job} has every chip on the data axis: leave --mesh out.")
        return MeshConfig()
    return parse_mesh(",".join(args.mesh)) if args.mesh else MeshConfig(fsdp=topology.side)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="PATH[:ARG]")
    parser.add_argument("--topology", required=True, metavar="KIND:AxB", help="such as v5e:16x16")
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument(
        "--mesh", nargs="+", metavar="AXIS=N", help="default: fsdp along a slice's longest side"
    )
    parser.add_argument("--clips", type=int, help="a chip; default: the config's batch_size")
    parser.add_argument("--job", choices=KINDS, default="train")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON, to FILE or out")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, batch sizes and what remat keeps"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
