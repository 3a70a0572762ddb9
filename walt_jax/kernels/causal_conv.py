"""Pallas TPU kernels of the tokenizer's inner loop: `conv(swish(scale * x + offset))` in one pass.

XLA spends more on padding, on the norm's passes and on relayouts than on the arithmetic of a
residual block. Here some rows of a frame are normalised in VMEM and written three times side by
side, moved by one column left, not and right with the edges repeated: the taps along a row are then
one contraction of 3 C channels, and taps in height are offsets of rows. The grid walks through time
last, so that the copies of the last kt frames stay in a ring and each frame is read once for every
256 features.

The gradient at x is the same walk backwards in time with turned taps; edges, which the forward pass
repeats, gather the gradients of their repetitions. The gradient at the kernel contracts the copies
with dy over pixels. `docs/kernels.md` has the figures.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from walt_jax.kernels.ring import Ref, contract, fill, gathered, repeated, seen_by, slot_of
from walt_jax.kernels.rows import LANES, Grid, Walk, block_rows, params


def fits(x_shape: Sequence[int], kernel_shape: Sequence[int], dtype: jnp.dtype) -> bool:
    """Whether the kernels take a convolution of stride 1.

    Args:
      x_shape: (B, T, H, W, C) on one device.
      kernel_shape: (kt, kh, kw, C, F).
      dtype: of both.
    """
    taps, *spatial, channels, features = kernel_shape
    _, _, height, width, _ = x_shape
    return (
        spatial == [3, 3]
        and channels % LANES == 0
        and width % (32 // jnp.dtype(dtype).itemsize) == 0
        and block_rows(height, width, taps, channels, _padded(features), dtype) > 0
    )


def causal_conv(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """A causal convolution of stride 1 of `swish(scale * x + offset)`, the edges repeated, to which
    `residual` is added.

    Time is padded by (kt - 1, 0), height and width by (1, 1). On TPUs, or in Pallas' interpret
    mode, for shapes that `fits` takes. Nothing but the arguments is kept for the gradient.

    Args:
      x: (B, T, H, W, C), bfloat16 or float32.
      kernel: (kt, 3, 3, C, F), of x's dtype.
      scale, offset: float32 (B, T, C), as a norm gives; both None convolve x itself.
      residual: (B, T, H, W, F) of x's dtype, or None.

    Returns:
      (B, T, H, W, F) in x's dtype; swish runs and products are summed in float32.
    """
    features = kernel.shape[-1]
    missing = _padded(features) - features
    if not missing:
        return _causal_conv(x, kernel, scale, offset, residual)
    kernel = jnp.pad(kernel, [(0, 0)] * 4 + [(0, missing)])
    y = _causal_conv(x, kernel, scale, offset, None)[..., :features]
    return y if residual is None else y + residual


def _forward(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    b, t, h, w, c = x.shape
    taps, features = kernel.shape[0], kernel.shape[-1]
    block = _block(features)
    walk = Walk(block_rows(h, w, taps, c, features, x.dtype), h, w)
    affine, added = _affine(scale, offset), [] if residual is None else [residual]

    def body(top: Ref, middle: Ref, bottom: Ref, weights: Ref, *refs: Ref) -> None:
        *optional, y, ring = refs
        vectors, others = optional[: len(affine)], optional[len(affine) :]
        frame = pl.program_id(3)
        fill(ring, frame, (top, middle, bottom), _activation(vectors), repeated)

        @pl.loop(0, walk.chunks)
        def _(i: jax.Array) -> None:
            total = contract(ring, frame, lambda rows, tap: _dot(rows, weights[tap]), walk, i)
            total = sum(
                (ref[walk.lines(i)].astype(jnp.float32) for ref in others), walk.lined(total)
            )
            y[walk.lines(i)] = total.astype(y.dtype)

    return pl.pallas_call(
        body,
        name="causal_conv",
        out_shape=jax.ShapeDtypeStruct((b, t, h, w, features), x.dtype),
        grid=(b, features // block, h // walk.rows, t),
        in_specs=[
            *walk.with_edges(c),
            pl.BlockSpec((3 * taps, 3 * c, block), lambda b, f, r, t: (0, 0, f)),
            *(walk.vector(c) for _ in affine),
            *(walk.block(block) for _ in added),
        ],
        out_specs=walk.block(block),
        scratch_shapes=[walk.ring(taps, c, x.dtype)],
        compiler_params=params("parallel", "parallel", "parallel", "arbitrary"),
    )(x, x, x, kernel.reshape(3 * taps, 3 * c, features), *affine, *added)


def _save(*inputs: jax.Array | None) -> tuple[jax.Array, Any]:
    *kept, residual = inputs
    return _forward(*inputs), (*kept, residual is not None)


def _pull(saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    *inputs, adds = saved
    dx, dscale, doffset = _input_gradient(*inputs, dy)
    return dx, _kernel_gradient(*inputs, dy), dscale, doffset, dy if adds else None


_causal_conv = jax.custom_vjp(_forward)
_causal_conv.defvjp(_save, _pull)


def _input_gradient(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    b, t, h, w, c = x.shape
    taps, features = kernel.shape[0], kernel.shape[-1]
    rows = block_rows(h, w, taps, c, features, x.dtype)
    walk = Walk(rows, h, w, lambda b, r, step: (b, 0, r, t - 1 - step))
    affine = _affine(scale, offset)

    def body(top: Ref, middle: Ref, bottom: Ref, weights: Ref, *refs: Ref) -> None:
        *refs, ring, total = refs
        block, step = pl.program_id(1), pl.program_id(2)
        is_top, is_bottom = block == 0, block == pl.num_programs(1) - 1
        turned = functools.partial(_turned_dot, weights)

        @pl.when(step == 0)
        def _() -> None:
            ring[...] = jnp.zeros_like(ring)

        fill(ring, step, (top, middle, bottom), lambda rows: rows, gathered, (is_top, is_bottom))

        # The first frame stands for those before it too: what later frames owe to them is its.
        @pl.when(step == t - 1)
        def _() -> None:
            for tap in reversed(range(taps - 1)):
                ring[slot_of(ring, step, tap)] += ring[slot_of(ring, step, tap + 1)]

        @pl.loop(0, walk.chunks)
        def _(i: jax.Array) -> None:
            total[walk.pixels(i)] = contract(ring, step, turned, walk, i)

        # The outermost rows gather what their repetitions received.
        for is_edge, row, tap in ((is_top, 0, 2), (is_bottom, walk.rows - 1, 0)):

            @pl.when(is_edge)
            def _(row: int = row, tap: int = tap) -> None:
                for i in range(taps):
                    edge = ring[slot_of(ring, step, i), pl.ds((row + 1) * w, w)]
                    total[pl.ds(row * w, w)] += turned(edge, 3 * i + tap)

        if not affine:
            refs[0][...] = walk.lined(total[...]).astype(x.dtype)
            return
        x_ref, scale, offset, dx, dscale, doffset = refs
        dscale[...], doffset[...] = jnp.zeros_like(dscale), jnp.zeros_like(doffset)

        @pl.loop(0, walk.chunks)
        def _(i: jax.Array) -> None:
            rows = x_ref[walk.lines(i)].astype(jnp.float32)
            u = rows * scale[...] + offset[...]
            s = jax.nn.sigmoid(u)
            du = walk.lined(total[walk.pixels(i)]) * s * (1.0 + u * (1.0 - s))
            dx[walk.lines(i)] = (du * scale[...]).astype(dx.dtype)
            dscale[...] += (du * rows).sum((0, 1))[None]
            doffset[...] += du.sum((0, 1))[None]

    here, sums = walk.block(c), walk.sums(c)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    of_rows = jax.ShapeDtypeStruct((b, t, h // rows, 1, c), jnp.float32)
    dx, *partial = pl.pallas_call(
        body,
        name="causal_conv_input_gradient",
        out_shape=[out, of_rows, of_rows] if affine else [out],
        grid=(b, h // rows, t),
        in_specs=[
            *walk.with_edges(features),
            pl.BlockSpec((9 * taps, c, features), lambda b, r, step: (0, 0, 0)),
            *([here, walk.vector(c), walk.vector(c)] if affine else []),
        ],
        out_specs=[here, sums, sums] if affine else [here],
        scratch_shapes=[
            walk.ring(taps, features, dy.dtype),
            pltpu.VMEM((rows * w, c), jnp.float32),
        ],
        compiler_params=params("parallel", "parallel", "arbitrary"),
    )(dy, dy, dy, kernel.reshape(9 * taps, c, features), *((x, *affine) if affine else ()))
    dscale, doffset = (p.sum((2, 3)) for p in partial) if affine else (None, None)
    return dx, dscale, doffset


def _kernel_gradient(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    dy: jax.Array,
) -> jax.Array:
    b, t, h, w, c = x.shape
    taps, features = kernel.shape[0], kernel.shape[-1]
    block = min(_block(features), max(LANES, features // 2))
    rows = block_rows(h, w, taps, c, features, x.dtype)
    blocks = b * (h // rows)
    # Each core of a chip sums its own features, or else its own half of the blocks.
    halves = 2 if features == block and blocks % 2 == 0 else 1

    def at(half: Any, f: Any, i: Any, t: Any) -> Grid:
        i = half * (blocks // halves) + i
        return lax.div(i, h // rows), f, lax.rem(i, h // rows), t

    walk = Walk(rows, h, w, at)
    affine = _affine(scale, offset)

    def body(top: Ref, middle: Ref, bottom: Ref, *refs: Ref) -> None:
        *affine, dy_ref, out, ring, total = refs
        i, frame = pl.program_id(2), pl.program_id(3)
        fill(ring, frame, (top, middle, bottom), _activation(affine), repeated)

        @pl.when((i == 0) & (frame == 0))
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.loop(0, walk.chunks)
        def _(i: jax.Array) -> None:
            error = dy_ref[walk.lines(i)].reshape(-1, block)
            for tap in range(3 * taps):
                copies = seen_by(ring, frame, walk, i, tap)
                total[tap] += _dot(copies, error, (0, 0))

        @pl.when((i == pl.num_programs(2) - 1) & (frame == t - 1))
        def _() -> None:
            out[...] = total[...].astype(out.dtype)

    dtype = kernel.dtype if halves == 1 else jnp.float32
    out = pl.pallas_call(
        body,
        name="causal_conv_kernel_gradient",
        out_shape=jax.ShapeDtypeStruct((halves, 3 * taps, 3 * c, features), dtype),
        grid=(halves, features // block, blocks // halves, t),
        in_specs=[
            *walk.with_edges(c),
            *(walk.vector(c) for _ in affine),
            walk.block(block),
        ],
        out_specs=pl.BlockSpec(
            (None, 3 * taps, 3 * c, block), lambda half, f, i, t: (half, 0, 0, f)
        ),
        scratch_shapes=[
            walk.ring(taps, c, x.dtype),
            pltpu.VMEM((3 * taps, 3 * c, block), jnp.float32),
        ],
        compiler_params=params("parallel", "parallel", "arbitrary", "arbitrary"),
    )(x, x, x, *affine, dy)
    return out.sum(0).reshape(kernel.shape).astype(kernel.dtype)


def _turned_dot(weights: Ref, copies: jax.Array, tap: int) -> jax.Array:
    """Copies (pixels, 3 F) by the weights (9 kt, C, F), turned in the plane: (pixels, C)."""
    frame, row = divmod(tap, 3)
    features = weights.shape[-1]
    return functools.reduce(
        jnp.add,
        (
            _dot(
                copies[:, i * features : (i + 1) * features],
                weights[9 * frame + 3 * (2 - row) + 2 - i],
                (1, 1),
            )
            for i in range(3)
        ),
    )


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _activation(affine: Sequence[Ref]) -> Callable[[jax.Array], jax.Array]:
    if not affine:
        return lambda rows: rows
    scale, offset = (ref[...] for ref in affine)
    return lambda rows: jax.nn.swish(rows * scale + offset)


def _affine(*vectors: jax.Array | None) -> list[jax.Array]:
    return [v[:, :, None] for v in vectors if v is not None]


def _padded(features: int) -> int:
    """Features in whole tiles; those of the last layer, three colours, are padded to one."""
    return -(-features // LANES) * LANES


def _block(features: int) -> int:
    """Features that a step of the grid gives."""
    return 2 * LANES if features % (2 * LANES) == 0 else LANES
