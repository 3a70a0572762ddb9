"""Checksums of arrays: 32 bits that do not depend on how an array lies on the devices.

Each element's bits, as an unsigned number, are multiplied by an odd weight that depends on its
place and summed modulo 2^32, so that any changed bit changes the sum. Sums of integers do not
depend on their order: a mesh, a host and NumPy agree.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.parallel.sharding import path_of, replicated

PyTree = Any


def describe_arrays(tree: PyTree) -> dict[str, list[Any]]:
    """`path -> [shape, dtype]` of arrays or ShapeDtypeStructs, JSON-ready."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): [list(x.shape), np.dtype(x.dtype).name] for path, x in leaves}


def checksums(tree: PyTree) -> dict[str, int]:
    """`path -> checksum` of NumPy or JAX arrays; every process of several must call it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get({path_of(path): _checksum(x) for path, x in leaves})
    return {path: int(value) for path, value in sums.items()}


def _checksum(x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    if not isinstance(x, jax.Array) or _on_this_cpu(x):
        return _sum(np.asarray(jax.device_get(x)), np)
    return _on_devices(getattr(x.sharding, "mesh", None))(x)


def _on_this_cpu(x: jax.Array) -> bool:
    """Whether NumPy reaches it, which has summed before XLA would have compiled."""
    return x.is_fully_addressable and next(iter(x.sharding.device_set)).platform == "cpu"


@functools.cache
def _on_devices(mesh: jax.sharding.Mesh | None) -> Any:
    return jax.jit(lambda x: _sum(x, jnp), out_shardings=mesh and replicated(mesh))


def _sum(x: Any, xp: types.ModuleType) -> Any:
    x = xp.atleast_1d(x)
    if x.dtype == bool:
        x = x.astype(np.uint8)
    words = x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))
    if x.dtype.itemsize == 8:
        words = words ^ (words >> np.uint64(32))
    place, stride = xp.zeros(x.shape, np.uint32), 1
    for axis in reversed(range(x.ndim)):
        shape = [1] * axis + [x.shape[axis]] + [1] * (x.ndim - axis - 1)
        steps = xp.arange(x.shape[axis], dtype=np.uint32) * np.uint32(stride % 2**32)
        place, stride = place + steps.reshape(shape), stride * x.shape[axis]
    odd = np.uint32(2) * place + np.uint32(1)
    return (words.astype(np.uint32) * odd).sum(dtype=np.uint32)
