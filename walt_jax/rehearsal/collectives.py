"""What chips send each other in a compiled program, over which axes, and what is not hidden."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.hlo import Instruction, Module

DCN = "data (DCN)"  # `data` alone lies over slices


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one operation over the same mesh axes.

    Attributes:
      operation: "all-gather" and so on.
      axes: of the mesh, joined by "+"; "data (DCN)": what hosts of slices send each other, over the
        data centre's network.
      count: a step.
      bytes: of their results on one chip.
      seconds: derived: bytes over the links' rate.
      exposed: derived: the part of `seconds` for which the schedule has no other work meanwhile.
    """

    operation: str
    axes: str
    count: int
    bytes: int
    seconds: float
    exposed: float


def collectives_of(
    module: Module,
    counts: Counter[Instruction],
    topology: Topology,
    mesh: Mesh,
    priced: dict[str, int],
) -> tuple[Collective, ...]:
    """Summed by operation and axes, most bytes first."""
    found: dict[tuple[str, str], list[float]] = {}
    for body in module.computations.values():
        of_chips = _between_chips(module, body, topology, mesh, priced)
        of_slices = _between_slices(module, body, topology, priced)
        for within, sent in (*of_chips, *of_slices):
            if times := counts.get(within, 0):
                row = found.setdefault((sent.operation, sent.axes), [0, 0, 0.0, 0.0])
                for n, value in enumerate((sent.count, sent.bytes, sent.seconds, sent.exposed)):
                    row[n] += times * value
    rows = [Collective(*key, *map(int, row[:2]), *row[2:]) for key, row in found.items()]
    return tuple(sorted(rows, key=lambda c: -c.bytes))


def _between_chips(
    module: Module,
    body: list[Instruction],
    topology: Topology,
    mesh: Mesh,
    priced: dict[str, int],
) -> Iterator[tuple[Instruction, Collective]]:
    """The collectives of a computation, each with the instruction that begins it."""
    for i, meanwhile in _begun(module, body, priced):
        seconds = _seconds(i.collective, topology, mesh)
        exposed = max(0.0, seconds - meanwhile / topology.chip.hertz)
        operation = i.collective.operation.removesuffix("-start")
        axes = "+".join(_axes(i.collective, mesh)) or "?"
        yield i.within, Collective(operation, axes, 1, i.collective.bytes, seconds, exposed)


def _between_slices(
    module: Module, body: list[Instruction], topology: Topology, priced: dict[str, int]
) -> Iterator[tuple[Instruction, Collective]]:
    """What hosts of slices send each other in a computation, each with its receipt.

    It leaves when its send is scheduled, after what was sent before: a chip's part of the network
    carries one at a time. The end of its receipt waits for it.
    """
    receipts = {i.rendezvous: i for i in body if i.operation == "recv" and i.between_slices}
    ends = {i.name: rendezvous for rendezvous, i in receipts.items()}
    seconds = {key: _network_seconds(i, topology) for key, i in receipts.items()}
    arrives: dict[str, float] = {}
    waited = dict(seconds)
    clock = free = 0.0
    for i in body if receipts else ():
        cycles = sum(n * priced.get(j.name, j.cycles) for j, n in module.runs(i).items())
        clock += cycles / topology.chip.hertz
        if i.operation == "send" and i.rendezvous in receipts:
            free = arrives[i.rendezvous] = max(free, clock) + seconds[i.rendezvous]
        elif i.operation == "recv-done" and (key := ends.get(i.operands[0])) in arrives:
            waited[key] = max(0.0, arrives[key] - clock)
            clock += waited[key]
    for key, i in receipts.items():
        sizes = i.bytes, seconds[key], waited[key]
        yield i, Collective(i.between_slices, DCN, 1, *sizes)


@dataclasses.dataclass
class _Begun:
    """A collective, and the scheduled instruction that begins it."""

    collective: Instruction
    within: Instruction


def _begun(
    module: Module, body: list[Instruction], priced: dict[str, int]
) -> list[tuple[_Begun, int]]:
    """The collectives of a computation, each with the cycles until it is done.

    An asynchronous one appears in the fusion that begins it, in one whose work goes on meanwhile,
    and in the one that waits for its end; its channel is the same in all. Or it is a start and a
    done.
    """
    begun: dict[str, tuple[_Begun, int]] = {}
    ended: dict[str, int] = {}
    keys: dict[str, str] = {}  # of what is begun, by the instruction's name
    clock = 0
    for i in body:
        for inner in module.inside(i):
            if inner.is_collective:
                name = inner.channel or inner.name
                if name not in begun:
                    begun[name], keys[inner.name] = (_Begun(inner, i), clock), name
        clock += priced.get(i.name, i.cycles)
        for inner in module.inside(i):
            if inner.is_collective and not inner.operation.endswith("-start"):
                ended[inner.channel or inner.name] = clock
            elif inner.operation.endswith("-done"):
                ended.update((keys[name], clock) for name in inner.operands if name in keys)
    out = []
    for name, (start, clock) in begun.items():
        alone = start.within is start.collective and start.collective.operation[-6:] != "-start"
        out.append((start, 0 if alone else max(0, ended.get(name, clock) - clock)))
    return out


def _axes(instruction: Instruction, mesh: Mesh) -> tuple[str, ...]:
    """Along which axes of the mesh the devices of a group differ."""
    group = np.array([n for n in instruction.group() if n < mesh.size], int)
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return tuple(axis for axis, row in zip(mesh.axis_names, places) if len(set(row.tolist())) > 1)


def _seconds(instruction: Instruction, topology: Topology, mesh: Mesh) -> float:
    """Bytes over the rate of the links, as rings along one axis of the torus move them.

    An all-gather's result and a reduce-scatter's operand pass each chip once; an all-reduce is
    both. Of a permute's pair one sends all. A ring has two directions; where an axis of the slice
    does not close into a ring, as many bytes take twice as long. What several slices share, the
    chips of a slice divide among them before it crosses the data centre's network, each its part.
    """
    group = [mesh.devices.flat[n] for n in instruction.group() if n < mesh.size]
    slices = len({getattr(device, "slice_index", 0) for device in group}) or 1
    within = len(group) // slices or 1
    operation, passed = instruction.operation, float(instruction.bytes)
    if operation.startswith("reduce-scatter"):
        passed *= len(group)
    if operation.startswith(("all-reduce", "collective-permute")):
        passed *= 2
    chip = topology.chip
    closed = any(side in chip.wraps for side in topology.shape)
    on_links = passed * (within - 1) / within / (chip.link * (2 if closed else 1))
    return on_links + passed / within * (slices - 1) / slices / chip.dcn


def _network_seconds(receipt: Instruction, topology: Topology) -> float:
    """Bytes over a chip's part of the data centre's network, as a ring over all slices moves them.

    Of the same part of an array each slice has one chip; sums within a slice came before.
    """
    operation, passed, slices = receipt.between_slices, float(receipt.bytes), topology.slices
    if operation == "reduce-scatter":
        passed *= slices
    if operation == "all-reduce":
        passed *= 2
    if operation != "one-to-one":
        passed *= (slices - 1) / slices
    return passed / topology.chip.dcn
