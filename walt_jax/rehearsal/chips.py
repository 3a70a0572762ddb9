"""TPU chips and the slices of them that can be rented, none of which need be there."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from walt_jax.errors import UserError
from walt_jax.kernels.target import Target


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      topology: the smallest slice of one host.
      hertz: clock.
      flops_per_cycle: bfloat16 FLOPs a cycle.
      hbm: bytes of memory.
      link: bytes a second of one link between chips, one way.
      dcn: bytes a second between slices, one way, a chip.
      axes: of a slice's torus; a chip has two links along each.
      most: chips of the largest slice.
      wraps: the sides of a slice at which its axes close into rings.
      target: what kernels ask of it.
    """

    topology: str
    hertz: float
    flops_per_cycle: int
    hbm: int
    link: float
    dcn: float
    axes: int
    most: int
    wraps: tuple[int, ...]
    target: Target


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 131_072, 16 * 2**30, 45e9, 3.125e9, 2, 256, (16,), Target(1)),
    "v5p": Chip(
        "v5p:2x2x1", 1.75e9, 262_144, 95 * 2**30, 90e9, 6.25e9, 3, 6144, (4, 8, 12, 16), Target()
    ),
    "v6e": Chip(
        "v6e:2x2", 1.75e9, 524_288, 32 * 2**30, 90e9, 12.5e9, 2, 256, (16,), Target(1, 256)
    ),
}
_FLAT = {(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one kind of chip.

    Attributes:
      kind: a key of CHIPS.
      shape: chips along the axes of one slice's torus.
      slices: how many, joined by the data centre's network.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> "Topology":
        """Reads "v5e:16x16".

        Raises:
          UserError: another form, an unknown chip, or a slice that nobody rents out.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        if not found or found[1] not in CHIPS:
            raise UserError(
                f"--topology takes KIND:AxB of {', '.join(CHIPS)}, such as v5e:4x4; got {text!r}."
            )
        if slices < 1:
            raise UserError(f"--num_slices must be at least 1, got {slices}.")
        kind, shape = found[1], tuple(map(int, found[2].split("x")))
        chip = CHIPS[kind]
        if len(shape) != chip.axes:
            raise UserError(
                f"A slice of {kind} has {chip.axes} axes, such as {chip.topology}; got {text!r}."
            )
        if math.prod(shape) > chip.most:
            raise UserError(
                f"{text} would be {math.prod(shape)} chips: the largest slice of {kind} has "
                f"{chip.most}; more are several slices (--num_slices)."
            )
        if not _is_sold(shape):
            some = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16"
            if chip.axes == 3:
                some = "2x2x1, 2x2x2, 2x2x4, 2x4x4 and multiples of 4 in rising order"
            raise UserError(f"{text} is no slice that is rented out; of {kind} there are {some}.")
        return cls(kind, shape, slices)

    @property
    def chip(self) -> Chip:
        """What each device is."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def side(self) -> int:
        """Chips along the longest axis of a slice's torus.

        A good size of `fsdp`: the compiler scatters sums among some chips of a slice, not all.
        """
        return max(self.shape)

    def __str__(self) -> str:
        text = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices} slices of {text}"

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, slice by slice.

        Raises:
          UserError: the TPU compiler is not installed, or knows no such slice.
        """
        load_compiler()
        options = {"num_slices": self.slices} if self.slices > 1 else {}
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as e:
            raise UserError(f"The TPU compiler knows no {self}: {e}") from e
        return list(found.devices)


def _is_sold(shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return shape in _FLAT
    small = {(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)}
    return shape in small or (all(n % 4 == 0 for n in shape) and list(shape) == sorted(shape))


def load_compiler() -> None:
    """Makes libtpu load on a machine without TPUs.

    Raises:
      UserError: it is not installed.
    """
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
