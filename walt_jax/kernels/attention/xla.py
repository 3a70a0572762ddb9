"""Window attention in plain XLA, for CPUs and wherever no kernel fits.

For the gradient the softmax keeps its result alone, one array of (L, L) a window and head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.kernels.attention.windows import (
    Extra,
    Scales,
    Window,
    from_windows,
    to_windows,
    visible,
    without_padding,
)

EPS = 1e-6  # of the norm of queries and keys


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
        block = grid  # no token sees another: there is nothing to cut out
    q_BNHLK = to_windows(q, block, num_heads)
    logits, masks, values = [], [], []
    if k is not None:
        k_BNHMK, v_BNHMK = (to_windows(x, block, num_heads) for x in (k, v))
        logits_BNHLM = _logits("BNHLK,BNHMK->BNHLM", q_BNHLK, k_BNHMK)
        if bias is not None:
            logits_BNHLM += bias.astype(jnp.float32)
        logits.append(logits_BNHLM)
        masks.append(visible(block, causal, segment_ids))
        values.append(("BNHLM,BNHMK->BNHLK", v_BNHMK))
    if extra_kv is not None:
        *heads, mask = extra_kv
        k_BEHK, v_BEHK = (x.reshape(*x.shape[:2], num_heads, -1) for x in heads)
        logits.append(_logits("BNHLK,BEHK->BNHLE", q_BNHLK, k_BEHK))
        if mask is None or mask.ndim == 2:
            masks.append(None if mask is None else mask[:, None, None, None])
        else:
            masks.append(to_windows(mask, block, 1))
        values.append(("BNHLE,BEHK->BNHLK", v_BEHK))
    weights = jnp.split(_softmax(logits, masks), [logits[0].shape[-1]], axis=-1)
    out_BNHLK = sum(
        jnp.einsum(product, weights_BNHLM.astype(q.dtype), v)
        for weights_BNHLM, (product, v) in zip(weights, values)
    )
    return from_windows(out_BNHLK, grid, block)


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
    """Layer norm of each head of (..., D) without bias, times the scale; in float32 inside."""
    return jax.lax.platform_dependent(
        x,
        scale_K.astype(jnp.float32),
        tpu=functools.partial(norm_by_products, num_heads=num_heads),
        default=functools.partial(norm_by_heads, num_heads=num_heads),
    )


def norm_by_heads(x: jax.Array, scale_K: jax.Array, num_heads: int) -> jax.Array:
    """`head_norm` over the last axis of (..., heads, K)."""
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], num_heads, -1)
    y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPS) * scale_K
    return y.reshape(x.shape).astype(x.dtype)


def norm_by_products(x: jax.Array, scale_K: jax.Array, num_heads: int) -> jax.Array:
    """`head_norm` for TPUs, where a reshape of D to (heads, K) is a costly move between lanes.

    Means over a head's lanes are products with columns of ones, three bfloat16 passes each.
    """
    ones_DH = np.repeat(np.eye(num_heads, dtype=np.float32), scale_K.size, axis=0)

    def mean(y: jax.Array) -> jax.Array:
        return jnp.dot(y, ones_DH / scale_K.size, precision="high")

    def spread(y_H: jax.Array) -> jax.Array:
        return jnp.dot(y_H, ones_DH.T, precision="high")

    y = x.astype(jnp.float32)
    y -= spread(mean(y))
    y *= spread(jax.lax.rsqrt(mean(jnp.square(y)) + EPS))
    return (y * jnp.tile(scale_K, num_heads)).astype(x.dtype)


def _logits(product: str, q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(product, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _softmax(logits: list[jax.Array], masks: list[jax.Array | None]) -> jax.Array:
    """Over the keys of all parts together; masked keys weigh 0, even where all are masked."""
    joined = jnp.concatenate(logits, axis=-1)
    if all(mask is None for mask in masks):
        return jax.nn.softmax(joined)
    masks = [jnp.broadcast_to(True if m is None else m, x.shape) for m, x in zip(masks, logits)]
    return jax.nn.softmax(joined, where=jnp.concatenate(masks, axis=-1))
