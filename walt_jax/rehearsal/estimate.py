"""What a function costs on a TPU by the TPU compiler's own estimate, with no TPU attached.

`estimate(function, *arguments, chip="v5e")` compiles for one chip of a slice that is not there
and adds up the cycles that the compiler wrote beside each instruction of the scheduled program,
loops multiplied out. Pallas kernels carry no such number: each distinct one is compiled once more
in a process of its own, in which the compiler walks the kernel's scheduled bundles and writes its
cycles to a file.

These are estimates, not readings from a chip. Transfers between memories that the schedule does
not hide are not in them.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from walt_jax.errors import UserError
from walt_jax.kernels.target import compiling_for
from walt_jax.rehearsal.chips import CHIPS, Topology
from walt_jax.rehearsal.hlo import Instruction, Module
from walt_jax.weights import cache_folder

NOTE = "estimates by the TPU compiler, not readings from a chip"
KERNEL_SECONDS = 900.0  # the walk of a kernel grows with its grid; beyond this it stays unpriced


class TooLarge(UserError):
    """The program does not fit into the chip's memory."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate for one chip.

    Attributes:
      cycles: of the whole program, loops multiplied out.
      instructions: cycles of each instruction, likewise; kernels among them.
      kernels: cycles of the Pallas kernels among them.
      unpriced: Pallas kernels whose walk failed or took too long; `cycles` lacks them.
      kinds: cycles of "kernels", "products", "copies", "collectives" and "the rest".
      relayouts: bytes of the copies and transpositions in memory, inside of fusions too, by name.
      arguments, outputs, temporaries: bytes of HBM.
    """

    cycles: int
    instructions: dict[str, int]
    kernels: int
    unpriced: tuple[str, ...]
    kinds: dict[str, int]
    relayouts: dict[str, int]
    arguments: int
    outputs: int
    temporaries: int


def estimate(
    function: Callable[..., Any], *arguments: Any, chip: str, walk: bool = True
) -> Estimate:
    """Prices `function(*arguments)` on one chip.

    Args:
      function: to be jitted.
      arguments: trees of arrays or ShapeDtypeStructs.
      chip: a key of CHIPS.
      walk: whether to price Pallas kernels; their time grows with their grids.

    Raises:
      UserError: the TPU compiler is not installed.
      TooLarge: the compiler finds no room for the program.
      ValueError: a loop without a constant bound.
    """
    leaves, structure = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> list[Any]:  # a program's file takes no trees with other keys than str
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

    with compiling_for(CHIPS[chip].target):
        exported = jax.export.export(jax.jit(flat), platforms=["tpu"])(*leaves)
    price = functools.partial(_price_kernels, exported, chip) if walk else lambda kernels: {}
    return of_compiled(_compile(exported, chip), price)


def of_compiled(
    compiled: jax.stages.Compiled, price: Callable[[dict[str, Instruction]], dict[str, int]]
) -> Estimate:
    """Adds up a compiled program, for each device.

    Args:
      compiled: for TPUs.
      price: cycles of Pallas kernels, by name; those that it leaves out stay unpriced.

    Raises:
      ValueError: a loop without a constant bound.
    """
    module = Module(compiled.as_text())
    counts = module.counts()
    kernels = {i.name: i for i in counts if i.is_kernel}
    priced = price(kernels)
    cycles = {i.name: times * priced.get(i.name, i.cycles) for i, times in counts.items()}
    kinds: Counter[str] = Counter()
    for i in counts:
        kinds[module.kind(i)] += cycles[i.name]
    memory = compiled.memory_analysis()
    return Estimate(
        cycles=sum(cycles.values()),
        instructions={name: c for name, c in cycles.items() if c},
        kernels=kinds["kernels"],
        unpriced=tuple(name for name in kernels if name not in priced),
        kinds={name: c for name, c in kinds.most_common() if c},
        relayouts={i.name: size for i in counts if (size := _moved(module, i))},
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )


def _moved(module: Module, instruction: Instruction) -> int:
    """Bytes of the largest array that the instruction copies or transposes."""
    if instruction.is_kernel:
        return 0
    moves = (i for i in module.inside(instruction) if i.operation in ("copy", "transpose"))
    return max((i.bytes for i in moves), default=0)


def _compile(exported: jax.export.Exported, chip: str) -> jax.stages.Compiled:
    device = jax.sharding.SingleDeviceSharding(Topology.parse(CHIPS[chip].topology).devices()[0])
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for a in exported.in_avals]
    args, kwargs = jax.tree.unflatten(exported.in_tree, shapes)
    lowered = jax.jit(exported.call).lower(*args, **kwargs)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if too_large(e) is None:
            raise
        raise TooLarge(f"{str(e).splitlines()[0]} ({chip}).") from e


def too_large(error: jax.errors.JaxRuntimeError) -> int | None:
    """Bytes of HBM that the compiler says the program needs; None for another error.

    They are those of temporaries where its sentence has no more, and 0 where it has no number.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])\b", str(error))
    return int(float(found[1]) * units[found[2]]) if found else 0


def _price_kernels(
    exported: jax.export.Exported, chip: str, kernels: dict[str, Instruction]
) -> dict[str, int]:
    """Cycles by name; kernels that failed are left out."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        if kernels:
            program.write_bytes(exported.serialize())
        prices = {name: _price(program, chip, i) for name, i in kernels.items()}
    return {name: price for name, price in prices.items() if price is not None}


def _price(program: Path, chip: str, kernel: Instruction) -> int | None:
    """Cycles of a kernel, kept in the cache: a walk takes long, and its result never changes."""
    version = importlib.metadata.version("libtpu")
    key = hashlib.sha256(f"{version} {chip} {kernel.kernel}".encode()).hexdigest()
    kept = cache_folder() / "kernel_cycles" / key
    if kept.exists():
        return int(kept.read_text())
    cycles = _walk(program, chip, kernel.name)
    if cycles is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(str(cycles))
        part.replace(kept)
    return cycles


def _walk(program: Path, chip: str, kernel: str) -> int | None:
    """Compiles in another process that dumps the static profile of one kernel."""
    # Walking all instructions takes many minutes, and the option takes one exact name.
    options = (
        f"--xla_jf_dump_static_llo_profile_to={program.parent} "
        f"--xla_jf_dump_only_matching_hlo={kernel}"
    )
    environment = dict(os.environ, LIBTPU_INIT_ARGS=options, JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "walt_jax.rehearsal.estimate", str(program), chip]
    try:
        subprocess.run(command, env=environment, timeout=KERNEL_SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        return None
    for profile in program.parent.glob("*_static_llo_profile.textproto"):
        text = profile.read_text()
        if f'hlo_op_name: "{kernel}"' in text:
            return int(re.search(r"estimated_cycles: (\d+)", text)[1]) or None
    return None


def peak_share(flops: float, cycles: float, chip: str) -> float:
    """Share of the chip's bf16 peak (model FLOPs utilisation) by the estimate; nan without one."""
    return flops / (cycles * CHIPS[chip].flops_per_cycle) if cycles else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles an exported program for a TPU.")
    parser.add_argument("program", type=Path)
    parser.add_argument("chip", choices=CHIPS)
    args = parser.parse_args()
    _compile(jax.export.deserialize(args.program.read_bytes()), args.chip)


if __name__ == "__main__":
    main()
