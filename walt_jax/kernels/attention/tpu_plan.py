"""How the TPU kernels of window attention divide the tokens and heads of videos.

A *tile* is what attends at a time: a window, or several side by side, which a mask keeps apart,
where a window is no block that a TPU can read or a very small one. A step of a kernel's grid has
some tiles, or some of the queries of one, and some heads.
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
from walt_jax.kernels.target import Target, target

Grid = tuple[int, int, int]
Tile = tuple[int, int, int]
Task = tuple[Tile, int, int]
# Logits of a step: fewer are lost in a step's own cost, more are too much code.
FORWARD, BACKWARD = 2**21, 900_000
SUBLANES = 8
_SMALL = 64  # tokens of a window below which a tile has several
_QUERIES = 640  # tokens of a tile above which it is divided into parts of half as many queries


@dataclasses.dataclass(frozen=True)
class Group:
    """The fewest heads that fill whole tiles of lanes.

    A head may begin and end inside of a tile; contracted are all tiles that it touches, with
    the other heads' lanes 0 in one operand. Transposed, heads are rows, and nothing is wasted.

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

    def rows(self, i: int) -> slice:
        """The i-th head's lanes, or rows of a transposed (width, tokens)."""
        k = self.width // self.heads
        return slice(i * k, (i + 1) * k)

    def touched(self, i: int) -> slice:
        """The lanes of the tiles that the i-th head touches."""
        own = self.rows(i)
        stop = -(-own.stop // LANES) * LANES
        return slice(own.start // LANES * LANES, min(stop, self.width))

    def only(self, x: jax.Array, i: int) -> jax.Array:
        """Tiles of x (tokens, width) that the i-th head touches, 0 in other heads' lanes."""
        return self.mask(x[:, self.touched(i)], i)

    def mask(self, tiles: jax.Array, i: int) -> jax.Array:
        """The tiles that the i-th head touches, 0 in other heads' lanes."""
        touched = self.touched(i)
        return tiles if self.rows(i) == touched else jnp.where(self._own(i, touched), tiles, 0)

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """(tokens, width) of the heads' own lanes of the i-th head's tiles, parts[i]."""
        joined = []
        for start in range(0, self.width, LANES):
            tile = slice(start, min(start + LANES, self.width))
            out = None
            for i, part in enumerate(parts):
                tiles = self.touched(i)
                if tiles.start < tile.stop and tile.start < tiles.stop:
                    here = part[:, tile.start - tiles.start : tile.stop - tiles.start]
                    out = here if out is None else jnp.where(self._own(i, tile), here, out)
            joined.append(out)
        return jnp.concatenate(joined, axis=1)

    def _own(self, i: int, lanes: slice) -> jax.Array:
        lane, own = lax.broadcasted_iota(jnp.int32, (1, lanes.stop - lanes.start), 1), self.rows(i)
        return (lane >= own.start - lanes.start) & (lane < own.stop - lanes.start)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A division of the work; a kernel's grid is (lane blocks, B, T, H, W, query blocks).

    Attributes:
      grid: (T, H, W) of the videos.
      block: the window.
      tile: the windows that are read together.
      tiles: of a step, in B, T and H.
      queries: frames and rows of a tile that ask at a time.
      num_heads, head_width: of the whole.
      lanes: of a step.
      extra: keys beside the grid's.
      frames: how many a token sees, its own the last; 0 is all.
      has_grid: whether there are keys of the grid.
      chip: that the kernel is for.
    """

    grid: Grid
    block: Grid
    tile: Grid
    tiles: Tile
    queries: tuple[int, int]
    num_heads: int
    head_width: int
    lanes: int
    extra: int
    frames: int
    has_grid: bool
    chip: Target

    @property
    def name(self) -> str:
        """Of the kernels, in profiles and compiled programs."""
        keys = ["grid"] * self.has_grid + [f"{self.extra}_more"] * (self.extra > 0)
        return "_".join(["window_attention", "x".join(map(str, self.block)), *keys])

    @property
    def length(self) -> int:
        """Tokens of a tile."""
        return math.prod(self.tile)

    @property
    def rows(self) -> int:
        """Queries at a time."""
        return math.prod(self.queries) * self.tile[2]

    @property
    def own_keys(self) -> int:
        """Keys of the grid in a tile."""
        return self.length * self.has_grid

    @property
    def keys(self) -> int:
        """Keys of a tile, extra ones last."""
        return self.own_keys + self.extra

    @property
    def parts(self) -> int:
        """Blocks of queries in a tile."""
        return self.length // self.rows

    @property
    def heads(self) -> int:
        """Heads of a step."""
        return self.lanes // self.head_width

    @functools.cached_property
    def groups(self) -> list[Group]:
        k, most = self.head_width, math.lcm(self.head_width, LANES)
        starts = range(0, self.lanes, most)
        widths = [min(most, self.lanes - start) for start in starts]
        return [Group(s, w, s // k, w // k) for s, w in zip(starts, widths)]

    @property
    def merged(self) -> bool:
        """Whether a tile has several windows."""
        return self.tile != self.block

    def pallas_grid(self, batch: int) -> tuple[int, ...]:
        blocks = self.num_heads * self.head_width // self.lanes
        sizes = batch, self.grid[0] // self.tile[0], self.grid[1] // self.tile[1]
        steps = (n // m for n, m in zip(sizes, self.tiles))
        return blocks, *steps, self.grid[2] // self.tile[2], self.parts

    def cores(self, batch: int) -> int:
        """How many of a chip's cores take videos of their own, each half of them."""
        columns, steps, *_ = self.pallas_grid(batch)
        return self.chip.cores if columns == 1 and steps % self.chip.cores == 0 else 1

    def tasks(self) -> list[Task]:
        """(tile, group, head of the group) of a step."""
        heads = [(g, i) for g, group in enumerate(self.groups) for i in range(group.heads)]
        return [(tile, *head) for tile in self.each_tile() for head in heads]

    def each_tile(self) -> Iterator[Tile]:
        return itertools.product(*map(range, self.tiles))

    @property
    def flat(self) -> bool:
        """Whether kernels see (B, T, H x W, D): rows need not be whole numbers of sublanes then."""
        return self.tile[2] == self.grid[2] and self.queries[1] * self.tile[2] % SUBLANES == 0

    def view(self, x: jax.Array) -> jax.Array:
        """(B, T, H, W, D) as kernels see it."""
        return x.reshape(*x.shape[:2], -1, x.shape[-1]) if self.flat else x

    def read(self, ref: Any, tile: Tile, group: Group) -> jax.Array:
        """A group's lanes of a tile or of its queries: float32 (tokens, width)."""
        x = ref[*self._at(ref, tile), group.lanes]
        # A row may be half a tile of bfloat16, of which tokens are no whole number; of float32 not.
        return x.astype(jnp.float32).reshape(-1, group.width)

    def write(self, ref: Any, tile: Tile, group: Group, x: jax.Array) -> None:
        """The reverse of `read`, in ref's dtype."""
        at = self._at(ref, tile)
        sizes = (s.stop - s.start for s in at[1:])
        ref[*at, group.lanes] = x.reshape(*sizes, group.width).astype(ref.dtype)

    def _at(self, ref: Any, tile: Tile) -> tuple[Any, ...]:
        sizes = [n // m for n, m in zip(ref.shape, self.tiles)]
        at = [slice(i * n, (i + 1) * n) for i, n in zip(tile, sizes)][1:]
        return tile[0], *at, *(slice(0, n) for n in ref.shape[3:-1])

    def of_keys(self) -> pl.BlockSpec:
        """Tokens of `view`: the tiles of a step."""
        (t, h, _), (nb, nt, nh) = self.tile, self.tiles
        return self._block((nb, nt * t, nh * h), lambda d, b, t, h, w, i: (b, t, h, w, d))

    def of_queries(self) -> pl.BlockSpec:
        """Tokens of `view`: those of a step that ask."""
        if self.parts == 1:
            return self.of_keys()
        (ct, ch), (wt, wh, _) = self.queries, self.tile

        def index(*ids: Any) -> tuple[Any, ...]:
            d, b, t, h, w, i = ids
            down = jnp.int32(wh // ch)
            return b, t * (wt // ct) + lax.div(i, down), h * (wh // ch) + lax.rem(i, down), w, d

        return self._block((1, ct, ch), index)

    def _block(self, shape: Tile, index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """Of so many videos, frames and rows."""
        b, t, h = shape
        if not self.flat:
            return pl.BlockSpec((b, t, h, self.tile[2], self.lanes), index)

        def flat(*ids: Any) -> tuple[Any, ...]:
            *rows, _, lanes = index(*ids)
            return *rows, lanes

        return pl.BlockSpec((b, t, h * self.tile[2], self.lanes), flat)

    def of_extra(self) -> pl.BlockSpec:
        """Of (B, M, D)."""
        shape = (self.tiles[0], self.extra, self.lanes)
        return pl.BlockSpec(shape, lambda d, b, *_: (b, 0, d))

    def of_ids(self, queries: bool) -> pl.BlockSpec:
        """Of (B, tiles in T, in H, in W, parts, 1, queries) or (..., 1, keys, 1)."""
        shape = (1, self.rows) if queries else (self.length, 1)

        def index(*ids: Any) -> tuple[Any, ...]:
            _, b, t, h, w, i = ids
            return b, t, h, w, i if queries else 0, 0, 0

        return pl.BlockSpec((*self.tiles, None, None, *shape), index)

    def visible(self, part: jax.Array) -> jax.Array | None:
        """Which keys the part-th queries see by place and time, bool (keys, queries)."""
        if not self.has_grid or not (self.merged or self.frames):
            return None
        k = lax.broadcasted_iota(jnp.int32, (self.keys, 1), 0)
        q = lax.broadcasted_iota(jnp.int32, (1, self.rows), 1) + part * self.rows
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

    def vmem(self, itemsize: int, bias: bool) -> int:
        """Bytes that the gradient's kernel holds."""
        tokens = math.prod(self.tiles) * self.length
        moving = 2 * itemsize * self.lanes * tokens * (3 / self.parts + 4 * self.has_grid)
        moving += 2 * (2 * itemsize + 8) * self.lanes * self.tiles[0] * self.extra
        sums = 8 * self.lanes * self.keys if self.parts > 1 else 0
        if bias:  # of the rows at a time, also turned; the gradient's sums and what leaves, of all
            turned = self.rows if self.parts == 1 else 0
            sums += 4 * self.heads * self.keys * (2 * self.rows + turned + 3 * self.length)
        operands = 8 * 4 * LANES * (self.rows + self.keys)
        return int(moving) + sums + operands + 8 * 4 * self.rows * self.keys


def make_plan(
    shape: Sequence[int],
    num_heads: int,
    block: Sequence[int],
    most: int,
    *,
    extra: int = 0,
    frames: int = 0,
    has_grid: bool = True,
) -> Plan:
    """The plan for windows `block` of (B, T, H, W, D), `most` logits a step."""
    batch, *grid, d = shape
    tile = _tile(tuple(grid), tuple(block))
    length, queries = math.prod(tile), _queries(tile)
    rows, keys = math.prod(queries) * tile[2], length * has_grid + extra
    k = d // num_heads
    whole = math.lcm(k, LANES)
    widths = [d] + [w for w in range(d - 1, 0, -1) if d % w == 0 and w % whole == 0]
    lanes = next((w for w in widths if w // k * rows * keys <= most), widths[-1])
    tiles = (1, 1, 1)
    if rows == length:
        more = max(1, most // (lanes // k * rows * keys))
        tiles = _tiles((batch, grid[0] // tile[0], grid[1] // tile[1]), more)
    sizes = tile, tiles, queries, num_heads, k, lanes, extra, frames, has_grid, target()
    return Plan(tuple(grid), tuple(block), *sizes)


def _tile(grid: Grid, block: Grid) -> Grid:
    (_, height, width), (t, h, w) = grid, block
    columns = [n for n in range(w, width + 1, w) if width % n == 0 and n % SUBLANES == 0]
    columns = columns[0] if columns else width
    if math.prod(block) >= _SMALL:
        return t, h, columns
    rows = [n for n in range(h, height + 1, h) if height % n == 0 and t * n * columns <= LANES]
    return t, rows[-1] if rows else h, columns


def _tiles(number: Tile, most: int) -> Tile:
    """How many of the tiles in B, T and H a step has: neighbours first."""
    found = []
    for n in reversed(number):
        found.append(divisor(n, most))
        most //= found[-1]
    return tuple(reversed(found))


def _queries(tile: Grid) -> tuple[int, int]:
    """Frames and rows of a tile that are queries at a time."""
    t, h, w = tile
    if t * h * w <= _QUERIES:
        return t, h
    if h * w <= _QUERIES:
        return divisor(t, max(1, _QUERIES // 2 // (h * w))), h
    return 1, divisor(h, max(1, _QUERIES // 2 // w))
