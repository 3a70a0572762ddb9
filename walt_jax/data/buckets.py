"""Buckets: the few shapes that clips of any aspect are brought to.

Shapes must be few and fixed on an accelerator. Each record goes to the bucket whose aspect is
nearest; every batch comes from one bucket.
"""

from collections.abc import Sequence

import cv2
import numpy as np

Size = tuple[int, int]  # height, width
_ORDER = 1  # sets these draws apart from those of the clips, which have their own tag


def assign(heights: np.ndarray, widths: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """The index in `sizes` whose aspect is nearest (in log) to each record's; int64 (N,)."""
    aspect = np.log(np.asarray(widths) / np.asarray(heights))
    offered = np.log([w / h for h, w in sizes])
    return np.abs(aspect[:, None] - offered[None]).argmin(axis=1)


def fit_frames(frames: np.ndarray, size: Size, at: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Scales frames to cover `size`, then crops; uint8 (T, H, W, 3).

    Args:
      frames: uint8 (T, H', W', 3).
      size: height and width.
      at: where the crop lies in what is left over, 0 (top, left) to 1; by default in the centre.
    """
    height, width = size
    h, w = frames.shape[1:3]
    scale = max(height / h, width / w)
    scaled = (max(width, round(w * scale)), max(height, round(h * scale)))
    if scaled != (w, h):
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        frames = np.stack([cv2.resize(f, scaled, interpolation=method) for f in frames])
    top, left = int((scaled[1] - height) * at[0]), int((scaled[0] - width) * at[1])
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


class BatchPlan:
    """Which records make batch k: a pure function of (seed, k), whatever the number of hosts.

    An epoch permutes every bucket's records and cuts them into batches; a bucket's last batch is
    filled up from the start of its permutation. The batches of all buckets are then shuffled.
    """

    def __init__(
        self, buckets: np.ndarray, batch_size: int, seed: int, *, shuffle: bool = True
    ) -> None:
        self._members = [np.flatnonzero(buckets == b) for b in np.unique(buckets)]
        self._names = np.unique(buckets)
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        counts = [-(-len(m) // batch_size) for m in self._members]
        self._slots = np.concatenate(
            [np.stack([np.full(n, i), np.arange(n)], 1) for i, n in enumerate(counts)]
        )
        self._epoch: tuple[int, list[np.ndarray], np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every record appears at least once."""
        return len(self._slots)

    def __call__(self, k: int) -> tuple[int, np.ndarray]:
        """(bucket, record indices (batch_size,)) of batch k."""
        epoch, position = divmod(k, len(self._slots))
        members, slots = self._shuffled(epoch)
        group, n = slots[position]
        rows = np.arange(n * self._batch_size, (n + 1) * self._batch_size)
        return int(self._names[group]), members[group][rows % len(members[group])]

    def _shuffled(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        if not self._shuffle:
            return self._members, self._slots
        cached = self._epoch  # one read: several threads ask for batches
        if cached is None or cached[0] != epoch:
            rng = np.random.default_rng((self._seed, _ORDER, epoch))
            members = [rng.permutation(m) for m in self._members]
            self._epoch = cached = epoch, members, rng.permutation(self._slots)
        return cached[1:]
