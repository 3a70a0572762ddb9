"""Patches of latents and back, and positions of tokens."""

import jax
import numpy as np

from walt_jax.kernels.window_attention import Window


def volume(size: Window) -> int:
    """Places in a patch."""
    return size[0] * size[1] * size[2]


def patchify(x: jax.Array, patch: Window) -> jax.Array:
    """(B, T, H, W, C) to (B, T/pt, H/ph, W/pw, pt ph pw C), the patch in (t, h, w, c) order."""
    b, t, h, w, c = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, t // pt, h // ph, w // pw, -1)


def unpatchify(x: jax.Array, patch: Window) -> jax.Array:
    """The inverse of `patchify`."""
    b, t, h, w, d = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, t, h, w, pt, ph, pw, d // volume(patch)).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, t * pt, h * ph, w * pw, -1)


def depth_to_space(x: jax.Array, factor: Window) -> jax.Array:
    """(B, T, H, W, ft fh fw C) to (B, T ft, H fh, W fw, C)."""
    return unpatchify(x, factor)


def sincos(places: np.ndarray, features: int) -> np.ndarray:
    """Sines and then cosines of (N,) places at falling frequencies: float32 (N, features)."""
    half = features // 2
    angles = places[:, None] * 10_000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def sincos_frame(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed positions in a frame: float32 (rows columns, width).

    The first half of the features tells the column, the second the row (MAE and DiT).
    """
    row, column = (places.reshape(-1) for places in np.indices((rows, columns)))
    return np.concatenate([sincos(column, width // 2), sincos(row, width // 2)], axis=-1)
