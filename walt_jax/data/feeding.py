"""Clips to batches, and batches to the devices of all processes."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of every batch: rows first / total to stop / total of it."""

    first: int
    stop: int
    total: int

    def rows(self, whole: int) -> int:
        """Of so many rows, which the total divides, those of this process."""
        return whole * (self.stop - self.first) // self.total


def stacked(clips: Iterator[dict[str, Any]], counts: Iterable[int]) -> Iterator[HostBatch]:
    """Batches of so many clips each; closing it closes the reader."""
    try:
        for count in counts:
            rows = [next(clips) for _ in range(count)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    finally:
        clips.close()


def on_devices(
    batches: Iterator[HostBatch], sharding: NamedSharding, share: Share, ahead: int
) -> Iterator[dict[str, jax.Array]]:
    """Batches as global arrays, `ahead` of them on the way to the devices; without strings.

    A thread of its own stacks and sends them, while the caller's steps run.
    """

    def put(batch: HostBatch) -> dict[str, jax.Array]:
        # The one transfer that is wanted; with several processes JAX takes it for an implicit one.
        with jax.transfer_guard_host_to_device("allow"):
            return {
                name: jax.make_array_from_process_local_data(
                    sharding, x, (len(x) * share.total // (share.stop - share.first), *x.shape[1:])
                )
                for name, x in batch.items()
                if name != "caption"
            }

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:

        def submit() -> Future[dict[str, jax.Array]]:
            return thread.submit(lambda: put(next(batches)))

        queue = collections.deque(submit() for _ in range(ahead))
        try:
            while True:
                yield queue.popleft().result()
                queue.append(submit())
        finally:
            for future in queue:
                future.cancel()
