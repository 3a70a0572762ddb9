"""Window attention in plain XLA, for CPUs and wherever no kernel fits.

The weights are normalised after their product with the values, so that one array of a window's
(L, L) is kept for the gradient instead of three.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.kernels.attention.windows import (
    Extra,
    Scales,
    Window,
    extra_heads,
    extra_mask,
    from_windows,
    to_windows,
    visible,
    without_padding,
)

EPS = 1e-6  # of the norm of queries and keys
_MASKED, _LEAST = -1e30, -1e29  # finite, so that a row without keys has no NaN


def attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    bias: jax.Array | None,
    segment_ids: jax.Array | None,
    extra_kv: Extra | None,
    qk_scales: Scales | None,
    *,
    num_heads: int,
    block: Window,
    causal: bool | int,
) -> jax.Array:
    """`window_attention` of checked arguments; `block` has no zeros."""
    if extra_kv is not None:
        extra_kv = without_padding(extra_kv)
    if qk_scales is not None:
        q, k, extra_kv = normed(q, k, extra_kv, qk_scales, num_heads)
    grid = q.shape[1:4]
    if k is None:
        block = grid  # where no token sees another there is nothing to cut out
    scale = (q.shape[-1] // num_heads) ** -0.5
    q_BHNLK = to_windows(q * scale, block, num_heads)
    parts = []
    if k is not None:
        k_BHNMK, v_BHNMK = (to_windows(x, block, num_heads) for x in (k, v))
        logits = _logits("BHNLK,BHNMK->BHNLM", q_BHNLK, k_BHNMK)
        if bias is not None:
            logits += bias[:, None].astype(jnp.float32)
        logits = _masked(logits, visible(block, causal, segment_ids))
        parts.append((logits, v_BHNMK, "BHNLM,BHNMK->BHNLK"))
    if extra_kv is not None:
        k_BHEK, v_BHEK = (extra_heads(x, num_heads) for x in extra_kv[:2])
        logits = _logits("BHNLK,BHEK->BHNLE", q_BHNLK, k_BHEK)
        parts.append((_masked(logits, extra_mask(extra_kv)), v_BHEK, "BHNLE,BHEK->BHNLK"))
    return from_windows(_weighted(parts, q.dtype), grid, block)


def normed(
    q: jax.Array,
    k: jax.Array | None,
    extra_kv: Extra | None,
    qk_scales: Scales,
    num_heads: int,
) -> tuple[jax.Array, jax.Array | None, Extra | None]:
    """Queries and keys, of the grid and beside it, through `head_norm`."""
    q_scale, k_scale = qk_scales
    if k is not None:
        k = head_norm(k, k_scale, num_heads)
    if extra_kv is not None:
        extra_kv = (head_norm(extra_kv[0], k_scale, num_heads), *extra_kv[1:])
    return head_norm(q, q_scale, num_heads), k, extra_kv


def head_norm(x: jax.Array, scale_K: jax.Array, num_heads: int) -> jax.Array:
    """Layer norm of each head of (..., D), without bias, times the scale; in float32.

    Means over a part of the lanes are products with a matrix of ones: TPUs would rather not reshape
    D into (heads, K).
    """
    width = scale_K.shape[0]
    of_head = np.repeat(np.eye(num_heads, dtype=np.float32), width, axis=0)

    def mean(y: jax.Array) -> jax.Array:
        return jnp.dot(y, of_head / width, precision="highest")

    def spread(y: jax.Array) -> jax.Array:
        return jnp.dot(y, of_head.T, precision="highest")

    y = x.astype(jnp.float32)
    y -= spread(mean(y))
    y *= spread(jax.lax.rsqrt(mean(jnp.square(y)) + EPS))
    return (y * jnp.tile(scale_K.astype(jnp.float32), num_heads)).astype(x.dtype)


def _weighted(parts: list[tuple[jax.Array, jax.Array, str]], dtype: jnp.dtype) -> jax.Array:
    """Values by the softmax over the logits of all parts together; 0 where all are masked."""
    tops = [jax.lax.stop_gradient(logits).max(-1, keepdims=True) for logits, *_ in parts]
    top = functools.reduce(jnp.maximum, tops, _LEAST)
    total, out = 0.0, 0.0
    for logits, values, product in parts:
        weights = jnp.exp(logits - top)
        total += weights.sum(-1, keepdims=True)
        weights = weights.astype(dtype)
        out += jnp.einsum(product, weights, values, preferred_element_type=jnp.float32)
    return (out / jnp.where(total == 0, 1, total)).astype(dtype)


def _logits(product: str, q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(product, q, k, preferred_element_type=jnp.float32)


def _masked(logits: jax.Array, mask: jax.Array | np.ndarray | None) -> jax.Array:
    return logits if mask is None else jnp.where(mask, logits, _MASKED)
