"""What the passes forward and backward of the TPU kernels do alike with a tile."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from walt_jax.kernels.attention.tpu_plan import Group, Plan, Tile
from walt_jax.kernels.rows import LANES

Ref = Any
Refs = dict[str, Ref]  # those of options that are not used are missing
DEPTH = 4  # heads whose logits are there before the first's softmax
EPS = 1e-6  # of the norm of queries and keys
LOG2_E = math.log2(math.e)  # the softmax is one of powers of 2


class Inputs(NamedTuple):
    """Arguments of the kernels; None where an option is not used.

    Attributes:
      q, k, v: (B, T, H, W, D).
      bias: float32 (heads, queries, keys) of a tile.
      ids: int32 segments (B, tiles in T, in H, in W, tokens).
      extra_k, extra_v: (B, M, D).
      extra_seen: int32 (B, keys), 0 for what is padding.
      q_scale, k_scale: float32 (1, D).
    """

    q: jax.Array
    k: jax.Array | None = None
    v: jax.Array | None = None
    bias: jax.Array | None = None
    ids: jax.Array | None = None
    extra_k: jax.Array | None = None
    extra_v: jax.Array | None = None
    extra_seen: jax.Array | None = None
    q_scale: jax.Array | None = None
    k_scale: jax.Array | None = None


def specs(plan: Plan, x: Inputs) -> tuple[list[str], list[jax.Array], list[pl.BlockSpec]]:
    """Names, arrays and block specs of the inputs; logits lie (keys, queries)."""
    found: list[tuple[str, jax.Array, pl.BlockSpec]] = [("q", plan.view(x.q), plan.of_queries())]
    if x.k is not None:
        found += [(name, plan.view(getattr(x, name)), plan.of_keys()) for name in "kv"]
    if x.bias is not None:
        bias = x.bias.reshape(plan.num_heads, plan.parts, plan.rows, plan.keys)
        shape = (plan.heads, None, plan.rows, plan.keys)
        found.append(("bias", bias, pl.BlockSpec(shape, lambda d, b, t, h, w, i: (d, i, 0, 0))))
    if x.ids is not None:
        for name, shape in (("q_ids", (plan.parts, 1, plan.rows)), ("k_ids", (1, plan.length, 1))):
            ids = x.ids.reshape(*x.ids.shape[:4], *shape)
            found.append((name, ids, plan.of_ids(name == "q_ids")))
    if x.extra_k is not None:
        found += [(name, getattr(x, name), plan.of_extra()) for name in ("extra_k", "extra_v")]
    if x.extra_seen is not None:
        spec = pl.BlockSpec((plan.tiles[0], plan.keys, 1), lambda d, b, *_: (b, 0, 0))
        found.append(("extra_seen", x.extra_seen[..., None], spec))
    if x.q_scale is not None:
        spec = pl.BlockSpec((1, plan.lanes), lambda d, *_: (0, d))
        found += [(name, getattr(x, name), spec) for name in ("q_scale", "k_scale")]
    names, arrays, blocks = (list(column) for column in zip(*found))
    return names, arrays, blocks


def by_core(spec: pl.BlockSpec, steps: int) -> pl.BlockSpec:
    """For a grid that begins with the cores, each of which takes so many steps of videos."""

    def index(core: Any, d: Any, b: Any, *rest: Any) -> tuple[Any, ...]:
        return spec.index_map(d, core * steps + b, *rest)

    return pl.BlockSpec(spec.block_shape, index)


def at_start(ids: Sequence[jax.Array]) -> jax.Array:
    """Whether all of some program ids are 0."""
    return functools.reduce(jnp.logical_and, (i == 0 for i in ids))


def in_hbm(arrays: Sequence[jax.Array], interpret: Any) -> list[jax.Array]:
    """Keeps the compiler from moving operands to VMEM as a whole.

    A kernel reads them from there at addresses that the compiler does not know, so that every read
    would wait for the writes before it: gradients then take up to twice as long.
    """
    if interpret:
        return list(arrays)
    # Recomputation is to take all or none of the operands as known: JAX keeps no constrained ones.
    arrays = lax.optimization_barrier(tuple(arrays))
    return [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]


def pipelined(
    tasks: Sequence[Any], first: Callable[[Any], Any], second: Callable[[Any, Any], None]
) -> None:
    """Runs `second(task, first(task))` of each task after `first` of the next DEPTH ones.

    The compiler then has products of some heads to overlap with the softmax of another.
    """
    waiting: list[tuple[Any, Any]] = []
    for task in tasks:
        waiting.append((task, first(task)))
        if len(waiting) > DEPTH:
            second(*waiting.pop(0))
    for task, found in waiting:
        second(task, found)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contracts an axis of each, summed in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def normalise(group: Group, x: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Layer norm of each head of x, float32 (tokens, width), times its scale (1, width).

    Args:
      group: whose lanes these are.
      x: values that `dtype` holds.
      scale: float32.
      dtype: what products take.
    """
    return _normal(group, x, dtype)[0] * scale


