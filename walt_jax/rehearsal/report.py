"""What a compiled program needs and where its time goes, as figures and as text."""

import dataclasses
import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from walt_jax.kernels.target import compiling_for
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.collectives import Collective, collectives_of
from walt_jax.rehearsal.estimate import NOTE, peak_share, too_large
from walt_jax.rehearsal.hlo import Instruction, Module
from walt_jax.rehearsal.steps import Step

# Named scopes. A network beside the denoiser is a house with rooms of its own: decoder/level.
ROOMS = ("optimizer", "embed", "modulation", "attention", "cross_attention", "mlp", "read_out")
ROOMS += ("upsample", "level", "res_block")
HOUSES = ("encoder", "decoder", "discriminator", "perceptual", "text")
_ROOM = re.compile(rf"\b({'|'.join((*ROOMS, *HOUSES))})\b")
_VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant")
Prices = Callable[[dict[str, Instruction]], dict[str, int]]


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
      remat: of a search, what the candidate recomputes.
      error: of a search, what the compiler says where it failed, other than for want of memory.
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
    remat: str = ""
    error: str = ""


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
    collectives = collectives_of(module, counts, topology, mesh, priced)
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
    own = _room(instruction.source)
    inside = Counter(name for i in module.inside(instruction) if (name := _room(i.source)))
    return own or (inside.most_common(1)[0][0] if inside else "others")


def _room(source: str) -> str:
    """Of a JAX operation, by its named scopes: the innermost room, in its house; "" outside."""
    names = _ROOM.findall(source)
    rooms = [name for name in names if name in ROOMS][-1:]
    houses = [name for name in names if name in HOUSES][-1:]
    return "/".join((*houses, *rooms))


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
    if report.error:
        return [*out, f"  the compiler failed: {report.error}"]
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
