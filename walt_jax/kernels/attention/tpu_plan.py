"""How the TPU kernels of window attention divide the tokens and heads of a video.

A *tile* is what attends at a time: a window, or several small ones side by side, which a mask keeps
apart, where a window is no block that a TPU can read. A step of the grid has some tiles, or some
of the queries of one, and as many heads as fill a step.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from walt_jax.kernels.rows import LANES, divisor

Grid = tuple[int, int, int]
_STEP = 2**20  # logits of a step: fewer are lost in a step's own cost, more are too much code
_MOST = 2**21  # logits of a step of all heads
_QUERIES = 640  # tokens of a tile above which it is divided into parts of half as many queries


@dataclasses.dataclass(frozen=True)
class Group:
    """Heads that share lanes: those of one tile of lanes, or a single one.

    Attributes:
      start, width: lanes in a step's block.
      head: the first.
      heads: how many.
    """

    start: int
    width: int
    head: int
    heads: int

    @property
    def lanes(self) -> slice:
        return slice(self.start, self.start + self.width)

    def only(self, x: jax.Array, i: int) -> jax.Array:
        """x (..., width) with 0 in the lanes of other heads than the i-th."""
        return x if self.heads == 1 else jnp.where(self._of(i), x, 0)

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The i-th head's lanes of the i-th part."""
        out = parts[0]
        for i, part in enumerate(parts[1:], 1):
            out = jnp.where(self._of(i), part, out)
        return out

    def _of(self, i: int) -> jax.Array:
        lane, k = lax.broadcasted_iota(jnp.int32, (1, self.width), 1), self.width // self.heads
        return (lane >= i * k) & (lane < (i + 1) * k)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A division of the work; the kernel's grid is (lane blocks, B, T, H, W, query blocks).

    Attributes:
      grid: (T, H, W) of the video.
      block: the window.
      tile: windows that are read together.
      tiles: of a step, in T and H.
      queries: frames and rows of a tile that are queries at a time.
      num_heads, head_width: of the whole.
      lanes: of a step.
      extra: keys beside the grid's.
      frames: how many a token sees, its own the last; 0 is all.
      has_grid: whether there are keys of the grid.
    """

    grid: Grid
    block: Grid
    tile: Grid
    tiles: tuple[int, int]
    queries: tuple[int, int]
    num_heads: int
    head_width: int
    lanes: int
    extra: int
    frames: int
    has_grid: bool

    @property
    def name(self) -> str:
        """Of the kernels, in profiles and compiled programs."""
        return f"window_attention_{'x'.join(map(str, self.block))}"

    @functools.cached_property
    def length(self) -> int:
        """Tokens of a tile."""
        return math.prod(self.tile)

    @property
    def rows(self) -> int:
        """Queries at a time."""
        return math.prod(self.queries) * self.tile[2]

    @property
    def keys(self) -> int:
        """Keys of a tile, extra ones after the grid's."""
        return self.length * self.has_grid + self.extra

    @property
    def parts(self) -> int:
        """Blocks of queries in a tile."""
        return self.length // self.rows

    @property
    def heads(self) -> int:
        """Heads of a step."""
        return self.lanes // self.head_width

    @property
    def groups(self) -> list[Group]:
        k = self.head_width
        if LANES % k:
            return [Group(i * k, k, i, 1) for i in range(self.heads)]
        starts = range(0, self.lanes, LANES)
        widths = [min(LANES, self.lanes - start) for start in starts]
        return [Group(s, w, s // k, w // k) for s, w in zip(starts, widths)]

    @property
    def merged(self) -> bool:
        """Whether a tile has several windows."""
        return self.tile != self.block

    @property
    def num_steps(self) -> tuple[int, int, int]:
        """In T, H and W."""
        t, h, w = (g // n for g, n in zip(self.grid, self.tile))
        return t // self.tiles[0], h // self.tiles[1], w

    def pallas_grid(self, batch: int) -> tuple[int, ...]:
        blocks = self.num_heads * self.head_width // self.lanes
        return blocks, batch, *self.num_steps, self.parts

    def each_tile(self) -> Iterator[tuple[int, int]]:
        return itertools.product(*map(range, self.tiles))

    def read(self, ref: Any, tile: tuple[int, int], group: Group) -> jax.Array:
        """A tile's (or its queries') lanes of a group: (tokens, width) of a block."""
        x = ref[*self._at(ref, tile), :, group.lanes]
        # Rows of half a tile of bfloat16 move in float32.
        return x.astype(jnp.float32).reshape(-1, group.width)

    def write(self, ref: Any, tile: tuple[int, int], group: Group, x: jax.Array) -> None:
        at = self._at(ref, tile)
        shape = (*(s.stop - s.start for s in at), self.tile[2], group.width)
        ref[*at, :, group.lanes] = x.reshape(shape).astype(ref.dtype)

    def _at(self, ref: Any, tile: tuple[int, int]) -> list[slice]:
        sizes = [n // m for n, m in zip(ref.shape, self.tiles)]
        return [slice(i * n, (i + 1) * n) for i, n in zip(tile, sizes)]

    def of_keys(self) -> pl.BlockSpec:
        """Tokens of (B, T, H, W, D): the tiles of a step."""
        (t, h, w), (nt, nh) = self.tile, self.tiles
        shape = (None, nt * t, nh * h, w, self.lanes)
        return pl.BlockSpec(shape, lambda d, b, t, h, w, i: (b, t, h, w, d))

    def of_queries(self) -> pl.BlockSpec:
        """Tokens of (B, T, H, W, D): those of a step that ask."""
        if self.parts == 1:
            return self.of_keys()
        (ct, ch), (wt, wh, ww) = self.queries, self.tile

        def index(*ids: Any) -> tuple[Any, ...]:
            d, b, t, h, w, i = ids
            row = jnp.int32(wh // ch)
            return b, t * (wt // ct) + lax.div(i, row), h * (wh // ch) + lax.rem(i, row), w, d

        return pl.BlockSpec((None, ct, ch, ww, self.lanes), index)

    def of_extra(self) -> pl.BlockSpec:
        """Of (B, M, D)."""
        return pl.BlockSpec((None, self.extra, self.lanes), lambda d, b, *_: (b, 0, d))

    def of_ids(self, queries: bool, column: bool) -> pl.BlockSpec:
        """Of (B, tiles in T, in H, in W, parts, tokens, 1) or with the last two exchanged."""
        whole = not queries or self.parts == 1
        n = self.length if whole else self.rows
        shape = (n, 1) if column else (1, n)

        def index(*ids: Any) -> tuple[Any, ...]:
            _, b, t, h, w, i = ids
            return b, t, h, w, 0 if whole else i, 0, 0

        return pl.BlockSpec((None, *self.tiles, None, None, *shape), index)

    def visible(self, part: jax.Array, transposed: bool) -> jax.Array | None:
        """Which keys the part-th queries see by place and time: bool (queries, keys) or its
        transpose; None is all."""
        if not self.has_grid or not (self.merged or self.frames):
            return None
        queries, keys = (self.rows, 1), (1, self.keys)
        if transposed:
            queries, keys = queries[::-1], keys[::-1]
        q = lax.broadcasted_iota(jnp.int32, queries, int(transposed)) + part * self.rows
        k = lax.broadcasted_iota(jnp.int32, keys, int(not transposed))
        here = self._window(q) == self._window(k) if self.merged else True
        if self.frames:
            age = self._frame(q) - self._frame(k)
            here = here & (age >= 0) & (age < self.frames)
        return here | (k >= self.length) if self.extra else here

    def _frame(self, token: jax.Array) -> jax.Array:
        return lax.div(token, self.tile[1] * self.tile[2])

    def _window(self, token: jax.Array) -> jax.Array:
        """The number of the window in its tile."""
        (_, th, tw), (_, h, w) = self.tile, self.block
        row, column = lax.rem(lax.div(token, tw), th), lax.rem(token, tw)
        return lax.div(row, h) * (tw // w) + lax.div(column, w)

    def vmem(self, itemsize: int) -> int:
        """Bytes that the gradient's kernel holds, without a bias."""
        tokens = self.tiles[0] * self.tiles[1] * self.length
        asked, known = tokens // self.parts, tokens * self.has_grid
        moving = 2 * itemsize * self.lanes * (3 * asked + 4 * known)
        moving += 2 * (2 * itemsize + 8) * self.lanes * self.extra
        sums = 8 * self.lanes * self.keys if self.parts > 1 else 0
        operands = 8 * 4 * LANES * (self.rows + self.keys)
        return moving + sums + operands + 8 * 4 * self.rows * self.keys


def make_plan(
    grid: Sequence[int],
    d: int,
    num_heads: int,
    block: Sequence[int],
    *,
    extra: int = 0,
    frames: int = 0,
    has_grid: bool = True,
) -> Plan:
    """The plan for windows `block` of (T, H, W) with `num_heads` in D lanes."""
    tile = _tile(tuple(grid), tuple(block))
    length = math.prod(tile)
    queries = _queries(tile)
    rows, keys = math.prod(queries) * tile[2], length * has_grid + extra
    k = d // num_heads
    whole = math.lcm(k, LANES)
    widths = [d] + [w for w in range(d - 1, 0, -1) if d % w == 0 and w % whole == 0]
    lanes = next((w for w in widths if w // k * rows * keys <= _MOST), widths[-1])
    tiles = (1, 1)
    if rows == length:
        most = max(1, _STEP // (lanes // k * rows * keys))
        down = grid[1] // tile[1]
        high = divisor(down, most)
        tiles = divisor(grid[0] // tile[0], max(1, most // high)) if high == down else 1, high
    sizes = tile, tiles, queries, num_heads, k, lanes, extra, frames, has_grid
    return Plan(tuple(grid), tuple(block), *sizes)


def _tile(grid: Grid, block: Grid) -> Grid:
    (_, height, width), (t, h, w) = grid, block
    columns = [n for n in range(w, width + 1, w) if width % n == 0 and n % 8 == 0]
    columns = columns[0] if columns else width
    if math.prod(block) >= 64:
        return t, h, columns
    rows = [n for n in range(h, height + 1, h) if height % n == 0 and t * n * columns <= LANES]
    return t, rows[-1] if rows else h, columns


def _queries(tile: Grid) -> tuple[int, int]:
    """Frames and rows of a tile that are queries at a time."""
    t, h, w = tile
    if t * h * w <= _QUERIES:
        return t, h
    if h * w <= _QUERIES:
        return divisor(t, max(1, _QUERIES // 2 // (h * w))), h
    return 1, divisor(h, max(1, _QUERIES // 2 // w))


def pipelined(
    tasks: Sequence[Any], first: Callable[[Any], Any], second: Callable[..., None]
) -> None:
    """Runs `second(task, first(task))` of each task after the next one's `first`.

    The compiler then has products of one head to overlap with the softmax of another.
    """
    before = None
    for task in tasks:
        now = task, first(task)
        if before is not None:
            second(*before)
        before = now
    second(*before)