def normalise_gradient(
    group: Group, x: jax.Array, scale: jax.Array, dy: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and of the scale by `normalise`."""
    y, inverse = _normal(group, x, dtype)
    dscale, dy = (dy * y).sum(0, keepdims=True), dy * scale
    dx = dy - _means(group, dy, dtype) - y * _means(group, dy * y, dtype)
    return inverse * dx, dscale


def _normal(group: Group, x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x with mean 0 and variance 1 in each head, and 1 / its standard deviation."""
    off = x - _means(group, x, dtype)
    inverse = lax.rsqrt(_means(group, jnp.square(off), dtype) + EPS)
    return off * inverse, inverse


def _means(group: Group, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Means over the lanes of each head, at each of them: products, as sums of lanes are slow."""
    k, parts = group.width // group.heads, []
    for start in range(0, group.width, LANES):
        stop = min(start + LANES, group.width)
        heads = range(start // k, -(-stop // k))
        near = slice(group.touched(heads[0]).start, group.touched(heads[-1]).stop)
        row = lax.broadcasted_iota(jnp.int32, (near.stop - near.start, 1), 0) + near.start
        lane = lax.broadcasted_iota(jnp.int32, (1, stop - start), 1) + start
        # One more at both ends, for lanes of heads that are not here.
        row, lane = (
            sum(((at >= i * k).astype(jnp.int32) for i in [*heads, heads[-1] + 1]), 0 * at)
            for at in (row, lane)
        )
        ones = jnp.where(row == lane, 1.0, 0.0).astype(dtype)
        parts.append(dot(x[:, near].astype(dtype), ones, (1, 0)))
    return jnp.concatenate(parts, axis=1) * (1 / k)


def turn_bias(refs: Refs, first: jax.Array) -> None:
    """At a core's first step with these heads: the bias as logits lie and in powers of 2."""

    @pl.when(first)
    def _() -> None:
        for head in range(refs["bias"].shape[0]):
            refs["bias_turned"][head] = refs["bias"][head].T * LOG2_E


def biased(refs: Refs, logits: jax.Array, head: int) -> jax.Array:
    """Logits (keys, queries) of powers of 2 with the bias of one of the step's heads."""
    if "bias_turned" in refs:
        return logits + refs["bias_turned"][head]
    return logits + refs["bias"][head].T * LOG2_E if "bias" in refs else logits


def ask(
    plan: Plan, group: Group, q: jax.Array, scale: Sequence[jax.Array], dtype: jnp.dtype
) -> jax.Array:
    """Queries as logits need them, float32; `scale` is empty or holds that of their norm."""
    for one in scale:
        q = normalise(group, q, one, dtype)
    return q * (plan.head_width**-0.5 * LOG2_E)


def scales(refs: Refs, of: str, group: Group) -> list[jax.Array]:
    name = f"{of}_scale"
    return [refs[name][:, group.lanes]] if name in refs else []


def grid_and_extra(plan: Plan, refs: Refs, name: str, tile: Tile, group: Group) -> jax.Array:
    """Keys or values ("k" or "v"), extra ones last: float32 (keys, width)."""
    parts = [plan.read(refs[name], tile, group)] if name in refs else []
    if plan.extra:
        extra = refs[f"extra_{name}"][tile[0], :, group.lanes]
        parts.append(extra.astype(jnp.float32))
    return jnp.concatenate(parts, axis=0)


def visible(plan: Plan, refs: Refs, tile: Tile, part: jax.Array) -> jax.Array | None:
    """Which keys the part-th queries see, bool (keys, queries); None is all."""
    conditions = []
    if (seen := plan.visible(part)) is not None:
        conditions.append(seen)
    if "q_ids" in refs:
        q, k = refs["q_ids"][tile], refs["k_ids"][tile]
        if plan.extra:
            k = jnp.concatenate([k, jnp.zeros((plan.extra, 1), k.dtype)], 0)
        place = lax.broadcasted_iota(jnp.int32, k.shape, 0)
        conditions.append((q == k) | (place >= plan.length))
    if "extra_seen" in refs:
        conditions.append(refs["extra_seen"][tile[0]] != 0)
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def quarantine(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keeps what is not finite in the window that has it, though its tile has others.

    Returns:
      x, NaN where x or y is not finite: logits made of it are NaN where they are seen; then x and y
      with 0 there, for products in which all windows of a tile are summed, some with weight 0.
    """
    bad = x * 0 + y * 0
    return x + bad, jnp.where(bad == 0, x, 0), jnp.where(bad == 0, y, 0)


def powers(logits: jax.Array, seen: jax.Array | None) -> jax.Array:
    """2 to the logits (keys, queries), 1 at most; 0 where no key is seen."""
    if seen is None:
        return jnp.exp2(logits - logits.max(0, keepdims=True))
    logits = jnp.where(seen, logits, -jnp.inf)
    most = logits.max(0, keepdims=True)
    return jnp.exp2(logits - jnp.where(most == -jnp.inf, 0.0, most))


def inverse(total: jax.Array, seen: jax.Array | None) -> jax.Array:
    """1 / the sums of `powers` over keys (1, queries), 0 where no key is seen."""
    return 1 / total if seen is None else jnp.where(total == 0, 0.0, 1 / total)
