"""What happens to a record that cannot be decoded: another takes its place, and it is counted.

Which one depends on the batch alone, so batch k is the same at every reading, on any number of
hosts, also where records of it are broken.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from walt_jax.data.feeding import HostBatch
from walt_jax.data.records import BrokenRecord
from walt_jax.errors import UserError

logger = logging.getLogger(__name__)
_BROKEN = "broken"  # beside a clip's arrays, from the process that decodes to the one that counts
_BATCHES = 64  # in which a replacement is looked for


class Replacing:
    """Reads the rows of batches; of a broken one the next row of the batch, then of later ones.

    The clip is cut at the time that was drawn for the row, whatever record it is cut from.
    """

    def __init__(self, read: Callable[[Any], dict[str, Any]], plan: Callable[[int], Any]) -> None:
        """`read` decodes a row, which names its `record`, `bucket` and `seed`; `plan` its batch."""
        self._read, self._plan = read, plan

    def __call__(self, row: Any) -> dict[str, Any]:
        """The row's arrays, and what was broken on the way.

        Raises:
          UserError: no record near by can be decoded.
        """
        said = []
        for record in itertools.chain([row.record], self._others(row)):
            try:
                clip = self._read(dataclasses.replace(row, record=record))
            except BrokenRecord as error:
                said.append((error.key, str(error)))
                continue
            return clip | {_BROKEN: json.dumps(said) if said else ""}
        raise UserError(f"{said[0][1]} Neither can the {len(said) - 1} records in its place.")

    def _others(self, row: Any) -> Iterator[Any]:
        k, number = row.seed[-2:]
        for later in range(_BATCHES):
            bucket, records = self._plan(k + later)
            if bucket == row.bucket:
                own = later == 0
                yield from (records[(number + i) % len(records)] for i in range(own, len(records)))


class BrokenRecords:
    """Counts the broken records that batches met, says each once, and stops at too many.

    Attributes:
      reasons: what names a record -> why it could not be decoded.
    """

    def __init__(self, directory: str, records: int, most: float) -> None:
        """`most` is the share of `records` that may be broken."""
        self._directory, self._records, self._most = directory, records, most
        self.reasons: dict[str, str] = {}

    def counted(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        """The batches, without what was said beside them.

        Raises:
          UserError: more records are broken than may be.
        """
        try:
            for batch in batches:
                for text in filter(None, batch.pop(_BROKEN).ravel().tolist()):
                    for key, reason in json.loads(text):
                        self._add(key, reason)
                yield batch
        finally:
            batches.close()

    def _add(self, key: str, reason: str) -> None:
        if key in self.reasons:
            return
        self.reasons[key] = reason
        logger.warning("%s Another record takes its place.", reason)
        if len(self.reasons) > self._most * self._records:
            raise UserError(
                f"{len(self.reasons)} of the {self._records} records of {self._directory} cannot "
                f"be decoded, more than config.data.max_broken={self._most:g} allows; the last: "
                f"{reason}"
            )
