"""Attention within blocks of a (T, H, W) grid."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError

Window = tuple[int, int, int]
_MASKED = -1e30  # finite, so that a row without keys has no NaN


class ExtraKv(NamedTuple):
    """Keys and values outside of the grid, such as text, which every window of a sample sees.

    Attributes:
      k, v: (B, M, D).
      mask: bool (B, M), False where a token is padding; None where there is none.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array | None = None


def resolve_window(grid: Sequence[int], window: Sequence[int]) -> Window:
    """Replaces 0 by the whole axis and checks that the blocks tile the grid.

    Raises:
      UserError: an axis of the grid is no multiple of the window's.
    """
    full = tuple(g if w == 0 else w for g, w in zip(grid, window))
    if any(g % w for g, w in zip(grid, full)):
        fits = ", ".join(f"{axis} a multiple of {w}" for axis, w in zip("THW", window) if w)
        raise UserError(
            f"The window {tuple(window)} does not tile the grid {tuple(grid)} of latents: "
            f"it fits grids with {fits}."
        )
    return full


def window_attention(
    q: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    *,
    num_heads: int,
    window: Sequence[int],
    bias: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool | int = False,
    extra_kv: ExtraKv | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multi-head attention in which a token sees the tokens of its own block of the grid.

    `(1, 0, 0)` is spatial attention, `(0, 1, 1)` temporal, `(0, 0, 0)` full and `(0, 8, 8)` the
    spatiotemporal window of W.A.L.T (2312.06662, section 3.2).

    Args:
      q, k, v: (B, T, H, W, D), D = num_heads x head width; any float dtype. Without k and v the
        keys are those of `extra_kv` alone: plain cross-attention.
      num_heads: heads; each attends by softmax(q k^T / sqrt(head width)).
      window: (wt, wh, ww), the block; 0 means the whole axis.
      bias: (num_heads, L, L) added to the logits, L = tokens in a window in (t, h, w) order; extra
        keys have none.
      segment_ids: int (B, T, H, W); tokens see those with their own number only, and all extra
        keys.
      causal: True hides the frames after a token's own; a number n also those before the last n,
        its own being the last. Extra keys are seen by all frames.
      extra_kv: keys and values beside the grid's.
      implementation: None or "reference".

    Returns:
      (B, T, H, W, D) in q's dtype, 0 for a token that sees no key. The softmax runs in float32.
      What is hidden gets a gradient of exactly 0.

    Raises:
      UserError: the window does not tile the grid, nothing to attend to, or no such implementation.
    """
    if implementation not in (None, "reference"):
        raise UserError(f"No implementation {implementation!r} of window attention: 'reference'.")
    if k is None and extra_kv is None:
        raise UserError("Window attention has no keys: give k and v, or extra_kv.")
    b, *grid = q.shape[:-1]
    block = resolve_window(grid, window)
    q_BNLHK = _to_windows(q, block, num_heads)
    logits, masks, values = [], [], []
    if k is not None:
        k_BNMHK, v_BNMHK = (_to_windows(x, block, num_heads) for x in (k, v))
        logits_BNHLM = _logits("BNLHK,BNMHK->BNHLM", q_BNLHK, k_BNMHK)
        if bias is not None:
            logits_BNHLM = logits_BNHLM + bias.astype(jnp.float32)
        logits.append(logits_BNHLM)
        masks.append(_mask(block, causal, segment_ids))
        values.append(("BNHLM,BNMHK->BNLHK", v_BNMHK))
    if extra_kv is not None:
        k_BEHK, v_BEHK, mask = _extra(extra_kv, num_heads)
        logits.append(_logits("BNLHK,BEHK->BNHLE", q_BNLHK, k_BEHK))
        masks.append(mask)
        values.append(("BNHLE,BEHK->BNLHK", v_BEHK))
    out_BNLHK = 0
    weights = jnp.split(_softmax(logits, masks), [logits[0].shape[-1]], axis=-1)
    for weights_BNHLM, (product, v) in zip(weights, values):
        out_BNLHK += jnp.einsum(product, weights_BNHLM.astype(q.dtype), v)
    return _from_windows(out_BNLHK, b, grid, block)


def _logits(product: str, q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(product, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _softmax(logits: list[jax.Array], masks: list[jax.Array | None]) -> jax.Array:
    """Over the keys of all parts together; masked keys weigh 0, even where all are masked."""
    joined = jnp.concatenate(logits, axis=-1)
    if all(mask is None for mask in masks):
        return jax.nn.softmax(joined, axis=-1)
    full = [True if m is None else m for m in masks]
    mask = jnp.concatenate([jnp.broadcast_to(m, x.shape) for m, x in zip(full, logits)], axis=-1)
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, joined, _MASKED), axis=-1), 0.0)


def _mask(block: Window, causal: bool | int, segment_ids: jax.Array | None) -> jax.Array | None:
    """What a token may see of its window, bool, broadcastable to (B, N, H, L, M); None is all."""
    mask = None
    if causal:
        frame = np.repeat(np.arange(block[0]), block[1] * block[2])
        age = frame[:, None] - frame[None]
        mask = jnp.asarray((age >= 0) & (age < (block[0] if causal is True else causal)))
    if segment_ids is not None:
        ids_BNL = _to_windows(segment_ids[..., None], block, 1)[..., 0, 0]
        same = (ids_BNL[:, :, :, None] == ids_BNL[:, :, None])[:, :, None]
        mask = same if mask is None else mask & same
    return mask


def _extra(extra: ExtraKv, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Keys and values (B, E, H, K), 0 where padded, and the mask (B, 1, 1, 1, E)."""
    k, v, mask = extra
    b, length, d = k.shape
    if mask is not None:
        mask = mask.astype(bool)
        k, v = (jnp.where(mask[..., None], x, 0) for x in (k, v))
        mask = mask[:, None, None, None]
    k, v = (x.reshape(b, length, num_heads, d // num_heads) for x in (k, v))
    return k, v, mask


def _to_windows(x_BTHWD: jax.Array, block: Window, num_heads: int) -> jax.Array:
    b, t, h, w, d = x_BTHWD.shape
    wt, wh, ww = block
    x = x_BTHWD.reshape(b, t // wt, wt, h // wh, wh, w // ww, ww, d)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, -1, wt * wh * ww, num_heads, d // num_heads)


def _from_windows(x_BNLHK: jax.Array, b: int, grid: Sequence[int], block: Window) -> jax.Array:
    (t, h, w), (wt, wh, ww) = grid, block
    x = x_BNLHK.reshape(b, t // wt, h // wh, w // ww, wt, wh, ww, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t, h, w, -1)
