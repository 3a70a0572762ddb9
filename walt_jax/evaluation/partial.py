"""Sums on disk: a score of 50,000 videos goes on where it was cut off.

A folder holds, for each process, the sums of the videos that it has counted and which ones these
are; a file is replaced as a whole. Any number of processes may go on with what others left.
"""

import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from walt_jax.errors import UserError
from walt_jax.evaluation.measures import Measure, State
from walt_jax.progress import bar as progress_bar

logger = logging.getLogger(__name__)
# Of numbers (N,): batches of numbers, their videos and, where they have some, the real ones.
Produce = Callable[[np.ndarray], Iterator[tuple[np.ndarray, ...]]]
_BASE = "sums.npz"
SAVE_EVERY = 60.0  # seconds between two saves


def gather(
    folder: epath.PathLike,
    total: int,
    measures: Mapping[str, Measure],
    produce: Produce,
    *,
    what: str = "score",
    shared: bool = False,
    progress: bool = True,
    save_every: float | None = None,
    beat: Callable[[], None] | None = None,
) -> None:
    """Counts videos 0 to `total` - 1 into fresh measures, over all processes.

    Afterwards every process's measures hold the sums of all. The folder stays, so that what is made
    of the sums can be written before it goes: see `remove`.

    Args:
      folder: for the sums; its name must say what is measured. All processes must see it.
      total: number of videos.
      measures: by names that stay the same.
      produce: makes videos of given numbers, in any batches; each counts where it is yielded.
      what: for the progress bar.
      shared: whether processes make the same videos together, and `produce` yields to each its
        own; otherwise each is asked for numbers of its own.
      progress: show it.
      save_every: seconds between two saves.
      beat: called after each batch, as a sign of life.

    Raises:
      UserError: the folder is not shared, or what `produce` and the measures raise.
    """
    sums = _Sums(epath.Path(folder), total, measures)
    missing = np.flatnonzero(~sums.start())
    index, count = jax.process_index(), jax.process_count()
    mine = missing if shared or count == 1 else np.array_split(missing, count)[index]
    pause, saved = SAVE_EVERY if save_every is None else save_every, time.monotonic()
    here = total - len(missing)
    if here and progress and index == 0:
        logger.info("%s: goes on, %d of %d videos are counted", what, here, total)
    bar = progress_bar(total=len(mine), what=what, unit="video", disable=not progress or index > 0)
    with bar:
        for numbers, *videos in produce(mine) if len(mine) else ():
            for measure in measures.values():
                measure.add(numbers, *videos)
            sums.done[numbers] = True
            bar.update(len(numbers) * (count if shared else 1))
            if beat is not None:
                beat()
            if time.monotonic() - saved >= pause:
                sums.save()
                saved = time.monotonic()
    sums.finish()


def remove(folder: epath.PathLike) -> None:
    """Removes the sums, on the first process, once their score is written."""
    barrier("evaluation-written")
    if jax.process_index() == 0:
        epath.Path(folder).rmtree(missing_ok=True)


class _Sums:
    """This process's measures and its file.

    Attributes:
      done: bool (total,), the videos that they hold.
    """

    def __init__(self, folder: epath.Path, total: int, measures: Mapping[str, Measure]) -> None:
        self._folder, self._measures = folder, measures
        index = jax.process_index()
        self._file = _BASE if index == 0 else f"sums-{index}.npz"
        self.done = np.zeros(total, bool)

    def start(self) -> np.ndarray:
        """Joins what is there into the first process; the videos that are done already."""
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The base first: what it holds of the other files was joined to it before.
            files = sorted(self._folder.glob("sums*.npz"), key=lambda f: (f.name != _BASE, f.name))
            for file in files:
                self._join(file)
            if files:
                self.save()
            for file in files:
                if file.name != _BASE:
                    file.unlink()
        if jax.process_count() == 1:
            return self.done.copy()
        return multihost_utils.broadcast_one_to_all(self.done).astype(bool)

    def save(self) -> None:
        """Replaces this process's file."""
        states = {
            f"{name}/{key}": value
            for name, measure in self._measures.items()
            for key, value in measure.state().items()
        }
        buffer = io.BytesIO()
        np.savez(buffer, done=self.done, **states)
        path = self._folder / self._file
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)

    def finish(self) -> None:
        """Adds the other processes' sums.

        Raises:
          UserError: they cannot be seen.
        """
        if jax.process_count() > 1:
            self.save()
            barrier("evaluation-counted")
            for file in sorted(self._folder.glob("sums*.npz")):
                if file.name != self._file:
                    self._join(file)
        if not self.done.all():
            raise UserError(
                f"{self._folder} holds {self.done.sum()} of {len(self.done)} videos: it must lie "
                "on a file system that all processes share."
            )

    def _join(self, file: epath.Path) -> None:
        states: dict[str, State] = {name: {} for name in self._measures}
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
                done = arrays["done"]
                for key in arrays.files:
                    name, _, part = key.partition("/")
                    if part:
                        states[name][part] = arrays[key]
            if done.shape != self.done.shape:
                raise ValueError("of another number of videos")
        except Exception as error:  # a damaged zip file raises whatever NumPy trips over
            logger.warning("%s is damaged (%s): its videos are counted again", file, error)
            return
        if (done & self.done).any():  # joined before, by a job that was killed then
            return
        self.done |= done
        for name, measure in self._measures.items():
            measure.absorb(states[name])


def anywhere(flag: bool) -> bool:
    """Whether it is so on any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
