"""The resizes of published evaluations, by name; scores move by whole points between them.

tf1-bilinear        TF1's `resize_bilinear`: source = target * in / out, no half-pixel centres;
                    FVD's own
bilinear            half-pixel centres, no antialiasing: torch's `align_corners=False`
bilinear-antialias  the same, antialiased where it shrinks: `jax.image.resize`
bilinear-corners    corners on corners: torch's `align_corners=True`, Chainer
bicubic             Keys' kernel (a = -0.5), half-pixel centres, no antialiasing
bicubic-antialias   the same, antialiased where it shrinks
tf1-bilinear-64     tf1-bilinear to 64x64 and from there to the size: MAGVIT's FVD program
short-side          bilinear until the frame covers the size, then its centre: loaders of several
                    FVD packages
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError

_HIGHEST = jax.lax.Precision.HIGHEST


def resize(x_NHWC: jax.Array, size: tuple[int, int], name: str = "tf1-bilinear") -> jax.Array:
    """Resizes frames.

    Args:
      x_NHWC: (..., H, W, C), integers or floats of any range.
      size: (rows, columns).
      name: from the table above.

    Returns:
      float32 (..., *size, C), in the range of x (bicubic may step out of it); x itself, as float32,
      where it has that size already (but tf1-bilinear-64 always goes by 64x64).

    Raises:
      UserError: no such resize.
    """
    return by_name(name)(x_NHWC.astype(jnp.float32), size)


def by_name(name: str) -> Callable[[jax.Array, tuple[int, int]], jax.Array]:
    """The resize of a name.

    Raises:
      UserError: there is none.
    """
    if name not in RESIZES:
        raise UserError(f"No resize is named {name!r}: choose one of {', '.join(RESIZES)}.")
    return RESIZES[name]


def _linear(positions: Callable[[int, int], np.ndarray]) -> Callable:
    """Bilinear interpolation at the positions that a function of (in, out) gives."""

    def apply(x: jax.Array, size: tuple[int, int]) -> jax.Array:
        rows, columns = (_hats(positions(n, m), n) for n, m in zip(x.shape[-3:-1], size))
        x = jnp.einsum("hi,...iwc->...hwc", rows, x, precision=_HIGHEST)
        return jnp.einsum("wj,...hjc->...hwc", columns, x, precision=_HIGHEST)

    return apply


def _hats(positions: np.ndarray, size: int) -> np.ndarray:
    """Weights (out, in) of linear interpolation; edges are repeated."""
    distance = np.clip(positions, 0, size - 1)[:, None] - np.arange(size)
    return np.maximum(0.0, 1.0 - np.abs(distance)).astype(np.float32)


def _legacy(size: int, target: int) -> np.ndarray:
    return np.arange(target) * (size / target)


def _corners(size: int, target: int) -> np.ndarray:
    return np.linspace(0, size - 1, target) if target > 1 else np.zeros(1)


def _centres(method: str, antialias: bool) -> Callable:
    def apply(x: jax.Array, size: tuple[int, int]) -> jax.Array:
        shape = (*x.shape[:-3], *size, x.shape[-1])
        return jax.image.resize(x, shape, method, antialias=antialias, precision=_HIGHEST)

    return apply


def _by_64(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    return RESIZES["tf1-bilinear"](RESIZES["tf1-bilinear"](x, (64, 64)), size)


def _short_side(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    height, width = x.shape[-3:-1]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    x = RESIZES["bilinear"](x, scaled)
    top, left = ((n - m) // 2 for n, m in zip(scaled, size))
    return x[..., top : top + size[0], left : left + size[1], :]


RESIZES: dict[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
    "tf1-bilinear": _linear(_legacy),
    "bilinear": _centres("linear", False),
    "bilinear-antialias": _centres("linear", True),
    "bilinear-corners": _linear(_corners),
    "bicubic": _centres("cubic", False),
    "bicubic-antialias": _centres("cubic", True),
    "tf1-bilinear-64": _by_64,
    "short-side": _short_side,
}
