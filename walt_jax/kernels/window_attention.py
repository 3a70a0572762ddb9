"""Attention within blocks of a (T, H, W) grid."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from walt_jax.errors import UserError

Window = tuple[int, int, int]


def resolve_window(grid: Sequence[int], window: Sequence[int]) -> Window:
    """Replaces 0 by the whole axis and checks that the blocks tile the grid.

    Raises:
      UserError: an axis of the grid is no multiple of the window's.
    """
    full = tuple(g if w == 0 else w for g, w in zip(grid, window))
    if any(g % w for g, w in zip(grid, full)):
        fits = ", ".join(f"{axis} a multiple of {w}" for axis, w in zip(("T", "H", "W"), full))
        raise UserError(
            f"The window {tuple(window)} does not tile the grid {tuple(grid)} of latents: "
            f"it fits grids with {fits}."
        )
    return full


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    num_heads: int,
    window: Sequence[int],
    bias: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention in which a token sees the tokens of its own block of the grid.

    `(1, 0, 0)` is spatial attention, `(0, 1, 1)` temporal, `(0, 0, 0)` full and `(0, 8, 8)` the
    spatiotemporal window of W.A.L.T (2312.06662, section 3.2).

    Args:
      q, k, v: (B, T, H, W, D), D = num_heads x head width; any float dtype.
      num_heads: heads; each attends by softmax(q k^T / sqrt(head width)).
      window: (wt, wh, ww), the block; 0 means the whole axis.
      bias: (num_heads, L, L) added to the logits, L = tokens in a window in (t, h, w) order.

    Returns:
      (B, T, H, W, D) in q's dtype. The softmax runs in float32.

    Raises:
      UserError: the window does not tile the grid.
    """
    b, *grid, d = q.shape
    block = resolve_window(grid, window)
    q_NLHK, k_NLHK, v_NLHK = (_to_windows(x, block, num_heads) for x in (q, k, v))
    scale = (d // num_heads) ** -0.5
    logits_NHLM = jnp.einsum("NLHK,NMHK->NHLM", q_NLHK, k_NLHK, preferred_element_type=jnp.float32)
    logits_NHLM = logits_NHLM * scale
    if bias is not None:
        logits_NHLM = logits_NHLM + bias.astype(jnp.float32)
    weights_NHLM = jax.nn.softmax(logits_NHLM, axis=-1).astype(q.dtype)
    out_NLHK = jnp.einsum("NHLM,NMHK->NLHK", weights_NHLM, v_NLHK)
    return _from_windows(out_NLHK, b, grid, block)


def _to_windows(x_BTHWD: jax.Array, block: Window, num_heads: int) -> jax.Array:
    b, t, h, w, d = x_BTHWD.shape
    wt, wh, ww = block
    x = x_BTHWD.reshape(b, t // wt, wt, h // wh, wh, w // ww, ww, d)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(-1, wt * wh * ww, num_heads, d // num_heads)


def _from_windows(x_NLHK: jax.Array, b: int, grid: Sequence[int], block: Window) -> jax.Array:
    (t, h, w), (wt, wh, ww) = grid, block
    x = x_NLHK.reshape(b, t // wt, h // wh, w // ww, wt, wh, ww, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t, h, w, -1)
