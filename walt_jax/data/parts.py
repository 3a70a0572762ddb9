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

import jax
import numpy as np
import tensorflow_datasets as tfds
from jax.experimental import multihost_utils

from walt_jax.config import differences
from walt_jax.data.directories import check_free, empty_directory, lock_directory
from walt_jax.data.records import Dataset, DatasetWriter, open_dataset
from walt_jax.errors import UserError

logger = logging.getLogger(__name__)
_PLAN = "plan.json"
_MESSAGE = 2**16  # bytes; what is broadcast has one shape on all processes


class Parts:
    """The parts of a dataset, as one of the processes that write them sees them.

    A context manager: on entry the first process claims the folder, or finds the parts of an
    earlier run in it; the others wait for that.

    Attributes:
      mine: the numbers of the parts that this process writes, a range.
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
        self._folder = self.directory.with_name(self.directory.name + ".parts")
        self._plan = self._folder / _PLAN
        self._features, self._overwrite = features, overwrite
        self._settings = json.loads(json.dumps(settings))  # as they come back: lists for tuples
        self._paths = [self._folder / f"{i:05d}" for i in range(num_parts)]
        index, count = process
        self._first = index == 0
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
        error, settings, self._joined = _broadcast([error, self._settings, self._joined])
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
        return [] if self._joined else [i for i in self.mine if not self._is_whole(self._paths[i])]

    def write(self, part: int, examples: Iterable[Mapping[str, Any]]) -> None:
        """Writes a part; it is there when all of it is."""
        metadata = {"settings": self._settings}
        with DatasetWriter(
            self._paths[part], self._features, metadata=metadata, overwrite=True
        ) as writer:
            for example in examples:
                writer.write(example)

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
        left = self._paths

        def complete() -> bool:
            nonlocal left
            left = [path for path in left if not self._is_whole(path)]
            return not left

        _wait(complete, "the other processes")
        kwargs["overwrite"] = self._overwrite
        with DatasetWriter(self.directory, self._features, **kwargs) as writer:
            for path in self._paths:
                writer.add(open_dataset(path))
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
            logger.info("goes on: %d of %d shards are there", len(found), len(self._paths))
            return
        empty_directory(self._folder)
        plan = {"settings": self._settings, "overwrite": self._overwrite, "id": uuid.uuid4().hex}
        temporary = self._plan.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan, indent=2) + "\n")
        temporary.replace(self._plan)

    def _is_whole(self, path: Path) -> bool:
        try:
            return open_dataset(path).metadata.get("settings") == self._settings
        except UserError:
            return False

    def _changes(self, settings: Mapping[str, Any]) -> str:
        diff = differences(settings, self._settings)
        return "; ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in diff.items())


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
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode().ljust(_MESSAGE, b"\0")
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    return json.loads(received.astype(np.uint8).tobytes().rstrip(b"\0"))
