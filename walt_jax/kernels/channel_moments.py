"""A Pallas TPU kernel of the statistics that a norm of frames needs, in one pass over a video."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from walt_jax.kernels.rows import PIXELS, Walk, divisor, params


def channel_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and mean square deviation of each frame's channels over (H, W).

    Each block of rows is read once and summed around its own mean, so that nothing is lost where
    means are large; blocks are then joined exactly.

    Args:
      x: (B, T, H, W, C), C a multiple of 128 and W of 16 (8 in float32).

    Returns:
      float32 (B, T, C), twice.
    """
    b, t, h, w, c = x.shape
    rows = divisor(h, max(1, PIXELS // w))
    walk = Walk(rows, h, w, lambda b, t, r: (b, 0, r, t))

    def body(x_ref: Any, mean: Any, square: Any) -> None:
        mean[...], square[...] = jnp.zeros_like(mean), jnp.zeros_like(square)

        @pl.loop(0, walk.chunks)
        def _(i: jax.Array) -> None:
            mean[...] += x_ref[walk.lines(i)].astype(jnp.float32).sum((0, 1))[None]

        mean[...] = mean[...] * (1.0 / (rows * w))

        @pl.loop(0, walk.chunks)
        def _(i: jax.Array) -> None:
            deviation = x_ref[walk.lines(i)].astype(jnp.float32) - mean[...]
            square[...] += jnp.square(deviation).sum((0, 1))[None]

    out = jax.ShapeDtypeStruct((b, t, h // rows, 1, c), jnp.float32)
    means, squares = pl.pallas_call(
        body,
        name="channel_moments",
        out_shape=[out, out],
        grid=(b, t, h // rows),
        in_specs=[walk.block(c)],
        out_specs=[walk.sums(c), walk.sums(c)],
        compiler_params=params("parallel", "parallel", "parallel"),
    )(x)
    mean = means.mean((2, 3))
    variance = squares.sum((2, 3)) / (h * w) + jnp.square(means - mean[:, :, None, None]).mean(
        (2, 3)
    )
    return mean, variance
