"""Window attention in float32, as simple as can be: what the other implementations are held to."""

import jax
import jax.numpy as jnp

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
    q_scale, k_scale = qk_scales or (None, None)
    q_BHNLK = _norm(to_windows(q, block, num_heads), q_scale)
    keys, values, masks = [], [], []
    if k is not None:
        keys.append(_norm(to_windows(k, block, num_heads), k_scale))
        values.append(to_windows(v, block, num_heads))
        masks.append(visible(block, causal, segment_ids))
    if extra_kv is not None:
        extra_k, extra_v, _ = without_padding(extra_kv)
        keys.append(_norm(extra_heads(extra_k, num_heads)[:, :, None], k_scale))
        values.append(extra_heads(extra_v, num_heads)[:, :, None])
        masks.append(extra_mask(extra_kv))
    logits = [
        jnp.matmul(q_BHNLK, k.mT, precision="highest") * q_BHNLK.shape[-1] ** -0.5 for k in keys
    ]
    if bias is not None:
        logits[0] += bias[:, None]
    mask = [jnp.broadcast_to(True if m is None else m, x.shape) for m, x in zip(masks, logits)]
    weights = _softmax(jnp.concatenate(logits, -1), jnp.concatenate(mask, -1))
    split = jnp.split(weights, [logits[0].shape[-1]], axis=-1)
    out = sum(
        jnp.matmul(w, v.astype(jnp.float32), precision="highest") for w, v in zip(split, values)
    )
    return from_windows(out, q.shape[1:4], block).astype(q.dtype)


def _norm(x: jax.Array, scale_K: jax.Array | None) -> jax.Array:
    x = x.astype(jnp.float32)
    if scale_K is None:
        return x
    x -= x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale_K


def _softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """0 for masked keys, even where all are masked."""
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), 0)
