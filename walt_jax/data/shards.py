"""The files of a dataset while they are written."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter


class Shard:
    """One file of records, with what the dataset wants to know about them."""

    def __init__(self, path: Path, rows: Iterable[Sequence] = (), digests: Iterable[bytes] = ()):
        self.path, self.rows, self.digests = path, list(rows), list(digests)
        self._writer: ArrayRecordWriter | None = None

    def write(self, data: bytes, row: Sequence) -> None:
        if self._writer is None:
            # Payloads are compressed already; one record a group makes random access one read.
            self._writer = ArrayRecordWriter(str(self.path), "group_size:1,uncompressed")
        self._writer.write(data)
        self.rows.append(row)
        self.digests.append(hashlib.sha256(data).digest())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
