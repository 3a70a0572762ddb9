"""The device mesh: axes `data`, `fsdp`, `tensor`, `context`."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from walt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; at most one of them may be -1, meaning the rest.

    Attributes:
      data: copies of the model, each with its own part of the batch.
      fsdp: devices over which parameters and the batch are sharded together.
      tensor: devices over which heads and MLP columns are sharded, in a tokenizer the columns of
        the grid.
      context: devices over which the rows of the grid are sharded.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def parse_mesh(text: str) -> MeshConfig:
    """`data=4,fsdp=2` of a command line; what is not named is 1, or the rest for data.

    Where another axis is -1, and so the rest, data is 1.

    Raises:
      UserError: another axis, the same one twice, or no number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(
                f"{text!r} is no mesh: write sizes of the axes {', '.join(AXES)}, such as "
                "data=4,fsdp=2."
            )
        sizes[axis] = int(size)
    return MeshConfig(**({"data": 1} | sizes if -1 in sizes.values() else sizes))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over all devices of all processes (or those given).

    Of several TPU slices, which the data centre's network joins, each has its part of `data`.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the slices do not divide
        `data`.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"The mesh {sizes} must be positive sizes with at most one -1.")
    fixed = math.prod(s for s in sizes if s != -1)
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{a} {s}" for a, s in zip(AXES, sizes))
        raise UserError(
            f"The mesh {shape} does not make {len(devices)} devices: set one axis of it to -1."
        )
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"} or {0})
    if slices == 1:
        try:
            return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # sizes that are no products of the torus's sides
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(grid, AXES, axis_types=types)
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh.data={sizes[0]} must be a multiple of the {slices} slices: they send "
            "each other gradients alone."
        )
    within = (sizes[0] // slices, *sizes[1:])
    make = functools.partial(
        mesh_utils.create_hybrid_device_mesh, within, (slices, 1, 1, 1), devices
    )
    try:
        grid = make()
    except NotImplementedError:
        grid = make(allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)
