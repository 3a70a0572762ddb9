"""What a function costs on a TPU by the TPU compiler's own estimate, with no TPU attached.

`estimate(function, *arguments, chip="v5e")` compiles for one chip of a topology that is not there
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
import importlib.util
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
from jax.experimental import topologies

from walt_jax.errors import UserError

NOTE = "estimates by the TPU compiler, not readings from a chip"
KERNEL_SECONDS = 900.0  # the walk of a kernel grows with its grid; beyond this it stays unpriced
_COLLECTIVES = ("all-", "reduce-scatter", "collective-")
_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU: its smallest topology, clock, bf16 FLOPs a cycle and bytes of HBM."""

    topology: str
    hertz: float
    flops_per_cycle: int
    hbm: int


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 131_072, 16 * 2**30),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 262_144, 95 * 2**30),
    "v6e": Chip("v6e:2x2", 1.75e9, 524_288, 32 * 2**30),
}


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
      moved: bytes that collectives give, by operation.
      arguments, outputs, temporaries: bytes of HBM.
    """

    cycles: int
    instructions: dict[str, int]
    kernels: int
    unpriced: tuple[str, ...]
    kinds: dict[str, int]
    moved: dict[str, int]
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

    exported = jax.export.export(jax.jit(flat), platforms=["tpu"])(*leaves)
    price = functools.partial(_price_kernels, exported, chip) if walk else lambda kernels: {}
    return of_compiled(_compile(exported, chip), price)


def of_compiled(
    compiled: jax.stages.Compiled, price: Callable[[dict[str, "Instruction"]], dict[str, int]]
) -> Estimate:
    """Adds up a compiled program, for each device.

    Args:
      compiled: for TPUs.
      price: cycles of Pallas kernels, by name; those that it leaves out stay unpriced.

    Raises:
      ValueError: a loop without a constant bound.
    """
    program = _Program(compiled.as_text())
    counts = program.counts()
    kernels = {i.name: i for i in counts if i.is_kernel}
    priced = price(kernels)
    cycles: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for i, times in counts.items():
        kind = program.kind(i)
        cycles[i.name] = times * priced.get(i.name, i.cycles)
        kinds[kind] += cycles[i.name]
        if kind == "collectives" and not i.operation.endswith("-done"):
            moved[i.operation.removesuffix("-start")] += times * i.bytes
    memory = compiled.memory_analysis()
    return Estimate(
        cycles=cycles.total(),
        instructions={name: c for name, c in cycles.items() if c},
        kernels=kinds["kernels"],
        unpriced=tuple(name for name in kernels if name not in priced),
        kinds={name: c for name, c in kinds.most_common() if c},
        moved=dict(moved.most_common()),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )


def devices(topology: str) -> list[jax.Device]:
    """Those of "v5e:4x4", which need not be there.

    Raises:
      UserError: the TPU compiler is not installed, or there is no such topology.
    """
    _load_compiler()
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as e:
        raise UserError(f"No TPU topology {topology!r}, such as v5e:4x4: {e}") from e
    return found.devices


def _load_compiler() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'The TPU compiler is missing: pip install "jax[tpu]" (Linux on x86-64; no TPU is '
            "needed) to print its estimates."
        )
    # Read when libtpu loads: without them it asks a metadata server for the TPUs of this machine,
    # and refuses to load beside another process that compiles.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _compile(exported: jax.export.Exported, chip: str) -> jax.stages.Compiled:
    device = jax.sharding.SingleDeviceSharding(devices(CHIPS[chip].topology)[0])
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for a in exported.in_avals]
    args, kwargs = jax.tree.unflatten(exported.in_tree, shapes)
    lowered = jax.jit(exported.call).lower(*args, **kwargs)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise TooLarge(f"{str(e).splitlines()[0]} ({chip}).") from e


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO, `%name = text`."""

    name: str
    text: str

    @property
    def is_kernel(self) -> bool:
        return _KERNEL in self.text

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def operation(self) -> str:
        """`fusion` of `%name = f32[8]{0} fusion(...)`."""
        found = re.search(r"[\])}] ([a-z][\w\-]*)\(", self.text)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Of the result; an asynchronous start gives its operands too, which do not count."""
        result = self.text.split(f" {self.operation}(")[0]
        arrays = [
            int(bits) // 8 * math.prod(map(int, sizes.split(",")))
            for bits, sizes in re.findall(r"\b[a-z]+(\d+)\w*\[([\d,]+)\]", result)
        ]
        return sum(arrays[len(arrays) // 2 :] if self.operation.endswith("-start") else arrays)

    @property
    def kernel(self) -> str:
        """What tells kernels apart: shapes, memories and body, not operands and metadata."""
        return re.sub(r"%[\w.\-]+|metadata=\{[^}]*\}", "", self.text)

    def called(self, role: str) -> list[str]:
        """Computations that the instruction names as `role=%name` or `role={%name, %name}`."""
        found = re.search(rf"\b{role}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.text)
        return re.findall(r"%([\w.\-]+)", found[1] or found[2]) if found else []


class _Program:
    """The computations of a scheduled HLO module, by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                body = self.computations[header[2]] = []
                if header[1]:
                    self.entry = header[2]
            elif found := re.match(r"  (?:ROOT )?%([\w.\-]+) = (.*)", line):
                body.append(Instruction(found[1], found[2]))

    def kind(self, instruction: Instruction) -> str:
        """One of Estimate.kinds."""
        operation = instruction.operation
        if instruction.is_kernel:
            return "kernels"
        if operation.startswith(_COLLECTIVES):
            return "collectives"
        if operation.startswith(("copy", "transpose")):
            return "copies"
        inside = [i for name in instruction.called("calls") for i in self.computations[name]]
        if any(i.operation in ("convolution", "dot") for i in [instruction, *inside]):
            return "products"
        return "the rest"

    def counts(self) -> Counter[Instruction]:
        """How often each priced instruction runs; of a conditional, the costliest branch."""
        return self._counts(self.entry, 1)

    def _counts(self, computation: str, times: int) -> Counter[Instruction]:
        out: Counter[Instruction] = Counter()
        for instruction in self.computations[computation]:
            if " while(" in instruction.text:
                trips = times * self._trips(instruction)
                out.update(self._counts(*instruction.called("body"), trips))
            elif " conditional(" in instruction.text:
                roles = ("branch_computations", "true_computation", "false_computation")
                names = [name for role in roles for name in instruction.called(role)]
                branches = [self._counts(name, times) for name in names]
                out.update(max(branches, key=lambda b: sum(i.cycles * n for i, n in b.items())))
            elif " call(" in instruction.text:
                out.update(self._counts(*instruction.called("to_apply"), times))
            else:
                out[instruction] += times
        return out

    def _trips(self, loop: Instruction) -> int:
        condition = self.computations[loop.called("condition")[0]]
        constants = {
            i.name: int(c[1]) for i in condition if (c := re.search(r" constant\((\d+)\)", i.text))
        }
        for i in condition:
            compared = re.search(r" compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", i.text)
            if compared and compared[1] in constants:
                return constants[compared[1]]
        raise ValueError(f"The loop {loop.name} has no constant bound: its cycles are unknown.")


_PRICES: dict[tuple[str, str], int | None] = {}


def _price_kernels(
    exported: jax.export.Exported, chip: str, kernels: dict[str, Instruction]
) -> dict[str, int]:
    """Cycles by name; kernels that failed are left out."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        if kernels:
            program.write_bytes(exported.serialize())
        for name, instruction in kernels.items():
            if (chip, instruction.kernel) not in _PRICES:
                _PRICES[chip, instruction.kernel] = _walk(program, chip, name)
    prices = {name: _PRICES[chip, i.kernel] for name, i in kernels.items()}
    return {name: price for name, price in prices.items() if price is not None}


def _walk(program: Path, chip: str, kernel: str) -> int | None:
    """Compiles in another process that dumps the static profile of one kernel."""
    # Walking all instructions takes many minutes, and the option takes one exact name.
    options = (
        f"--xla_jf_dump_static_llo_profile_to={program.parent} "
        f"--xla_jf_dump_only_matching_hlo={kernel}"
    )
    environment = dict(os.environ, LIBTPU_INIT_ARGS=options, JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "benchmarks.tpu_estimate", str(program), chip]
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
