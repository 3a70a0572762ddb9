"""Progress of long work: a live bar on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any

import tqdm


def bar(items: Iterable[Any] | None = None, *, what: str, unit: str, **options: Any) -> tqdm.tqdm:
    """A tqdm bar; where stderr is no terminal it is drawn every 10 seconds and at the end."""
    calm = {} if sys.stderr.isatty() else {"mininterval": 10.0, "maxinterval": 10.0}
    return tqdm.tqdm(items, desc=what, unit=unit, **calm, **options)
