"""The ring of moved copies that the tokenizer's convolution kernels contract.

A frame's rows lie three times side by side, moved by one column left, not and right, and the copies
of the last kt frames are kept: (kt, (rows + 2) x W, 3 C) in VMEM.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from walt_jax.kernels.rows import CHUNK, Walk, divisor

Ref = Any


def fill(
    ring: Ref,
    step: jax.Array,
    rows: Sequence[Ref],
    value: Callable[[jax.Array], jax.Array],
    moved: Callable[[jax.Array], tuple[jax.Array, ...]],
    absent: Sequence[jax.Array] = (),
) -> None:
    """Writes the moved copies of (the row above, a block, the row below) into the step's slot.

    The first frame is written to all slots where the edges repeat. Rows above and below that are
    `absent` count as zeros.
    """
    top, middle, bottom = rows
    number, width, channels = middle.shape
    slot = lax.rem(step, ring.shape[0])
    chunk = divisor(number, max(1, CHUNK // width))

    def put(rows: jax.Array, at: Any) -> None:
        copies = moved(value(rows.astype(jnp.float32)))
        for i, copy in enumerate(copies):
            pixels = pl.ds(pl.multiple_of(at * width, 8), copy.shape[0] * width)
            lanes = pl.ds(i * channels, channels)
            ring[slot, pixels, lanes] = copy.astype(ring.dtype).reshape(-1, channels)

    def edge(row: Ref, index: int) -> jax.Array:
        return jnp.where(absent[index], jnp.zeros_like(row), row[...]) if absent else row[...]

    put(edge(top, 0), 0)
    put(edge(bottom, 1), number + 1)

    @pl.loop(0, number // chunk)
    def _(i: jax.Array) -> None:
        put(middle[pl.ds(i * chunk, chunk)], 1 + i * chunk)

    if not absent:

        @pl.when(step == 0)
        def _() -> None:
            for other in range(1, ring.shape[0]):
                ring[other] = ring[0]


def _columns(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of (n, W, C): the columns to the left and right (turned round), and where both ends are."""
    width = rows.shape[1]
    column = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    left, right = pltpu.roll(rows, 1, 1), pltpu.roll(rows, width - 1, 1)
    return left, right, column == 0, column == width - 1


def repeated(rows: jax.Array) -> tuple[jax.Array, ...]:
    """What lies to the left, here and to the right, the edges repeated."""
    left, right, first, last = _columns(rows)
    return jnp.where(first, rows, left), rows, jnp.where(last, rows, right)


def gathered(rows: jax.Array) -> tuple[jax.Array, ...]:
    """The transpose of `repeated` under turned taps: zeros beyond the edges, which add up."""
    left, right, first, last = _columns(rows)
    left = jnp.where(first, 0.0, left) + jnp.where(last, rows, 0.0)
    right = jnp.where(last, 0.0, right) + jnp.where(first, rows, 0.0)
    return left, rows, right


def slot_of(ring: Ref, step: jax.Array, tap: int) -> jax.Array:
    """Where the copies for a tap in time lie; those of this step are for the last."""
    return lax.rem(step + 1 + tap, ring.shape[0])


def seen_by(ring: Ref, step: jax.Array, walk: Walk, i: jax.Array, tap: int) -> jax.Array:
    """What a tap in time and height sees of chunk i: (pixels, 3 C)."""
    return ring[slot_of(ring, step, tap // 3), walk.pixels(i, tap % 3)]


def contract(
    ring: Ref,
    step: jax.Array,
    dot: Callable[[jax.Array, int], jax.Array],
    walk: Walk,
    i: jax.Array,
) -> jax.Array:
    """The sum over taps in time and height of their products at chunk i: float32 (pixels, n)."""
    taps = range(3 * ring.shape[0])
    return functools.reduce(jnp.add, (dot(seen_by(ring, step, walk, i, tap), tap) for tap in taps))
