"""Which options of XLA make the training step faster on TPUs, by their compiler?

    python -m benchmarks.xla_flags [--only NAME ...] [--config C] [--topology v5e:4x4] [--fsdp 4]
        [--clips 16] [--config.key=value ...]

Compiles the training step of a config without options, with those that were chosen
(`walt_jax/parallel/compiler.py`), and with these but for a row of MORE, for a pod that is not
there, and prints estimated cycles, what of the communication they do not hide, both as seconds a
step, and memory. `--out FILE` keeps the rows, so that a run that was cut off goes on. A row takes
minutes, whatever the number of layers.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from unittest import mock

import jax
from jax.sharding import Mesh

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.parallel import compiler
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearse import run
from walt_jax.training import program
from walt_jax.training.experiment import Experiment

MORE: dict[str, compiler.Options] = {
    "windowed scatters": {"xla_tpu_enable_windowed_einsum_for_reduce_scatter": True},
    "waited-for gathers": {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": False},
    # More of the on-chip memory for one operation; the default is 16 MiB.
    "vmem 64 MiB": {"xla_tpu_scoped_vmem_limit_kib": 65536},
    "pipelined gathers": {"xla_tpu_enable_ag_backward_pipelining": True},
    # Sums of gradients over data leave the loop and are joined.
    "joined sums": {
        "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
    },
    "scheduler's features": {"xla_tpu_enable_all_experimental_scheduler_features": True},
}
ROWS = ("none", "chosen", *MORE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="NAME")
    parser.add_argument("--config", default="configs/walt_ucf101.py:l")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--fsdp", type=int, default=4, help="the other chips are data's")
    parser.add_argument("--clips", type=int, default=16, help="a chip")
    parser.add_argument("--out", type=Path, help="JSON lines; what is there is not compiled again")
    args, overrides = cli.parse(parser)
    jax.config.update("jax_platforms", "cpu")
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    of = " ".join(
        [args.config, args.topology, f"fsdp {args.fsdp}", f"{args.clips} clips", *overrides]
    )
    done = {row["name"]: row for row in map(json.loads, lines) if row["of"] == of}
    topology = Topology.parse(args.topology)
    values = config_lib.load(args.config, overrides)
    values["batch_size"] = args.clips * topology.chips
    values["mesh"] = {"data": topology.chips // args.fsdp, "fsdp": args.fsdp}
    experiment = config_lib.build(Experiment, values)
    print(f"{args.config} on {args.topology}, {args.clips} clips a chip; the compiler's estimates")
    for name in args.only:
        if name not in done:
            done[name] = _row(name, experiment, topology)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(done[name] | {"of": of}) + "\n")
        print(_line(done[name], done.get("none")), flush=True)


def _row(name: str, experiment: Experiment, topology: Topology) -> dict:
    chosen = program.compiler_options

    def options(mesh: Mesh) -> compiler.Options:
        return {} if name == "none" else chosen(mesh) | MORE.get(name, {})

    with mock.patch.object(program, "compiler_options", options):
        try:
            (report,) = run(experiment, topology, topology.devices(), "train")
        except jax.errors.JaxRuntimeError as e:  # this libtpu has no such option, or cannot
            return {"name": name, "error": str(e).splitlines()[0]}
    return {"name": name, **dataclasses.asdict(report)}


def _line(row: dict, plain: dict | None) -> str:
    if "error" in row:
        return f"{row['name']:22} {row['error']}"
    if not row["est_cycles"]:
        return f"{row['name']:22} {row['hbm_bytes'] / 2**30:.1f} GiB do not fit"
    whole = row["est_step_seconds"] + row["exposed_seconds"]
    line = (
        f"{row['name']:22} {row['est_cycles'] / 1e6:7.1f} Mcycles  {row['est_step_seconds']:.3f} + "
        f"{row['exposed_seconds']:.3f} s  {row['hbm_bytes'] / 2**30:5.2f} GiB"
    )
    if plain and plain.get("est_cycles"):
        before = plain["est_step_seconds"] + plain["exposed_seconds"]
        line += f"  {whole / before:.3f}x"
    return line


if __name__ == "__main__":
    cli.run(main)
