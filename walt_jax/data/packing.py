"""Latents of any size packed into rows of equal blocks (Patch n' Pack, NaViT, 2307.06304).

A video is cut into blocks of latents, single tokens or whole attention windows; some may be
dropped. Rows of a fixed number of blocks are filled from videos of any size and length, by best
fit. What makes batch k is a function of (seed, k), whatever the number of hosts, and read from the
index alone.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from walt_jax.data.plan import BatchPlan
from walt_jax.errors import UserError

Size = tuple[int, int, int]
SEGMENTS = "segments"  # the array that says that a batch is of packed videos
_ORDER, _RATE, _KEPT = 4, 5, 6  # tags of random draws
_SORTED = 2048  # videos that are packed together, the largest first


@dataclasses.dataclass(frozen=True)
class DropConfig:
    """Which share of a video's blocks training leaves out, drawn a video and epoch (section 2.2).

    Attributes:
      rate: the mean share, below 1; 0 drops nothing.
      distribution: "constant", "beta" (about that mean), or "resolution" (in proportion to a
        video's blocks; `rate` is that of the largest video).
      concentration: of "beta", the sum of its two parameters: the larger, the nearer to the mean.
      start: the mean share in the beginning; clips: over so many clips it goes to `rate`, in a
        straight line. 0 clips are `rate` throughout.
    """

    rate: float = 0.0
    distribution: Literal["constant", "beta", "resolution"] = "constant"
    concentration: float = 10.0
    start: float = 0.0
    clips: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rate < 1 and 0 <= self.start < 1):
            raise UserError(
                "config.data.packing.drop.rate and start must lie in [0, 1), got "
                f"{self.rate} and {self.start}."
            )
        if self.concentration <= 0 or self.clips < 0:
            raise UserError(
                "config.data.packing.drop.concentration must be positive and clips 0 or more, got "
                f"{self.concentration} and {self.clips}."
            )

    def rates(self, blocks: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The share of each video, float (N,).

        Args:
          blocks: (N,), of the videos; seen: (N,), clips that training has seen before each.
          rng: of the draws.
        """
        way = np.minimum(seen / self.clips, 1.0) if self.clips else np.ones(len(blocks))
        mean = self.start + way * (self.rate - self.start)
        if self.distribution == "resolution":
            return mean * blocks / blocks.max()
        if self.distribution == "beta":
            a, b = mean * self.concentration, (1.0 - mean) * self.concentration
            return np.where(mean > 0, rng.beta(np.maximum(a, 1e-6), b), 0.0)
        return mean


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """How videos share the rows of a batch.

    Attributes:
      block: latents (t, h, w) of a block: the model's patch_size packs tokens, (5, 8, 8) packs
        windows of W.A.L.T. Videos are cut to whole blocks, about the centre and from the first
        frame on.
      blocks: of a row; `config.batch_size` is the rows of a step.
      videos: the most in a row.
      drop: which blocks are left out.
    """

    block: tuple[int, int, int] = (5, 8, 8)
    blocks: int = 64
    videos: int = 16
    drop: DropConfig = DropConfig()

    def __post_init__(self) -> None:
        if min(*self.block, self.blocks, self.videos) < 1:
            raise UserError(f"The sizes of config.data.packing must be positive, got {self}.")

    def count(self, shapes: np.ndarray) -> np.ndarray:
        """Blocks of videos with latents (T, H, W), int (N, 3): int (N,)."""
        return np.prod(shapes // np.asarray(self.block), axis=-1)

    def arrays(self, channels: int, dtype: str) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of what `fill_row` makes, but for what it is told of the videos."""
        return {
            "latents": ((self.blocks, *self.block, channels), np.dtype(dtype)),
            SEGMENTS: ((self.blocks,), np.int32),
            "places": ((self.blocks, 3), np.int32),
            "extents": ((self.videos, 3), np.int32),
        }


class Packed(NamedTuple):
    """A video in a row: its record, how many of its blocks, and the epoch of the draws."""

    record: int
    kept: int
    epoch: int


Row = tuple[Packed, ...]


class PackPlan:
    """Batches of packed rows; it answers as `BatchPlan` does, with a `Row` for a record.

    An epoch permutes the videos and packs them; the last batch is filled up with its first rows.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        config: PackingConfig,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        records: np.ndarray,
    ) -> None:
        """Plans without reading a record.

        Args:
          blocks: int (N,), of each video, at least 1 and no more than a row has.
          config: rows and dropping.
          batch_size: rows of a batch.
          seed: of the order and of what is dropped; without `shuffle` all epochs are alike.
          records: (N,), the numbers of the videos.
        """
        self._blocks, self._config, self._seed = blocks, config, seed
        self._shuffle, self._record_numbers = shuffle, records
        self._lock, self._epochs = threading.RLock(), {}
        self._batches = BatchPlan(self._buckets, batch_size, seed, shuffle=shuffle)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_epochs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def batches_per_epoch(self) -> int:
        """Batches of the first epoch, in which every video appears."""
        return self._batches.batches_per_epoch

    def __call__(self, k: int) -> tuple[int, list[Row]]:
        """(0, the rows of batch k)."""
        rows = self.epoch(self._batches.epoch_of(k))
        return 0, [rows[i] for i in self._batches(k)[1]]

    def first_row(self, k: int) -> int:
        """Rows in the batches before k."""
        return self._batches.first_row(k)

    def batch_of(self, row: int) -> int:
        """The batch that holds a row, where rows are counted over all batches."""
        return self._batches.batch_of(row)

    def epoch(self, e: int) -> list[Row]:
        """All rows of epoch e."""
        with self._lock:
            if e not in self._epochs:
                self._epochs = {n: x for n, x in self._epochs.items() if n == e - 1}
                self._epochs[e] = self._pack(e)
            return self._epochs[e]

    def _buckets(self, e: int) -> np.ndarray:
        return np.zeros(len(self.epoch(e)), int)

    def _pack(self, e: int) -> list[Row]:
        n, draws = len(self._blocks), e if self._shuffle else 0
        order = np.arange(n)
        if self._shuffle:
            order = np.random.default_rng((self._seed, _ORDER, e)).permutation(n)
        blocks, seen = self._blocks[order], draws * n + np.arange(n)
        rng = np.random.default_rng((self._seed, _RATE, draws))
        rates = self._config.drop.rates(blocks, seen, rng)
        kept = np.maximum(1, np.rint(blocks * (1.0 - rates)).astype(int))
        rows = best_fit(kept, self._config.blocks, self._config.videos)
        records = self._record_numbers[order].tolist()
        sizes = kept.tolist()
        return [tuple(Packed(records[i], sizes[i], draws) for i in row) for row in rows]


def best_fit(sizes: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """Numbers of items by row, none of more than `capacity` in all nor of more than `most` items.

    Each item goes where it leaves least room, of 2048 at a time the largest first. Rows that are
    not full stay open for those that follow.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by room
    rooms = 0  # bit r is set where some row has room r
    sizes = np.asarray(sizes)
    for first in range(0, len(sizes), _SORTED):
        part = sizes[first : first + _SORTED]
        for i in (first + np.argsort(-part, kind="stable")).tolist():
            size = int(sizes[i])
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                row = open_rows[room].pop()
                if not open_rows[room]:
                    rooms ^= 1 << room
            else:
                room, row = capacity, len(rows)
                rows.append([])
            rows[row].append(i)
            room -= size
            if room and len(rows[row]) < most:
                open_rows.setdefault(room, []).append(row)
                rooms |= 1 << room
    return rows


def cut(latents: np.ndarray, block: Size) -> tuple[np.ndarray, np.ndarray, Size]:
    """A video as blocks.

    Args:
      latents: (T, H, W, C).
      block: (t, h, w).

    Returns:
      (n, t, h, w, C); the places of their first latents, int32 (n, 3); and (T, H, W) as cut.
    """
    counts = [n // size for n, size in zip(latents.shape, block)]
    t, h, w = (n * size for n, size in zip(counts, block))
    top, left = (latents.shape[1] - h) // 2, (latents.shape[2] - w) // 2
    x = latents[:t, top : top + h, left : left + w]
    sides = [side for pair in zip(counts, block) for side in pair]
    x = x.reshape(*sides, -1).transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, *block, x.shape[-1])
    places = np.indices(counts).reshape(3, -1).T * np.asarray(block)
    return x, places.astype(np.int32), (t, h, w)


def chosen(video: Packed, count: int, seed: int) -> np.ndarray:
    """Which of a video's blocks are kept, rising."""
    if video.kept == count:
        return np.arange(count)
    rng = np.random.default_rng((seed, _KEPT, video.epoch, video.record))
    return np.sort(rng.permutation(count)[: video.kept])


def fill_row(row: Row, read: Any, config: PackingConfig, seed: int) -> dict[str, np.ndarray]:
    """The arrays of a row.

    Args:
      row: its videos.
      read: record number -> arrays of a clip, of which `latents` (T, H, W, C); the others are put
        beside each other, filled up with zeros.
      config: N blocks and S videos a row.
      seed: of what is dropped.

    Returns:
      `latents` (N, t, h, w, C), `segments` int32 (N,) with -1 for padding, `places` int32 (N, 3),
      `extents` int32 (S, 3), both in latents, and what else `read` gives as (S, ...).
    """
    clips = [read(video.record) for video in row]
    first = clips[0]["latents"]
    shapes = config.arrays(first.shape[-1], first.dtype)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    arrays[SEGMENTS][:] = -1
    for name, value in clips[0].items():
        if name != "latents":
            value = np.asarray(value)
            arrays[name] = np.zeros((config.videos, *value.shape), value.dtype)
    at = 0
    for s, (video, clip) in enumerate(zip(row, clips)):
        blocks, places, extent = cut(clip.pop("latents"), config.block)
        kept = chosen(video, len(blocks), seed)
        own = slice(at, at := at + len(kept))
        arrays["latents"][own], arrays["places"][own] = blocks[kept], places[kept]
        arrays[SEGMENTS][own], arrays["extents"][s] = s, extent
        for name, value in clip.items():
            arrays[name][s] = value
    return arrays
