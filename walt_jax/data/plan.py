"""Which records make batch k: a pure function of (seed, k), whatever the number of hosts."""

import bisect
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_ORDER = 1  # sets these draws apart from those of the clips, which have their own tag


class _Epoch(NamedTuple):
    """What an epoch holds.

    Attributes:
      groups: each bucket's number and records, in their order.
      slots: (group, number in it) of each batch.
      rows: before each batch, and in all.
    """

    groups: list[tuple[int, np.ndarray]]
    slots: np.ndarray
    rows: np.ndarray


class BatchPlan:
    """Batches of one bucket each.

    An epoch permutes every bucket's records and cuts them into batches; a bucket's last batch is
    filled up from the start of its permutation. The batches of all buckets are then shuffled.
    """

    def __init__(
        self,
        buckets: np.ndarray | Callable[[int], np.ndarray],
        batch_size: int | Sequence[int],
        seed: int,
        *,
        shuffle: bool = True,
        records: np.ndarray | None = None,
    ) -> None:
        """Plans without reading a record.

        Args:
          buckets: each record's, int (N,), or a function of the epoch that gives them; -1 for
            records that are left out.
          batch_size: records of a batch, or of a batch of each bucket.
          seed: of the order; without `shuffle` records keep theirs.
          records: (N,), what batches call the records; by default 0 .. N - 1.
        """
        self._buckets, self._batch_size = buckets, batch_size
        self._seed, self._shuffle, self._records = seed, shuffle, records
        self._lock = threading.RLock()  # several threads ask for batches
        self._epochs: dict[int, _Epoch] = {}
        self._starts = [(0, 0)]  # batches and rows before each epoch

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_epochs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def batches_per_epoch(self) -> int:
        """Batches of the first epoch: every record of a bucket appears in them at least once."""
        return self.batches_before(1)

    def batches_before(self, epoch: int) -> int:
        """Batches of all epochs before one."""
        return self._start(epoch)[0]

    def __call__(self, k: int) -> tuple[int, np.ndarray]:
        """(bucket, records (batch size,)) of batch k."""
        _, epoch, within = self._find(k, 0)
        group, n = epoch.slots[within]
        bucket, members = epoch.groups[group]
        size = self._size(bucket)
        rows = members[np.arange(n * size, (n + 1) * size) % len(members)]
        return bucket, rows if self._records is None else self._records[rows]

    def epoch_of(self, k: int) -> int:
        """The epoch that batch k is of."""
        return self._find(k, 0)[0]

    def first_row(self, k: int) -> int:
        """Rows in the batches before k."""
        e, epoch, within = self._find(k, 0)
        return self._start(e)[1] + int(epoch.rows[within])

    def batch_of(self, row: int) -> int:
        """The batch that holds a row, where rows are counted over all batches."""
        e, epoch, within = self._find(row, 1)
        return self._start(e)[0] + int(np.searchsorted(epoch.rows, within, side="right")) - 1

    def _size(self, bucket: int) -> int:
        return self._batch_size if isinstance(self._batch_size, int) else self._batch_size[bucket]

    def _find(self, n: int, unit: int) -> tuple[int, _Epoch, int]:
        """The epoch that holds batch (unit 0) or row (unit 1) n, and which of the epoch's it is."""
        if not callable(self._buckets):
            e = n // self._start(1)[unit]
        else:
            while self._starts[-1][unit] <= n:
                self._start(len(self._starts))
            e = bisect.bisect_right(self._starts, n, key=lambda start: start[unit]) - 1
        return e, self._epoch(e), n - self._start(e)[unit]

    def _start(self, e: int) -> tuple[int, int]:
        """Batches and rows before epoch e."""
        if not callable(self._buckets) and e > 1:  # epochs are of equal length
            batches, rows = self._start(1)
            return e * batches, e * rows
        with self._lock:
            while len(self._starts) <= e:
                epoch, (batches, rows) = self._epoch(len(self._starts) - 1), self._starts[-1]
                self._starts.append((batches + len(epoch.slots), rows + int(epoch.rows[-1])))
        return self._starts[e]

    def _epoch(self, e: int) -> _Epoch:
        cached = self._epochs.get(e)
        if cached is not None:
            return cached
        with self._lock:
            if e not in self._epochs:
                # The one before stays: at its end some threads still ask for it.
                self._epochs = {n: x for n, x in self._epochs.items() if n == e - 1}
                self._epochs[e] = self._make(e)
            return self._epochs[e]

    def _make(self, e: int) -> _Epoch:
        buckets = self._buckets(e) if callable(self._buckets) else self._buckets
        names = [int(b) for b in np.unique(buckets) if b >= 0]
        members = [np.flatnonzero(buckets == b) for b in names]
        sizes = [self._size(b) for b in names]
        slots = np.array(
            [(i, n) for i, m in enumerate(members) for n in range(-(-len(m) // sizes[i]))], int
        ).reshape(-1, 2)
        if self._shuffle:
            rng = np.random.default_rng((self._seed, _ORDER, e))
            members = [rng.permutation(m) for m in members]
            slots = rng.permutation(slots)
        rows = np.cumsum([0, *(sizes[i] for i in slots[:, 0])])
        return _Epoch(list(zip(names, members)), slots, rows)
