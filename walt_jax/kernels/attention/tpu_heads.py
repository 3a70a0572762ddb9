"""What the passes forward and backward of the TPU kernels do alike with a tile."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from walt_jax.kernels.attention.tpu_plan import Group, Plan

Ref = Any
Refs = dict[str, Ref]  # those of options that are not used are missing
EPS = 1e-6  # of the norm of queries and keys
LOG2_E = math.log2(math.e)  # the softmax is one of powers of 2


class Inputs(NamedTuple):
    """Arguments of the kernels; None where an option is not used.

    Attributes:
      q, k, v: (B, T, H, W, D).
      bias: float32 (heads, queries, keys) of a tile, times log2(e).
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


def specs(
    plan: Plan, x: Inputs, transposed: bool
) -> tuple[list[str], list[jax.Array], list[pl.BlockSpec]]:
    """Names, arrays and block specs of the inputs; logits lie (keys, queries) if transposed."""
    found: list[tuple[str, jax.Array, pl.BlockSpec]] = [("q", x.q, plan.of_queries())]
    if x.k is not None:
        found += [(name, getattr(x, name), plan.of_keys()) for name in "kv"]
    if x.bias is not None:
        heads, _, keys = x.bias.shape
        bias = x.bias.reshape(heads, plan.parts, plan.rows, keys)
        bias = bias.swapaxes(2, 3) if transposed else bias
        shape = (plan.heads, None, *bias.shape[2:])
        found.append(("bias", bias, pl.BlockSpec(shape, lambda d, b, t, h, w, i: (d, i, 0, 0))))
    if x.ids is not None:
        parts = {"q_ids": plan.rows if plan.parts > 1 else plan.length, "k_ids": plan.length}
        for name, tokens in parts.items():
            queries = name == "q_ids"
            column = queries != transposed
            shape = (tokens, 1) if column else (1, tokens)
            ids = x.ids.reshape(*x.ids.shape[:4], -1, *shape)
            found.append((name, ids, plan.of_ids(queries, column)))
    if x.extra_k is not None:
        found += [(name, getattr(x, name), plan.of_extra()) for name in ("extra_k", "extra_v")]
    if x.extra_seen is not None:
        shape = (plan.keys, 1) if transposed else (1, plan.keys)
        spec = pl.BlockSpec((None, *shape), lambda d, b, *_: (b, 0, 0))
        found.append(("extra_seen", x.extra_seen.reshape(-1, *shape), spec))
    if x.q_scale is not None:
        spec = pl.BlockSpec((1, plan.lanes), lambda d, *_: (0, d))
        found += [(name, getattr(x, name), spec) for name in ("q_scale", "k_scale")]
    names, arrays, blocks = (list(column) for column in zip(*found))
    return names, arrays, blocks


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contracts an axis of each, summed in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def normalise(group: Group, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm of each head (tokens, width) times its scale (1, width)."""
    k = group.width // group.heads
    parts = []
    for i in range(group.heads):
        off = x - group.only(x, i).sum(-1, keepdims=True) * (1 / k)
        variance = group.only(jnp.square(off), i).sum(-1, keepdims=True) * (1 / k)
        parts.append(off * lax.rsqrt(variance + EPS))
    return group.join(parts) * scale


def queries(plan: Plan, refs: Refs, tile: tuple[int, int], group: Group) -> jax.Array:
    """The group's queries as the logits need them: float32 (tokens, width)."""
    return ask(plan, refs, group)(plan.read(refs["q"], tile, group), *scales(refs, "q", group))


def ask(plan: Plan, refs: Refs, group: Group) -> Callable[..., jax.Array]:
    """The function of (queries, *scale) that gives `queries`."""

    def function(q: jax.Array, *scale: jax.Array) -> jax.Array:
        q = normalise(group, q, *scale) if scale else q
        return q * (plan.head_width**-0.5 * LOG2_E)

    return function


def scales(refs: Refs, of: str, group: Group) -> list[jax.Array]:
    name = f"{of}_scale"
    return [refs[name][:, group.lanes]] if name in refs else []


def grid_and_extra(
    plan: Plan, refs: Refs, name: str, tile: tuple[int, int], group: Group
) -> jax.Array:
    """Keys or values ("k" or "v"), extra ones last: float32 (keys, width)."""
    parts = [plan.read(refs[name], tile, group)] if name in refs else []
    extra = refs.get(f"extra_{name}")
    if extra is not None:
        parts.append(extra[:, group.lanes].astype(jnp.float32))
    return jnp.concatenate(parts, axis=0)


def visible(
    plan: Plan, refs: Refs, tile: tuple[int, int], part: jax.Array, transposed: bool
) -> jax.Array | None:
    """Which keys the part-th queries see, bool (queries, keys) or its transpose; None is all."""
    conditions = []
    if (seen := plan.visible(part, transposed)) is not None:
        conditions.append(seen)
    if "q_ids" in refs:
        q, k, axis = refs["q_ids"][tile], refs["k_ids"][tile], 0 if transposed else 1
        if plan.extra:
            shape = (plan.extra, 1) if transposed else (1, plan.extra)
            k = jnp.concatenate([k, jnp.zeros(shape, k.dtype)], axis)
            place = lax.broadcasted_iota(jnp.int32, k.shape, axis)
            conditions.append((q == k) | (place >= plan.length))
        else:
            conditions.append(q == k)
    if "extra_seen" in refs:
        conditions.append(refs["extra_seen"][...] != 0)
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def quarantine(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keeps what is not finite in the window that has it, though its tile has others.

    Returns:
      x, NaN where x or y is not finite: logits made of it are NaN where they are seen; then x and y
      with 0 there, for products in which all windows of a tile are summed, some with weight 0.
    """
    bad = x * 0 + y * 0
    return x + bad, jnp.where(bad == 0, x, 0), jnp.where(bad == 0, y, 0)


def powers(logits: jax.Array, seen: jax.Array | None, axis: int) -> tuple[jax.Array, jax.Array]:
    """2 to the logits, below 1, and 1 / their sum over keys; where no key is seen both are 0."""
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    most = logits.max(axis, keepdims=True)
    if seen is not None:
        most = jnp.where(most == -jnp.inf, 0.0, most)
    e = jnp.exp2(logits - most)
    total = e.sum(axis, keepdims=True)
    inverse = 1 / total
    return e, inverse if seen is None else jnp.where(total == 0, 0.0, inverse)
