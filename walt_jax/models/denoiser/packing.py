"""Videos of any size packed into rows of equal blocks (Patch n' Pack, NaViT, 2307.06304).

A block is a box of tokens of one video: a single token, or a whole attention window. In a row the
blocks lie side by side along the width, as one grid (T, H, N W) of tokens: a window within a block
stays what it is, and one that spans blocks becomes the row with segment ids that say which tokens
share a window of their own video.
"""

import dataclasses

import jax
import jax.numpy as jnp

from walt_jax.kernels.window_attention import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """What lies where in B rows of N blocks with S videos at most.

    Attributes:
      segments: int32 (B, N), which video of its row a block belongs to, 0 .. S - 1; -1 is padding.
      places: int32 (B, N, 3), the first token (t, h, w) of a block in its video, multiples of the
        block's size.
      extents: int32 (B, S, 3), tokens (T, H, W) of each video; 0 where there is none.
      block: tokens (t, h, w) of a block.
    """

    segments: jax.Array
    places: jax.Array
    extents: jax.Array
    block: Window = dataclasses.field(metadata={"static": True})

    @property
    def valid(self) -> jax.Array:
        """bool (B, S), which videos there are."""
        return self.extents[..., 0] > 0

    def of_blocks(self, x: jax.Array) -> jax.Array:
        """What belongs to videos, (B, S, ...), for each block: (B, N, ...); padding has some."""
        index = jnp.maximum(self.segments, 0)
        return jax.vmap(lambda rows, i: rows[i])(x, index)

    def over_grid(self, vectors_BSD: jax.Array) -> jax.Array:
        """A vector a video, for each token of the row to broadcast: (B, 1, 1, N w, D)."""
        return jnp.repeat(self.of_blocks(vectors_BSD), self.block[2], axis=1)[:, None, None]

    def sum_of_videos(self, x: jax.Array) -> jax.Array:
        """The sum of (B, N) over each video's blocks: float32 (B, S), 0 where there is none."""
        own = self.segments[:, :, None] == jnp.arange(self.extents.shape[1])
        return jnp.where(own, x.astype(jnp.float32)[:, :, None], 0.0).sum(axis=1)

    def mean_of_videos(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """The mean of (B, N), weighted, over each video's blocks: float32 (B, S), 0 likewise."""
        total = self.sum_of_videos(x.astype(jnp.float32) * weights)
        return total / jnp.maximum(self.sum_of_videos(weights), 1)

    def flat(self, x: jax.Array) -> jax.Array:
        """What belongs to videos, (B, S, M, ...), one after the other: (B, S M, ...)."""
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def of_own(self, count: int, mask: jax.Array | None) -> jax.Array:
        """Which of M things of each video, `flat`, a token sees: those of its own video.

        Args:
          count: M.
          mask: bool (B, S, M), which there are; None for all.

        Returns:
          bool (B, t, h, N w, S M).
        """
        own = self.segments[:, :, None] == jnp.arange(self.extents.shape[1])
        seen = jnp.repeat(own, count, axis=2)
        if mask is not None:
            seen = seen & self.flat(mask.astype(bool))[:, None]
        seen = seen[:, :, None, None, None]
        return to_row(jnp.broadcast_to(seen, (*own.shape[:2], *self.block, seen.shape[-1])))

    def places_of_tokens(self, axis: int) -> jax.Array:
        """Places of tokens in their video along an axis: int32 (B, N, tokens of a block)."""
        return self.places[..., axis, None] + jnp.arange(self.block[axis])

    def holds(self, window: Window) -> bool:
        """Whether every such window lies within one block."""
        return all(n and size % n == 0 for n, size in zip(window, self.block))

    def native(self, window: Window) -> Window:
        """The window of the row within which those of its videos lie; 0 is the whole axis.

        Where windows span blocks, their tokens are spread over the row's width.
        """
        if self.holds(window):
            return window
        # An axis of one token has no windows, also where `to_frame` made rows of it.
        t, h = (
            n if n and size > 1 and size % n == 0 else 0
            for n, size in zip(window[:2], self.block[:2])
        )
        return (t, h, 0)

    def window_ids(self, window: Window) -> jax.Array:
        """Numbers that a row's tokens share if they share a window of their video.

        Args:
          window: in tokens; 0 is the video's whole axis.

        Returns:
          int32 (B, t, h, N w), -1 for padding.
        """
        ids = self.segments[..., None, None, None]
        for axis, size in enumerate(window):
            if not size:
                continue
            number = self.places_of_tokens(axis) // size
            shape = [1, 1, 1]
            shape[axis] = self.block[axis]
            most = self.extents[..., axis].max(axis=1).reshape(-1, 1, 1, 1, 1)
            ids = ids * most + number.reshape(*number.shape[:2], *shape)
        ids = jnp.where(self.segments[..., None, None, None] < 0, -1, ids)
        return to_row(jnp.broadcast_to(ids, (*self.segments.shape, *self.block)))


def to_frame(row: jax.Array) -> jax.Array:
    """A row of single tokens (B, 1, 1, N, ...) as a frame of 8 rows, where 8 divides it.

    Attention over the whole does not notice, and TPU kernels take frames, not lines.
    """
    b, t, h, n, *rest = row.shape
    return row.reshape(b, 1, 8, n // 8, *rest) if t == h == 1 and n % 8 == 0 else row


def whole(tokens: Window) -> Packing:
    """Clips of a grid of tokens as packed ones: one block each, for any number of them."""
    return Packing(
        segments=jnp.zeros((1, 1), jnp.int32),
        places=jnp.zeros((1, 1, 3), jnp.int32),
        extents=jnp.asarray([[tokens]], jnp.int32),
        block=tuple(tokens),
    )


def to_row(blocks: jax.Array) -> jax.Array:
    """(B, N, t, h, w, ...) to (B, t, h, N w, ...)."""
    b, n, t, h, w, *rest = blocks.shape
    return jnp.moveaxis(blocks, 1, 3).reshape(b, t, h, n * w, *rest)


def from_row(row: jax.Array, count: int) -> jax.Array:
    """The inverse of `to_row` for so many blocks."""
    b, t, h, w, *rest = row.shape
    return jnp.moveaxis(row.reshape(b, t, h, count, w // count, *rest), 3, 1)
