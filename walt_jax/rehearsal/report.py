"""What a compiled program needs and where its time goes, as figures and as text."""

import dataclasses
import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from walt_jax.kernels.target import compiling_for
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.estimate import NOTE, peak_share, too_large
from walt_jax.rehearsal.hlo import Instruction, Module
from walt_jax.rehearsal.steps import Step

ROOMS = ("optimizer", "embed", "modulation", "attention", "cross_attention", "mlp", "read_out")
_ROOM = re.compile(rf"\b({'|'.join(ROOMS)})\b")
_VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant")
Prices = Callable[[dict[str, Instruction]], dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one operation over the same mesh axes.

    Attributes:
      operation: "all-gather" and so on.
      axes: of the mesh, joined by "+".
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


@dataclasses.dataclass(frozen=True)
class Report:
    """A program on a topology; names that begin with `est_` are the compiler's estimates.

    Attributes:
      step: what was compiled; topology, mesh: for what.
      fits: whether it fits into a chip's memory.
      hbm_bytes: arguments + temporaries + outputs that are no arguments; hbm_limit_bytes: a chip's.
      argument_bytes, temporary_bytes: parts of it.
      est_cycles, est_step_seconds: of one chip; est_mfu: model FLOPs over peak, derived from them.
      kinds: cycles by kind of instruction; rooms: by part of the model.
      collective_bytes: sum over `collectives`.
      exposed_seconds: derived, see Collective.
      buffers: the largest arrays, (bytes, type, where from).
      unpriced: kernels without a price, which est_cycles lacks.
      compile_seconds: on this machine.
    """

    step: str
    topology: str
    mesh: dict[str, int]
    fits: bool
    hbm_bytes: int
    hbm_limit_bytes: int
    compile_seconds: float
    argument_bytes: int = 0
    temporary_bytes: int = 0
    est_cycles: int = 0
    est_step_seconds: float = 0.0
    est_mfu: float = 0.0
    flops_a_chip: float = 0.0
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    rooms: dict[str, int] = dataclasses.field(default_factory=dict)
    collective_bytes: int = 0
    exposed_seconds: float = 0.0
    collectives: tuple[Collective, ...] = ()
    buffers: tuple[tuple[int, str, str], ...] = ()
    unpriced: tuple[str, ...] = ()


def rehearse(step: Step, topology: Topology, mesh: Mesh, price: Prices) -> Report:
    """Compiles a step and reads what the compiler says of it.

    Args:
      step: the program.
      topology: of the mesh's devices.
      mesh: what it is compiled for.
      price: cycles of Pallas kernels by name.

    Raises:
      ValueError: a loop without a constant bound.
    """
    began = time.monotonic()
    sizes = {axis: n for axis, n in mesh.shape.items()}
    about = {"step": step.name, "topology": str(topology), "mesh": sizes}
    limit = topology.chip.hbm
    try:
        # Nothing may run meanwhile: the mesh's devices are not there.
        with compiling_for(topology.chip.target), jax.set_mesh(mesh):
            compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if (needed := too_large(e)) is None:
            raise
        seconds = time.monotonic() - began
        return Report(
            **about, fits=False, hbm_bytes=needed, hbm_limit_bytes=limit, compile_seconds=seconds
        )
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    flops = step.flops() / topology.chips
    return Report(
        **about,
        fits=needed <= limit,
        hbm_bytes=needed,
        hbm_limit_bytes=limit,
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops_a_chip=flops,
        **read(compiled.as_text(), flops, topology, mesh, price),
    )


def read(text: str, flops: float, topology: Topology, mesh: Mesh, price: Prices) -> dict[str, Any]:
    """Fields of a Report that the scheduled program tells."""
    module = Module(text)
    counts = module.counts()
    kernels = {i.name: i for i in counts if i.is_kernel}
    priced = price(kernels)
    kinds: Counter[str] = Counter()
    rooms: Counter[str] = Counter()
    for i, times in counts.items():
        cycles = times * priced.get(i.name, i.cycles)
        kinds[module.kind(i)] += cycles
        rooms[room(module, i)] += cycles
    total = kinds.total()
    collectives = _collectives(module, counts, topology, mesh, priced)
    return {
        "est_cycles": total,
        "est_step_seconds": total / topology.chip.hertz,
        "est_mfu": peak_share(flops, total, topology.kind),
        "kinds": {name: c for name, c in kinds.most_common() if c},
        "rooms": {name: c for name, c in rooms.most_common() if c},
        "collective_bytes": sum(c.bytes for c in collectives),
        "exposed_seconds": sum(c.exposed for c in collectives),
        "collectives": collectives,
        "buffers": _largest(counts),
        "unpriced": tuple(name for name in kernels if name not in priced),
    }


def room(module: Module, instruction: Instruction) -> str:
    """The part of the model that most of an instruction is of, or "others"."""
    found = Counter(
        names[-1] for i in module.inside(instruction) if (names := _ROOM.findall(i.source))
    )
    own = _ROOM.findall(instruction.source)
    return own[-1] if own else found.most_common(1)[0][0] if found else "others"


def _collectives(
    module: Module,
    counts: Counter[Instruction],
    topology: Topology,
    mesh: Mesh,
    priced: dict[str, int],
) -> tuple[Collective, ...]:
    """Summed by operation and axes, most bytes first."""
    found: dict[tuple[str, str], list[float]] = {}
    for body in module.computations.values():
        for i, meanwhile in _begun(module, body, priced):
            times = counts.get(i.within, 0)
            if not times:
                continue
            axes = _axes(i.collective, mesh)
            seconds = _seconds(i.collective, topology, mesh)
            exposed = max(0.0, seconds - meanwhile / topology.chip.hertz)
            key = i.collective.operation.removesuffix("-start"), "+".join(axes) or "?"
            row = found.setdefault(key, [0, 0, 0.0, 0.0])
            for n, value in enumerate((1, i.collective.bytes, seconds, exposed)):
                row[n] += times * value
    rows = [Collective(*key, *map(int, row[:2]), *row[2:]) for key, row in found.items()]
    return tuple(sorted(rows, key=lambda c: -c.bytes))


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
    clock = 0
    for i in body:
        for inner in module.inside(i):
            if inner.is_collective:
                name = inner.channel or inner.name
                begun.setdefault(name, (_Begun(inner, i), clock))
        clock += priced.get(i.name, i.cycles)
        for inner in module.inside(i):
            if inner.is_collective and not inner.operation.endswith("-start"):
                ended[inner.channel or inner.name] = clock
            elif inner.operation.endswith("-done"):
                for name, (start, _) in begun.items():
                    if f"%{start.collective.name}" in inner.text:
                        ended[name] = clock
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


def _largest(counts: Counter[Instruction], number: int = 8) -> tuple[tuple[int, str, str], ...]:
    made = [i for i in counts if i.operation not in _VIEWS and not i.operation.endswith("-done")]
    made.sort(key=lambda i: -i.bytes)
    return tuple((i.bytes, i.text.split("{")[0], i.source or i.name) for i in made[:number])


def lines(report: Report) -> list[str]:
    """The report for a reader."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1) or "one chip"
    out = [f"{report.step} on {report.topology} ({mesh}); {NOTE}"]
    gib = functools.partial(_scaled, unit=2**30)
    limit = f"{gib(report.hbm_limit_bytes)} GiB"
    if not report.fits and not report.est_cycles:
        needs = f"{gib(report.hbm_bytes)} of {limit}" if report.hbm_bytes else f"more than {limit}"
        return [*out, f"  memory: TOO MUCH, {needs}; the compiler made no program"]
    room = report.hbm_limit_bytes - report.hbm_bytes
    says = f"{gib(room)} GiB to spare" if report.fits else f"{gib(-room)} GiB TOO MUCH"
    out.append(
        f"  memory: {gib(report.hbm_bytes)} of {limit}, {says} "
        f"(arguments {gib(report.argument_bytes)}, temporaries {gib(report.temporary_bytes)})"
    )
    out.append(
        f"  time: {report.est_cycles / 1e6:.1f} Mcycles, {report.est_step_seconds:.3f} s, "
        f"{report.est_mfu:.1%} of peak (MFU)"
    )
    for title, parts in (("by kind", report.kinds), ("by room", report.rooms)):
        shares = (f"{name} {c / report.est_cycles:.1%}" for name, c in parts.items())
        out.append(f"  {title}: {', '.join(shares)}")
    for c in report.collectives:
        out.append(
            f"  {c.operation} over {c.axes}: {c.count} a step, {c.bytes / 2**20:.0f} MiB a chip, "
            f"derived {c.seconds * 1e3:.1f} ms, {c.exposed * 1e3:.1f} ms not hidden"
        )
    if report.collectives:
        share = report.exposed_seconds / (report.est_step_seconds + report.exposed_seconds)
        out.append(f"  communication that is not hidden (derived): {share:.1%} of the step")
    for size, kind, source in report.buffers[:5]:
        out.append(f"  array of {size / 2**20:.0f} MiB: {kind} {source[-80:]}")
    if report.unpriced:
        out.append(f"  kernels without a price, not in the time: {', '.join(report.unpriced)}")
    out.append(f"  compiled in {report.compile_seconds:.0f} s")
    return out


def _scaled(value: float, unit: int) -> str:
    return f"{value / unit:.2f}"
