"""Tiles of the Triton kernels of window attention: where tokens lie and whom they see."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from walt_jax.kernels.attention.windows import Window

Ref = Any
LANES = (16, 128)  # of a head: the least that a product takes, and the most
MASKED = -1e30  # finite, so that a row without keys has no NaN


class Inputs(NamedTuple):
    """Arrays, or the kernels' references to them; None where there is none.

    Attributes:
      q, k, v: (B T H W, D).
      extra_k, extra_v: (B E, D).
      bias: (heads L, L).
      ids: (B T H W,).
      mask: (B E,), 0 where a key is padding.
    """

    q: Ref
    k: Ref
    v: Ref
    extra_k: Ref
    extra_v: Ref
    bias: Ref
    ids: Ref
    mask: Ref


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes, and where tokens lie.

    Attributes:
      batch, grid, block, num_heads, width: B, (T, H, W), the window, heads and features of one.
      extra: keys beside the grid.
      frames: how many a token sees, its own and those before it; 0 for all.
      size: queries, and keys, of a tile.
    """

    batch: int
    grid: Window
    block: Window
    num_heads: int
    width: int
    extra: int
    frames: int
    size: int

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return math.prod(self.block)

    @property
    def tokens(self) -> int:
        """Of a sample."""
        return math.prod(self.grid)

    @property
    def windows(self) -> int:
        """Of all samples."""
        return self.batch * self.tokens // self.length

    def tile(self, i: jax.Array) -> jax.Array:
        """Places of tile i; some may be beyond the last one."""
        return i * self.size + jnp.arange(self.size)

    def sample(self, window: jax.Array) -> jax.Array:
        """That a window is of."""
        return divide(window, self.tokens // self.length)[0]

    def rows(self, window: jax.Array, places: jax.Array) -> jax.Array:
        """Rows of (B T H W, D) of a window's tokens; beyond the last one where there is none."""
        (_, h, w), (wt, wh, ww) = self.grid, self.block
        window, column = divide(window, w // ww)
        first, line = divide(window, h // wh)  # of B T / wt
        t, place = divide(places, wh * ww)
        y, x = divide(place, ww)
        rows = ((first * wt + t) * h + line * wh + y) * w + column * ww + x
        return jnp.where(places < self.length, rows, self.batch * self.tokens)

    def extra_rows(self, sample: jax.Array, places: jax.Array) -> jax.Array:
        """Rows of (B E, D); beyond the last one where there is none."""
        return jnp.where(places < self.extra, sample * self.extra + places, self.batch * self.extra)

    def head(self, ref: Ref, rows: jax.Array, head: jax.Array) -> jax.Array:
        """(rows, lanes) of a head, 0 in the rows and lanes that there are not."""
        return plgpu.load(self._at(ref, rows, head), mask=self._is(ref, rows), other=0)

    def write(self, ref: Ref, rows: jax.Array, head: jax.Array, values: jax.Array) -> None:
        """Into the rows of a head that there are."""
        plgpu.store(self._at(ref, rows, head), values.astype(ref.dtype), mask=self._is(ref, rows))

    def _lanes(self) -> jax.Array:
        return jnp.arange(max(LANES[0], pl.next_power_of_2(self.width)))

    def _at(self, ref: Ref, rows: jax.Array, head: jax.Array) -> Ref:
        return ref.at[rows[:, None], (head * self.width + self._lanes())[None]]

    def _is(self, ref: Ref, rows: jax.Array) -> jax.Array:
        return (rows < ref.shape[0])[:, None] & (self._lanes() < self.width)[None]

    def logits(self, q: jax.Array, k: jax.Array, bias: Any, mask: jax.Array) -> jax.Array:
        """float32 (queries, keys)."""
        logits = dot(q, k.T) * self.width**-0.5 + bias
        return jnp.where(mask, logits, MASKED)

    def seen(
        self,
        inputs: Inputs,
        window: jax.Array,
        head: jax.Array,
        queries: jax.Array,
        keys: jax.Array,
    ) -> tuple[Any, jax.Array]:
        """Bias and mask, (queries, keys), of places in a window."""
        mask = (queries < self.length)[:, None] & (keys < self.length)[None]
        bias = 0.0
        if inputs.bias is not None:
            at = inputs.bias.at[(head * self.length + queries)[:, None], keys[None]]
            bias = plgpu.load(at, mask=mask, other=0).astype(jnp.float32)
        if self.frames:
            own, other = (divide(x, self.block[1] * self.block[2])[0] for x in (queries, keys))
            age = own[:, None] - other[None]
            mask &= (age >= 0) & (age < self.frames)
        if inputs.ids is not None:
            own, other = (vector(inputs.ids, self.rows(window, x)) for x in (queries, keys))
            mask &= own[:, None] == other[None]
        return bias, mask

    def seen_extra(self, inputs: Inputs, rows: jax.Array) -> jax.Array:
        """Mask (1, keys) of rows of the extra keys."""
        mask = rows < self.batch * self.extra
        if inputs.mask is not None:
            mask &= vector(inputs.mask, rows) != 0
        return mask[None]

    def over_keys(
        self, inputs: Inputs, queries: jax.Array, step: Callable[..., Any], state: Any
    ) -> Any:
        """state = step(state, k, v, bias, mask) for all keys that some queries of a window see."""
        window, head = pl.program_id(0), pl.program_id(1)

        def of_grid(i: jax.Array, state: Any) -> Any:
            keys = self.tile(i)
            rows = self.rows(window, keys)
            k, v = (self.head(ref, rows, head) for ref in (inputs.k, inputs.v))
            return step(state, k, v, *self.seen(inputs, window, head, queries, keys))

        def of_extra(i: jax.Array, state: Any) -> Any:
            rows = self.extra_rows(self.sample(window), self.tile(i))
            k, v = (self.head(ref, rows, head) for ref in (inputs.extra_k, inputs.extra_v))
            return step(state, k, v, 0.0, self.seen_extra(inputs, rows))

        if inputs.k is not None:
            state = lax.fori_loop(0, pl.cdiv(self.length, self.size), of_grid, state)
        if inputs.extra_k is not None:
            state = lax.fori_loop(0, pl.cdiv(self.extra, self.size), of_extra, state)
        return state


class Errors(NamedTuple):
    """What the backward kernels read.

    Attributes:
      dy: (B T H W, D), the gradient at the result.
      log_sum: (B T H W heads,), of the weights.
      mean: likewise, the weighted mean of dy v, which is dy y.
    """

    dy: Ref
    log_sum: Ref
    mean: Ref

    def of(
        self, plan: Plan, rows: jax.Array, head: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of some rows and a head: dy (rows, lanes) and the others (rows, 1)."""
        at = rows * plan.num_heads + head
        dy = plan.head(self.dy, rows, head)
        return dy, vector(self.log_sum, at)[:, None], vector(self.mean, at)[:, None]


def vector(ref: Ref, rows: jax.Array) -> jax.Array:
    """Some rows of a vector, 0 for those beyond its last one."""
    return plgpu.load(ref.at[rows], mask=rows < ref.shape[0], other=0)


def divide(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of what is not negative."""
    n = jnp.full_like(x, n)
    return lax.div(x, n), lax.rem(x, n)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of matrices, summed in float32; float32 ones are not cut to 19 bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
