"""The TPU that kernels are made for: the one at hand, or one that a program is compiled for."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
from jax.experimental.pallas import tpu as pltpu

VMEM = 64 * 2**20  # bytes of v5p; v5e and v6e have twice that, v4 a quarter


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels ask of a chip; the defaults are those of v5p, which suit all.

    Attributes:
      cores: that share the steps of a kernel's grid.
      matrix_unit: its rows and columns.
      vmem: bytes that a kernel may take.
    """

    cores: int = 2
    matrix_unit: int = 128
    vmem: int = VMEM


_TARGET: contextvars.ContextVar[Target] = contextvars.ContextVar("target")


def target() -> Target:
    """The chip at hand; without one that of `compiling_for`."""
    if jax.default_backend() != "tpu":
        return _TARGET.get(Target())
    info = pltpu.get_tpu_info()
    return Target(info.num_cores, info.mxu_column_size, min(VMEM, info.vmem_capacity_bytes))


@contextlib.contextmanager
def compiling_for(chip: Target) -> Iterator[None]:
    """What is traced inside is made for this chip, which is not there."""
    token = _TARGET.set(chip)
    try:
        yield
    finally:
        _TARGET.reset(token)
