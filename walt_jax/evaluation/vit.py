"""The transformer encoder of the published networks that VideoMAE and CLIP are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def stack(blocks: Sequence[PyTree]) -> PyTree:
    """Blocks of the same shapes along a first axis, for `encode`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def encode(
    blocks: PyTree,
    x_BLD: jax.Array,
    *,
    heads: int,
    activation: Callable[[jax.Array], jax.Array],
    epsilon: float,
) -> jax.Array:
    """Runs blocks of attention and MLP, each with a norm before it and a shortcut around it.

    Args:
      blocks: from `stack`: norm1 and norm2 {scale, bias} (D,), qkv, out, up and down {kernel (in,
        out), bias (out,)}; qkv has queries, keys and values side by side.
      x_BLD: tokens.
      heads: D is a multiple of it.
      activation: between up and down.
      epsilon: of the norms.
    """

    def block(x: jax.Array, p: PyTree) -> tuple[jax.Array, None]:
        qkv = dense(norm(x, p["norm1"], epsilon), p["qkv"])
        q, k, v = (y.reshape(*y.shape[:-1], heads, -1) for y in jnp.split(qkv, 3, -1))
        scores = jnp.einsum("blhk,bmhk->bhlm", q, k) / np.sqrt(q.shape[-1])
        seen = jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores, -1), v)
        x = x + dense(seen.reshape(x.shape), p["out"])
        inner = activation(dense(norm(x, p["norm2"], epsilon), p["up"]))
        return x + dense(inner, p["down"]), None

    return jax.lax.scan(block, x_BLD, blocks)[0]


def dense(x: jax.Array, params: PyTree) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def norm(x: jax.Array, params: PyTree, epsilon: float) -> jax.Array:
    """Layer norm."""
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * params["scale"] + params["bias"]


def patches(x: jax.Array, kernel_THWIO: jax.Array) -> jax.Array:
    """Projects blocks of pixels (B, T, H, W, C) that do not overlap to tokens (B, L, D)."""
    size = kernel_THWIO.shape[:3]
    b, *grid, c = x.shape
    counts = [n // s for n, s in zip(grid, size)]
    x = x.reshape(b, *(n for pair in zip(counts, size) for n in pair), c)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, np.prod(counts), -1)
    return x @ kernel_THWIO.reshape(-1, kernel_THWIO.shape[-1])
