"""Buckets: the few shapes that clips of any size and length are brought to.

Shapes must be few and fixed on an accelerator, and every batch comes from one bucket. A bucket is a
resolution, a number of frames and an aspect (Open-Sora 1.1); images are clips of one frame.

    python -m walt_jax.data.buckets --data DIR --config configs/NAME.py [--token_budget N]

prints what a config's buckets make of a dataset, and suggests a table for it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from walt_jax.errors import UserError

Size = tuple[int, int]  # height, width
_KEEP = 3  # tag of the draws of the keep probabilities
_WIDEST = 4.0  # aspect of the widest frame
_SMALLEST = 0.75  # of a resolution's pixels, where any aspect goes


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Clips of one resolution and length.

    Attributes:
      resolution: side of a square of as many pixels as a frame has at most: 256 is 256 x 256,
        192 x 336 and their like.
      num_frames: frames of a clip; 1 takes images, and only these.
      keep: probability that a video which fits stays; otherwise the next smaller bucket has it.
      batch_size: clips a step, over all devices; 0 is by the token budget.
    """

    resolution: int
    num_frames: int
    keep: float = 1.0
    batch_size: int = 0

    def __post_init__(self) -> None:
        if min(self.resolution, self.num_frames) < 1 or self.batch_size < 0:
            raise UserError(
                "A bucket of config.data.buckets.table needs a resolution and num_frames of at "
                f"least 1 and a batch_size of at least 0, got {self}."
            )
        if not 0 < self.keep <= 1:
            raise UserError(f"keep must lie in (0, 1] in config.data.buckets.table, got {self}.")

    def __str__(self) -> str:
        return f"resolution {self.resolution}, {self.num_frames} frames"


