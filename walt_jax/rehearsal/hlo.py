"""Reading a scheduled HLO module as the TPU compiler prints it."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

_COLLECTIVES = ("all-", "reduce-scatter", "collective-", "ragged-all-to-all")
_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO, `%name = text`.

    Attributes:
      scatters: whether a device keeps its part alone of what is summed: the TPU compiler writes a
        reduce-scatter as a fused all-reduce and a slice of it.
    """

    name: str
    text: str
    scatters: bool = False

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        return _KERNEL in self.text

    @property
    def cycles(self) -> int:
        """The compiler's estimate, 0 where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @functools.cached_property
    def operation(self) -> str:
        """`fusion` of `%name = f32[8]{0} fusion(...)`."""
        found = re.search(r"[\])}] ([a-z][\w\-]*)\(", self.text)
        if self.scatters and found and found[1] == "all-reduce":
            return "reduce-scatter"
        return found[1] if found else ""

    @property
    def is_collective(self) -> bool:
        """Whether it moves data between devices; of an asynchronous one, its start."""
        return self.operation.startswith(_COLLECTIVES) and not self.operation.endswith("-done")

    @property
    def bytes(self) -> int:
        """Of the result; an asynchronous start gives its operands too, which do not count.

        Of a fused reduce-scatter, a device's part.
        """
        result = re.split(r" [a-z][\w\-]*\(", self.text)[0]
        arrays = [
            int(bits) // 8 * math.prod(map(int, sizes.split(",")))
            for bits, sizes in re.findall(r"\b[a-z]+(\d+)\w*\[([\d,]+)\]", result)
        ]
        total = sum(arrays[len(arrays) // 2 :] if self.operation.endswith("-start") else arrays)
        parted = self.scatters and self.operation == "reduce-scatter"
        return total // (len(self.group()) or 1) if parted else total

    @property
    def kernel(self) -> str:
        """What tells kernels apart: shapes, memories and body, not operands and metadata."""
        return re.sub(r"%[\w.\-]+|metadata=\{[^}]*\}", "", self.text)

    @property
    def source(self) -> str:
        """The JAX operation that it comes from, its named scopes before it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def called(self, role: str) -> list[str]:
        """Computations that the instruction names as `role=%name` or `role={%name, %name}`."""
        found = re.search(rf"\b{role}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.text)
        return re.findall(r"%([\w.\-]+)", found[1] or found[2]) if found else []

    @property
    def channel(self) -> str:
        """What names a collective wherever it appears; "" without one."""
        found = re.search(r"\bchannel_id=(\d+)", self.text)
        return found[1] if found else ""

    @property
    def between_slices(self) -> str:
        """The collective that hosts of slices carry out by this send or recv; "" of all else."""
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', self.text)
        return found[1].lower().replace("_", "-") if found else ""

    @property
    def rendezvous(self) -> str:
        """What a send and its recv on other hosts have in common; "" of all else."""
        found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """Names of the instructions and computations that it refers to."""
        return re.findall(r"%([\w.\-]+)", self.text)

    def group(self) -> list[int]:
        """The devices that a collective joins, of one group; empty where it does not say."""
        if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", self.text):
            return [int(n) for n in found[1].split(",")]
        pattern = r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)"
        if found := re.search(pattern, self.text):
            devices = _devices(found[3])
            return devices.reshape(int(found[1]), int(found[2]))[0].tolist()
        pattern = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}"
        if found := re.search(pattern, self.text):
            sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", found[1]))
            joined = re.findall(r"'([\w.]+)'", found[3])
            places = tuple(slice(None) if axis in joined else 0 for axis in sizes)
            shape = [int(n) for n in sizes.values()]
            devices = _devices(found[2]) if found[2] else np.arange(math.prod(shape))
            return devices.reshape(shape)[places].ravel().tolist()
        return []


def _devices(text: str) -> np.ndarray:
    """The devices of "[4,2]T(1,0)", so many, laid out so, then transposed; or of "0,4,1,5"."""
    if not text.startswith("["):
        return np.array([int(n) for n in text.split(",")])
    sizes, _, order = text.rstrip(")").partition("T(")
    shape = [int(n) for n in sizes.strip("[]").split(",")]
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose([int(n) for n in order.split(",")]) if order else devices


class Module:
    """The computations of a scheduled module, by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                body = self.computations[header[2]] = []
                scatters = header[2].startswith("all-reduce-scatter")
                if header[1]:
                    self.entry = header[2]
            elif found := re.match(r"  (?:ROOT )?%([\w.\-]+) = (.*)", line):
                body.append(Instruction(found[1], found[2], scatters))

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instruction, and those of the fusion that it calls."""
        yield instruction
        for name in instruction.called("calls"):
            for inner in self.computations[name]:
                yield from self.inside(inner)

    def kind(self, instruction: Instruction) -> str:
        """ "kernels", "products", "copies", "collectives" or "the rest"."""
        if instruction.is_kernel:
            return "kernels"
        if instruction.operation.startswith(_COLLECTIVES):
            return "collectives"
        if instruction.operation.startswith(("copy", "transpose")):
            return "copies"
        if any(i.operation in ("convolution", "dot") for i in self.inside(instruction)):
            return "products"
        return "the rest"

    def counts(self) -> Counter[Instruction]:
        """How often each priced instruction runs; of a conditional, the costliest branch.

        Raises:
          ValueError: a loop without a constant bound.
        """
        return self._counts(self.entry, 1)

    def _counts(self, computation: str, times: int) -> Counter[Instruction]:
        out: Counter[Instruction] = Counter()
        for instruction in self.computations[computation]:
            out.update(self.runs(instruction, times))
        return out

    def runs(self, instruction: Instruction, times: int = 1) -> Counter[Instruction]:
        """How often each priced instruction runs as this one runs so many times; see `counts`."""
        if instruction.operation == "while":
            trips = times * self._trips(instruction)
            return self._counts(*instruction.called("body"), trips)
        if instruction.operation == "conditional":
            roles = ("branch_computations", "true_computation", "false_computation")
            names = [name for role in roles for name in instruction.called(role)]
            branches = [self._counts(name, times) for name in names]
            return max(branches, key=lambda b: sum(i.cycles * n for i, n in b.items()))
        if instruction.operation == "call":
            return self._counts(*instruction.called("to_apply"), times)
        return Counter({instruction: times})

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
