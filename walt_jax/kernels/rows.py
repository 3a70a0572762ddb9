"""How Pallas TPU kernels walk over videos, some rows of a frame at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from walt_jax.kernels.target import target

LANES = 128
PIXELS = 2048  # of a block, or 4 rows
CHUNK = 512  # pixels that are worked on at a time

Grid = tuple[Any, Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Walk:
    """Blocks of rows of frames, in the order of a grid.

    Attributes:
      rows: of a block.
      height, width: of a frame.
      at: what the grid's indices stand for: clip, block of features, block of rows, frame.
    """

    rows: int
    height: int
    width: int
    at: Callable[..., Grid] = lambda *ids: ids

    @property
    def chunk(self) -> int:
        """Rows that are worked on at a time."""
        return divisor(self.rows, max(1, CHUNK // self.width))

    @property
    def chunks(self) -> int:
        return self.rows // self.chunk

    def lines(self, i: jax.Array) -> pl.Slice:
        """Rows of chunk i in (rows, W, C)."""
        return pl.ds(i * self.chunk, self.chunk)

    def pixels(self, i: jax.Array, row: int = 0) -> pl.Slice:
        """Pixels of chunk i in (rows x W, C), `row` rows on."""
        start = pl.multiple_of(i * self.chunk * self.width, 8) + row * self.width
        return pl.ds(start, self.chunk * self.width)

    def lined(self, pixels: jax.Array) -> jax.Array:
        """(n x W, C) as (n, W, C)."""
        return pixels.reshape(-1, self.width, pixels.shape[-1])

    def block(self, channels: int) -> pl.BlockSpec:
        """Of (B, T, H, W, C): so many of the channels."""

        def index(*ids: Any) -> tuple[Any, ...]:
            clip, features, block, frame = self.at(*ids)
            return clip, frame, block, 0, features

        return pl.BlockSpec((None, None, self.rows, self.width, channels), index)

    def with_edges(self, channels: int) -> list[pl.BlockSpec]:
        """The row above a block, the block and the row below; at the frame's edge its own row."""

        def row(offset: int) -> pl.BlockSpec:
            def index(*ids: Any) -> tuple[Any, ...]:
                clip, _, block, frame = self.at(*ids)
                line = jnp.clip(block * self.rows + offset, 0, self.height - 1)
                return clip, frame, line, 0, 0

            return pl.BlockSpec((None, None, 1, self.width, channels), index)

        whole = dataclasses.replace(
            self, at=lambda *ids: (*self.at(*ids)[:1], 0, *self.at(*ids)[2:])
        )
        return [row(-1), whole.block(channels), row(self.rows)]

    def vector(self, channels: int) -> pl.BlockSpec:
        """Of (B, T, 1, C)."""

        def index(*ids: Any) -> tuple[Any, ...]:
            clip, _, _, frame = self.at(*ids)
            return clip, frame, 0, 0

        return pl.BlockSpec((None, None, 1, channels), index)

    def sums(self, channels: int) -> pl.BlockSpec:
        """Of (B, T, blocks of rows, 1, C), what a block sums up to."""

        def index(*ids: Any) -> tuple[Any, ...]:
            clip, _, block, frame = self.at(*ids)
            return clip, frame, block, 0, 0

        return pl.BlockSpec((None, None, None, 1, channels), index)

    def ring(self, taps: int, channels: int, dtype: jnp.dtype) -> Any:
        """Copies of the last frames: (taps, (rows + 2) x W, 3 C)."""
        return pltpu.VMEM((taps, (self.rows + 2) * self.width, 3 * channels), dtype)


def block_rows(
    height: int, width: int, taps: int, channels: int, features: int, dtype: jnp.dtype
) -> int:
    """Rows of a frame that a step of the grid holds; 0 where VMEM does not hold one.

    One choice serves the pass forward and both gradients. Half a frame at most is for chips of two
    cores.
    """
    size, wide = jnp.dtype(dtype).itemsize, max(channels, features)

    def held(rows: int) -> int:
        copies = 3 * taps * (rows + 2) * width * wide * size
        moving = rows * width * (4 * size * (channels + features) + 4 * channels)
        weights = 2 * 9 * taps * channels * features * size
        sums = 9 * taps * channels * min(features, 256) * (4 + 2 * size)  # of a kernel gradient
        return copies + moving + max(weights, sums)

    most = min(max(1, height // 2), max(4, PIXELS // width))
    divisors = (rows for rows in range(most, 0, -1) if height % rows == 0)
    return next((rows for rows in divisors if held(rows) <= target().vmem * 7 // 8), 0)


def divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def params(*semantics: str) -> pltpu.CompilerParams:
    """What the compiler is told: of each axis of the grid, whether cores may divide it."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=target().vmem)