@dataclasses.dataclass(frozen=True)
class BucketsConfig:
    """A table of buckets and the aspects that each of them comes in.

    Attributes:
      table: the buckets, in any order.
      aspects: width / height of the sizes of a resolution; empty takes any that `multiple` allows,
        which cuts off least and makes the most shapes.
      multiple: heights and widths are multiples of it, in pixels.
      stretch: by how much a video may be stretched in one direction to meet its size before what is
        left over is cut off: 0.07 is 7 %. Of sizes that it reaches the first, where any aspect
        goes the largest, is taken.
      strides: frames, rows and columns of pixels of a latent; the first frame is one by itself.
      patch: latents of a token.
      token_budget: tokens a step of the buckets without a batch_size; 0 gives these
        config.batch_size.
      batch_multiple: batch sizes by the budget are multiples of it: of the devices.
    """

    table: tuple[Bucket, ...]
    aspects: tuple[float, ...] = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)
    multiple: int = 16
    stretch: float = 0.0
    strides: tuple[int, int, int] = (4, 8, 8)
    patch: tuple[int, int, int] = (1, 1, 1)
    token_budget: int = 0
    batch_multiple: int = 1

    def __post_init__(self) -> None:
        positive = (self.multiple, *self.strides, *self.patch, self.batch_multiple, *self.aspects)
        if min(positive) <= 0 or min(self.token_budget, self.stretch) < 0:
            raise UserError(
                "In config.data.buckets all numbers are positive but token_budget and stretch, "
                f"which may be 0: got {self}."
            )
        cells = [(b.resolution, b.num_frames) for b in self.table]
        if not cells or len(set(cells)) < len(cells):
            raise UserError(
                "config.data.buckets.table names each resolution and number of frames once, and "
                f"one at least: got {cells}."
            )
        for bucket in self.table:
            self.sizes(bucket.resolution)

    @property
    def falling(self) -> tuple[Bucket, ...]:
        """The table from the largest bucket to the smallest: by resolution, then by frames."""
        order = sorted(self.table, key=lambda b: (b.resolution, b.num_frames))
        return tuple(reversed(order))

    def sizes(self, resolution: int) -> tuple[Size, ...]:
        """The sizes (height, width) of a resolution, none of which has more pixels than it.

        Raises:
          UserError: no size of such multiples is as small.
        """
        step, area = self.multiple, resolution**2
        sides = range(step, area // step + 1, step)
        # Of any aspect those that are too small by half a multiple, too: a square of 3.75 windows a
        # side is 3 x 3 of them, not 3 x 4.
        slack = 0 if self.aspects else step / 2
        offered = [
            (h, w)
            for h, w in itertools.product(sides, sides)
            if h * w <= area
            and 1 / _WIDEST <= w / h <= _WIDEST
            and (
                (h + slack) * (w + slack) >= _SMALLEST * area
                or (h + step) * w > area < h * (w + step)
            )
        ]
        if not offered:
            raise UserError(
                f"No frame whose sides are multiples of {step} has a resolution of {resolution}: "
                "raise it in config.data.buckets.table, or lower config.data.buckets.multiple."
            )
        offered.sort(key=lambda size: (-size[0] * size[1], size))  # of equal aspects the larger
        if self.aspects:
            a = np.array(self.aspects)
            offered = [offered[i] for i in assign(np.ones_like(a), a, offered)]
        return tuple(dict.fromkeys(offered))

    def tokens(self, num_frames: int, size: Size) -> tuple[int, int, int]:
        """The grid (T, H, W) of tokens of a clip."""
        latents = (1 + (num_frames - 1) // self.strides[0], size[0] // self.strides[1])
        latents = (*latents, size[1] // self.strides[2])
        t, h, w = (max(1, n // p) for n, p in zip(latents, self.patch))
        return t, h, w

    def batches(self, default: int, *, latents: bool) -> dict[tuple[int, int, int], int]:
        """Batch sizes by the shape (T, H, W) of clips, or of the latents that are made of them."""
        whole = dataclasses.replace(self, patch=(1, 1, 1))
        return {
            whole.tokens(b.num_frames, size) if latents else (b.num_frames, *size): (
                self.batch_size(b, size, default)
            )
            for b in self.table
            for size in self.sizes(b.resolution)
        }

    def batch_size(self, bucket: Bucket, size: Size, default: int) -> int:
        """Clips of a batch of this bucket and size."""
        if bucket.batch_size or not self.token_budget:
            return bucket.batch_size or default
        clips = self.token_budget // math.prod(self.tokens(bucket.num_frames, size))
        return max(1, clips // self.batch_multiple) * self.batch_multiple


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where N records go.

    Attributes:
      shapes: of a clip in each bucket, such as (frames, height, width).
      batch_sizes: of each bucket.
      cells: int (N, E), the buckets that may have a record.
      chances: float (N, E), the probability of each; 0 for all where nothing takes it.
      buckets: of each record, int (N,), -1 is none; or a function of the epoch that gives them.
    """

    shapes: tuple[tuple[int, ...], ...]
    batch_sizes: tuple[int, ...]
    cells: np.ndarray
    chances: np.ndarray
    buckets: np.ndarray | Callable[[int], np.ndarray]

    @property
    def expected(self) -> np.ndarray:
        """Records of each bucket in an epoch, on average: float (buckets,)."""
        weights = self.chances.reshape(-1)
        return np.bincount(self.cells.reshape(-1), weights, len(self.shapes))

    @property
    def used(self) -> list[int]:
        """The buckets that some record may go to."""
        return np.flatnonzero(self.expected).tolist()

    @property
    def taken(self) -> np.ndarray:
        """bool (N,), records that some bucket takes."""
        return self.chances.any(axis=1)


def assign(
    heights: np.ndarray, widths: np.ndarray, sizes: Sequence[Size], stretch: float = 0.0
) -> np.ndarray:
    """The index in `sizes` whose aspect is nearest (in log) to each record's; int64 (N,).

    All that a stretch reaches are as near; of equally near ones it is the first.
    """
    aspect = np.log(np.asarray(widths) / np.asarray(heights))
    offered = np.log([w / h for h, w in sizes])
    apart = np.abs(aspect[:, None] - offered[None])
    return np.maximum(apart - np.log1p(stretch), 0.0).argmin(axis=1)


def assign_fixed(
    buckets: np.ndarray, shapes: Sequence[tuple[int, ...]], batch_sizes: Sequence[int]
) -> Assignment:
    """Every record in one bucket for good, or in none, -1."""
    chances = (buckets >= 0).astype(np.float32)[:, None]
    cells = np.maximum(buckets, 0)[:, None]
    return Assignment(tuple(shapes), tuple(batch_sizes), cells, chances, buckets)


def assign_by_table(
    config: BucketsConfig,
    num_frames: np.ndarray,
    images: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
) -> Assignment:
    """Open-Sora's rule: of the buckets not above a video's pixels and frames the largest.

    With probability 1 - keep, drawn anew in each epoch, the next smaller bucket that fits has it
    instead: fewer frames of that resolution, then the next lower resolution. Then the aspect is the
    nearest. What no bucket takes is left out.

    Args:
      config: the table.
      num_frames: (N,), frames of the longest clip of each record.
      images: bool (N,), records that are images.
      heights, widths: (N,), pixels.
      batch_size: of buckets that say none.
      seed: of the draws.
      shuffle: draw anew in each epoch; otherwise all are as the first.
    """
    table, pixels = config.falling, np.asarray(heights) * np.asarray(widths)
    cells = [(bucket, size) for bucket in table for size in config.sizes(bucket.resolution)]
    shapes = tuple((bucket.num_frames, *size) for bucket, size in cells)
    sizes = tuple(config.batch_size(bucket, size, batch_size) for bucket, size in cells)
    long_enough = [
        images if b.num_frames == 1 else ~images & (num_frames >= b.num_frames) for b in table
    ]
    fits = np.stack([n & (pixels >= b.resolution**2) for b, n in zip(table, long_enough)], axis=1)
    aspects = {
        r: assign(heights, widths, config.sizes(r), config.stretch)
        for r in {b.resolution for b in table}
    }
    first = np.cumsum([0, *(len(config.sizes(b.resolution)) for b in table)])
    cell = np.stack([first[i] + aspects[b.resolution] for i, b in enumerate(table)], axis=1)
    keep = np.array([b.keep for b in table], np.float32)
    passed_on = np.cumprod(np.where(fits, 1 - keep, 1), axis=1)
    reached = np.concatenate([np.ones_like(passed_on[:, :1]), passed_on[:, :-1]], axis=1)
    draw = _Draw(fits, cell, keep, seed)
    fixed = not shuffle or (keep == 1).all()
    return Assignment(
        shapes, sizes, cell, np.where(fits, keep, 0) * reached, draw(0) if fixed else draw
    )


@dataclasses.dataclass(frozen=True)
class _Draw:
    """The bucket of each record in an epoch, by the keep probabilities."""

    fits: np.ndarray
    cell: np.ndarray
    keep: np.ndarray
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, _KEEP, epoch))
        stays = self.fits & (rng.random(self.fits.shape, np.float32) < self.keep)
        chosen = np.take_along_axis(self.cell, stays.argmax(axis=1)[:, None], axis=1)[:, 0]
        return np.where(stays.any(axis=1), chosen, -1)


def fit_frames(
    frames: np.ndarray,
    size: Size,
    at: tuple[float, float] = (0.5, 0.5),
    *,
    stretch: float = 0.0,
) -> np.ndarray:
    """Scales frames to cover `size`, then crops; uint8 (T, H, W, 3).

    Args:
      frames: uint8 (T, H', W', 3).
      size: height and width.
      at: where the crop lies in what is left over, 0 (top, left) to 1; by default in the centre.
      stretch: by how much the one side may be scaled more than the other.
    """
    height, width = size
    h, w = frames.shape[1:3]
    scale = max(height / h, width / w)
    scaled = tuple(
        max(side, round(n * scale / (1.0 + stretch))) for side, n in ((width, w), (height, h))
    )
    if scaled != (w, h):
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        frames = np.stack([cv2.resize(f, scaled, interpolation=method) for f in frames])
    top, left = int((scaled[1] - height) * at[0]), int((scaled[0] - width) * at[1])
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def crop_loss(
    heights: np.ndarray, widths: np.ndarray, size: Size, stretch: float = 0.0
) -> np.ndarray:
    """The share of each frame's pixels that `fit_frames` cuts off, float64 (N,)."""
    height, width = size
    ratio = (np.asarray(widths) / np.asarray(heights)) / (width / height)
    return 1.0 - np.minimum(1.0, np.minimum(ratio, 1.0 / ratio) * (1.0 + stretch))


if __name__ == "__main__":
    from walt_jax import cli
    from walt_jax.data.dry_run import main

    cli.run(main)
