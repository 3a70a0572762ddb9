"""Blocks of a (T, H, W) grid: their shapes, their tokens in order, who sees whom in one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError

Window = tuple[int, int, int]
Extra = tuple[jax.Array, jax.Array, jax.Array | None]  # keys (B, E, D), values, mask bool
Scales = tuple[jax.Array, jax.Array]  # of normed queries and keys, (K,) each


def resolve_window(grid: Sequence[int], window: Sequence[int]) -> Window:
    """Replaces 0 by the whole axis and checks that the blocks tile the grid.

    Raises:
      UserError: an axis of the grid is no multiple of the window's, or it is no window.
    """
    if len(window) != 3 or min(window) < 0:
        raise UserError(f"A window is (wt, wh, ww), 0 for a whole axis; got {tuple(window)}.")
    full = tuple(g if w == 0 else w for g, w in zip(grid, window))
    if any(g % w for g, w in zip(grid, full)):
        fits = ", ".join(f"{axis} a multiple of {w}" for axis, w in zip("THW", window) if w)
        raise UserError(
            f"The window {tuple(window)} does not tile the grid {tuple(grid)} of latents: "
            f"it fits grids with {fits}."
        )
    return full


def to_windows(x_BTHWD: jax.Array, block: Window, num_heads: int) -> jax.Array:
    """(B, T, H, W, D) to (B, N, heads, L, K): L tokens in (t, h, w) order in each of N windows."""
    b, t, h, w, d = x_BTHWD.shape
    wt, wh, ww = block
    x = x_BTHWD.reshape(b, t // wt, wt, h // wh, wh, w // ww, ww, d)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    # Two transpositions: a single one keeps the TPU's compiler from merging the second into the
    # products, and is no faster on CPUs.
    return x.reshape(b, -1, wt * wh * ww, num_heads, d // num_heads).swapaxes(2, 3)


def from_windows(x_BNHLK: jax.Array, grid: Sequence[int], block: Window) -> jax.Array:
    """The inverse of `to_windows`."""
    b = x_BNHLK.shape[0]
    (t, h, w), (wt, wh, ww) = grid, block
    x = x_BNHLK.swapaxes(2, 3).reshape(b, t // wt, h // wh, w // ww, wt, wh, ww, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t, h, w, -1)


def visible(
    block: Window, causal: bool | int, segment_ids: jax.Array | None
) -> jax.Array | np.ndarray | None:
    """What a token sees of its own window: bool, to broadcast to (B, N, H, L, L); None is all.

    Args:
      block: the window, without zeros.
      causal: True for a token's own and all former frames, a number for the last so many.
      segment_ids: (B, T, H, W), tokens see their own number only.
    """
    mask = None
    if causal:
        frame = np.repeat(np.arange(block[0]), block[1] * block[2])
        age = frame[:, None] - frame[None]
        mask = (age >= 0) & (age < (block[0] if causal is True else causal))
    if segment_ids is not None:
        ids_BNHL = to_windows(segment_ids[..., None], block, 1)[..., 0]
        same = ids_BNHL[..., :, None] == ids_BNHL[..., None, :]
        mask = same if mask is None else same & mask
    return mask


def without_padding(extra_kv: Extra) -> Extra:
    """Zeros in place of padded keys and values, which may be anything, NaN too."""
    k_BED, v_BED, mask_BE = extra_kv
    if mask_BE is None:
        return extra_kv
    seen_BE = mask_BE if mask_BE.ndim == 2 else mask_BE.any(axis=(1, 2, 3))
    return *(jnp.where(seen_BE[..., None], x, 0) for x in (k_BED, v_BED)), mask_BE
