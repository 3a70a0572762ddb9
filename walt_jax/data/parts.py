"""A dataset written part by part, by any number of processes, going on where it was interrupted.

While DIRECTORY is being written, each part is a small dataset of one shard in the sibling folder
`DIRECTORY.parts`, which appears under its name only when it is whole; `plan.json` beside the parts
holds the settings that they depend on. When all are there, the first process joins them and removes
the folder. The dataset keeps a copy of the plan: a folder whose plan it has needs only be removed.
"""

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from walt_jax.config import differences
from walt_jax.data.directories import check_free, empty_directory, lock_directory
from walt_jax.data.records import Dataset, open_dataset
from walt_jax.data.writer import DatasetWriter
from walt_jax.errors import UserError

logger = logging.getLogger(__name__)
_PLAN = "plan.json"
_MESSAGE = 2**16  # bytes; what is broadcast has one shape on all processes


class PartStore:
    """The folder of the parts; what a process on any machine needs to write one of them.

    Attributes:
      folder: where they lie.
      settings: JSON values; a part written with others does not count.
    """

    def __init__(
        self, folder: Path, features: tfds.features.FeaturesDict, settings: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))  # as they come back: lists for tuples
        self._features = features

    def path(self, part: int) -> Path:
        """Where a part is."""
        return self.folder / f"{part:05d}"

    def write(
        self,
        part: int,
        examples: Iterable[Mapping[str, Any]],
        note: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a part; it is there when all of it is.

        Args:
          part: its number.
          examples: its records.
          note: JSON values to keep with it, which may be filled while the examples come; a part
            that has a note may have no example.
        """
        metadata = {"settings": self.settings, "note": note}
        with DatasetWriter(
            self.path(part),
            self._features,
            metadata=metadata,
            overwrite=True,
            may_be_empty=note is not None,
        ) as writer:
            for example in examples:
                writer.write(example)

    def is_whole(self, part: int) -> bool:
        """Whether a part is there, all of it, with these settings."""
        try:
            return open_dataset(self.path(part)).metadata.get("settings") == self.settings
        except UserError:
            return False

    def note(self, part: int) -> dict[str, Any]:
        """What was noted with a part."""
        return open_dataset(self.path(part)).metadata["note"]


class Parts:
    """The parts of a dataset, as one of the processes that write them sees them.

    A context manager: on entry the first process claims the folder, or finds the parts of an
    earlier run in it; the others wait for that.

    Attributes:
      mine: the numbers of the parts that this process writes, a range.
      store: where they are written, from any process.
    """

    def __init__(
        self,
        directory: str | Path,
        features: tfds.features.FeaturesDict,
        num_parts: int,
        settings: Mapping[str, Any],
        *,
        process: tuple[int, int] = (0, 1),
        overwrite: bool = False,
    ) -> None:
        """Nothing is read or written yet.

        Args:
          directory: where the dataset will be.
          features: what a record holds.
          num_parts: how many parts there are.
          settings: JSON values; parts written with others are not mixed with these.
          process: which of how many this is; each writes a run of consecutive parts.
          overwrite: replace a dataset in `directory`, and begin anew.
        """
        self.directory = Path(directory).absolute()
        self._folder = parts_folder(self.directory)
        self._plan = self._folder / _PLAN
        self._features, self._overwrite, self._num_parts = features, overwrite, num_parts
        self.store = PartStore(self._folder, features, settings)
        self._settings = self.store.settings
        index, count = process
        self._first, self._alone = index == 0, count == 1
        self.mine = range(num_parts * index // count, num_parts * (index + 1) // count)

    def __enter__(self) -> "Parts":
        """Raises UserError if the directory is taken or being written, or of other settings.

        Every process raises what the first one does.
        """
        self._lock, self._joined, error = None, False, ""
        if self._first:
            try:
                self._begin()
            except UserError as e:
                error = str(e)
        shared = [error, self._settings, self._joined]
        error, settings, self._joined = shared if self._alone else _broadcast(shared)
        if error:
            raise UserError(error)
        if diff := self._changes(settings):
            raise UserError(f"the first process has other settings ({diff}): give all the same.")
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def missing(self) -> list[int]:
        """Those of `mine` that are not there, or damaged."""
        return [] if self._joined else [i for i in self.mine if not self.store.is_whole(i)]

    def write(self, part: int, examples: Iterable[Mapping[str, Any]]) -> None:
        """Writes a part; it is there when all of it is."""
        self.store.write(part, examples)

    @property
    def joined(self) -> bool:
        """Whether the dataset is there already, and only its parts are still to be removed."""
        return self._joined

    def discard(self) -> None:
        """Removes the parts."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def finish(self, **kwargs: Any) -> Dataset:
        """Waits for the other processes' parts and makes them the dataset.

        Args:
          **kwargs: `name`, `description` and `metadata` for `DatasetWriter`.
        """
        if self._first:
            if not self._joined:
                self._join(**kwargs)
            self._plan.unlink()  # first: a folder without it holds nothing to go on with
            shutil.rmtree(self._folder, ignore_errors=True)
        _wait(lambda: not self._plan.exists(), "the first process to join the parts")
        return open_dataset(self.directory)

    def _join(self, **kwargs: Any) -> None:
        left = list(range(self._num_parts))

        def complete() -> bool:
            nonlocal left
            left = [part for part in left if not self.store.is_whole(part)]
            return not left

        _wait(complete, "the other processes")
        kwargs["overwrite"] = self._overwrite
        with DatasetWriter(self.directory, self._features, **kwargs) as writer:
            for part in map(self.store.path, range(self._num_parts)):
                writer.add(open_dataset(part))
            shutil.copy(self._plan, writer.partial / _PLAN)

    def _begin(self) -> None:
        found = [path.name for path in self._folder.glob("*") if path.name.isdecimal()]
        resumes = self._plan.exists() and bool(found) and not self._overwrite
        if resumes:
            plan = json.loads(self._plan.read_text())
            if diff := self._changes(plan["settings"]):
                raise UserError(
                    f"{self._folder} was begun with other settings ({diff}): give those to go on, "
                    "--overwrite to begin anew, or another --output."
                )
            # What was begun with --overwrite goes on without.
            self._overwrite = plan["overwrite"]
            kept = self.directory / _PLAN
            self._joined = kept.exists() and json.loads(kept.read_text()) == plan
        if not self._joined:
            check_free(self.directory, self._overwrite)
        self._lock = lock_directory(self._folder)
        if resumes:
            logger.info("goes on: %d of %d shards are there", len(found), self._num_parts)
            return
        empty_directory(self._folder)
        plan = {"settings": self._settings, "overwrite": self._overwrite, "id": uuid.uuid4().hex}
        temporary = self._plan.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan, indent=2) + "\n")
        temporary.replace(self._plan)

    def _changes(self, settings: Mapping[str, Any]) -> str:
        diff = differences(settings, self._settings)
        return "; ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in diff.items())


def parts_folder(directory: Path) -> Path:
    """Where the parts of a dataset lie until it is whole."""
    return directory.with_name(directory.name + ".parts")


def begun_with(directory: Path) -> dict[str, Any] | None:
    """The settings of what was begun and not finished for a dataset; None if nothing was."""
    try:
        return json.loads((parts_folder(directory) / _PLAN).read_text())["settings"]
    except (OSError, ValueError, KeyError):
        return None


def _wait(condition: Callable[[], bool], what: str) -> None:
    """Looks again and again: what processes share is a file system, however late it tells."""
    said, pause = False, 0.05
    while not condition():
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
        if pause == 2.0 and not said:
            said = True
            logger.info(
                "waits for %s (--output must lie on a file system that all processes share)", what
            )


def _broadcast(value: Any) -> Any:
    """The first process's JSON value, on every process."""
    import jax  # `prepare` and its workers do without
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode().ljust(_MESSAGE, b"\0")
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    return json.loads(received.astype(np.uint8).tobytes().rstrip(b"\0"))
