"""The preparation's one Beam transform; imported only where Beam runs."""

from collections.abc import Iterator

import apache_beam as beam
from apache_beam.metrics import Metrics

from walt_jax.data import stores
from walt_jax.data.curation.work import Work
from walt_jax.errors import UserError


class MakePart(beam.DoFn):
    """(part, offset) -> (part, its number of records), once the part is written."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._records = Metrics.counter("walt_jax", "records")
        self._skipped = Metrics.counter("walt_jax", "skipped_sources")

    def process(self, item: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """A UserError is left in the folder of the parts, where the driver finds its sentence."""
        part = item[0]
        try:
            note = self._work(*item)
        except UserError as error:
            path = stores.join(stores.join(self._work.folder, "errors"), f"{part:05d}")
            with stores.open_file(path, "w", auto_mkdir=True) as file:
                file.write(str(error))
            return
        self._records.inc(note["records"])
        self._skipped.inc(len(note["skipped"]))
        yield part, note["records"]
