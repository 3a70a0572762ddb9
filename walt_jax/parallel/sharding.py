"""Which array lies where: ordered regex rules, path -> PartitionSpec."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

# The first pattern found in a parameter's path decides. A spec is for the trailing axes: leading
# ones (stacked layers, convolution taps) are never sharded. The optimizer's moments and the EMA
# have the parameter's path in theirs, so that the same rules place them.
RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)v_(row|col)/", P()),  # adafactor's moments: one axis less than their parameters
    # Rows of kernels are divided over fsdp, not columns: a TPU holds 128 columns together, and
    # shards of fewer are gathered and summed whole. Columns of these two are parts for queries,
    # keys and values, each divided over tensor when gathered.
    (r"(qkv|kv)/kernel$", P(("fsdp", "tensor"), None)),
    (r"up/kernel$", P("fsdp", "tensor")),
    (r"(out|down)/kernel$", P(("tensor", "fsdp"), None)),
    (r"kernel$", P("fsdp", "tensor")),
    (r"embedding$", P(None, "fsdp")),
    (r"", P()),
)
BATCH = P(("data", "fsdp"))
TOKENS = P(("data", "fsdp"), None, "context")
_PIXELS = P(("data", "fsdp"), None, "context", "tensor")


def path_of(path: Sequence[Any]) -> str:
    """`a/b/0` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def fit(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """Aligns a spec with the trailing axes and drops mesh axes that do not divide an axis."""
    entries = (None,) * (len(shape) - len(spec)) + tuple(spec)[max(0, len(spec) - len(shape)) :]
    return divisible(entries, shape, mesh)


def divisible(entries: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> P:
    """The spec of these entries, None where their mesh axes do not divide the array's."""

    def size(entry: Any) -> int:
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        return math.prod(mesh.shape[a] for a in axes)

    return P(*(e if e is not None and n % size(e) == 0 else None for e, n in zip(entries, shape)))


def _rule(path: Sequence[Any]) -> P:
    name = path_of(path)
    return next(spec for pattern, spec in RULES if re.search(pattern, name))


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """NamedShardings for a state of arrays or ShapeDtypeStructs, by RULES."""

    def one(path: Sequence[Any], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, fit(_rule(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, state)


def on_host(shardings: PyTree, shapes: PyTree) -> PyTree:
    """The same in the memory of the devices' hosts, for what RULES divide: kernels and tables.

    What is small stays on the devices, and what is divided into columns of other than multiples of
    128: a TPU's compiler moves no parts of its lanes.
    """

    def one(path: Sequence[Any], sharding: NamedSharding, x: jax.ShapeDtypeStruct) -> NamedSharding:
        if _rule(path) == P():
            return sharding
        columns = sharding.shard_shape(x.shape)[-1]
        moves = columns == x.shape[-1] or columns % 128 == 0
        return sharding.with_memory_kind("pinned_host") if moves else sharding

    return jax.tree_util.tree_map_with_path(one, shardings, shapes)


def frozen_shardings(frozen: PyTree, mesh: Mesh) -> PyTree:
    """Of what stays fixed in training: a text encoder's weights by RULES, all else everywhere."""
    ruled = state_shardings(frozen, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, sharding: sharding if path_of(path).startswith("text/") else replicated(mesh),
        ruled,
    )


def describe(shardings: PyTree, shapes: PyTree) -> list[str]:
    """One line a parameter: path, shape, spec; for the log."""
    rows = jax.tree_util.tree_leaves_with_path(shardings)
    return [
        f"{path_of(path)} {tuple(leaf.shape)} {sharding.spec}"
        for (path, sharding), leaf in zip(rows, jax.tree.leaves(shapes))
    ]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a model needs to know of the mesh, as two functions; the default does nothing.

    Attributes:
      mesh: the mesh, or None on a single device.
    """

    mesh: Mesh | None = None

    def tokens(self, x: jax.Array) -> jax.Array:
        """Pins a transformer's (B, T, H, W, D): batch over data and fsdp, rows over context."""
        return self._pin(x, TOKENS)

    def pixels(self, x: jax.Array) -> jax.Array:
        """Pins a convolution's (B, T, H, W, C): as tokens, and columns over tensor."""
        return self._pin(x, _PIXELS)

    @property
    def divides_frames(self) -> bool:
        """Whether a frame's pixels may lie on several devices."""
        return self.mesh is not None and any(self.mesh.shape[a] > 1 for a in ("context", "tensor"))

    def by_clip(
        self, function: Callable[[PyTree, PyTree], jax.Array], clips: PyTree, shared: PyTree
    ) -> jax.Array:
        """`function(clips, shared)`, on each device for the clips that it holds.

        Args:
          function: a kernel that the partitioner cannot divide; each clip by itself.
          clips: arrays (B, ...), all of one B.
          shared: arrays that every device takes whole.

        Returns:
          What the function returns, (B, ...).
        """
        if self.mesh is None:
            return function(clips, shared)
        spec = divisible(BATCH, jax.tree.leaves(clips)[0].shape, self.mesh)
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=(spec, P()), out_specs=spec, check_vma=False
        )(clips, shared)

    def _pin(self, x: jax.Array, spec: P) -> jax.Array:
        if self.mesh is None:
            return x
        entries = tuple(spec) + (None,) * (x.ndim - len(spec))
        sharding = NamedSharding(self.mesh, divisible(entries, x.shape, self.mesh))
        return jax.lax.with_sharding_constraint(x, sharding)

    def gather(self, params: PyTree, dtype: jnp.dtype, keep: Sequence[str] = ()) -> PyTree:
        """Casts kernels to `dtype`, then gathers them, just before they are used.

        In this order half of the bytes travel. Gradients are scattered as they are summed. Vectors
        stay in float32: they are small, and biases, norms and tables are used in float32.

        Args:
          params: of a network, or a part of one.
          dtype: what kernels compute in.
          keep: mesh axes that kernels stay divided over: tensor where activations lie as `tokens`
            says. Where they lie as `pixels`, none: tensor divides columns there, and XLA's
            partitioner computes wrong sums where rows and features are both divided.
        """

        def one(path: Sequence[Any], leaf: jax.Array) -> jax.Array:
            name = path_of(path)
            if not name.endswith("kernel"):
                return leaf
            leaf = leaf.astype(dtype)
            if self.mesh is None:
                return leaf
            spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
            kept = P(*(_leading(e, keep) for e in spec))
            lies, used = (
                NamedSharding(self.mesh, fit(s, leaf.shape, self.mesh)) for s in (spec, kept)
            )
            return _gathered(leaf, lies, used)

        return jax.tree_util.tree_map_with_path(one, params)


def _leading(entry: Any, keep: Sequence[str]) -> Any:
    """What an axis stays divided over once the mesh axes that are not kept are gathered."""
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return tuple(itertools.takewhile(lambda axis: axis in keep, axes)) or None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(kernel: jax.Array, lies: NamedSharding, used: NamedSharding) -> jax.Array:
    """A kernel as it is used; its gradient as it lies.

    A constraint's own transpose would ask for the whole gradient on every device, twice the bytes.
    """
    return jax.lax.with_sharding_constraint(kernel, used)


def _gathered_forward(
    kernel: jax.Array, lies: NamedSharding, used: NamedSharding
) -> tuple[jax.Array, None]:
    return _gathered(kernel, lies, used), None


def _gathered_backward(
    lies: NamedSharding, used: NamedSharding, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, lies),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def local_rows(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """The rows [start, stop) of a batch that this process must bring, given its devices."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [s[0].indices(batch_size)[:2] for s in slices]
    return min(a for a, _ in bounds), max(b for _, b in bounds)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the devices: rows over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def lying(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies so."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts host arrays, equal on every process, on the devices."""
    put: Callable[[Any, NamedSharding], jax.Array] = lambda x, s: jax.make_array_from_callback(  # noqa: E731
        x.shape, s, lambda index: x[index]
    )
    return jax.tree.map(put, tree, shardings)
