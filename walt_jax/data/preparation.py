"""From sources to a dataset of video records: what `python -m walt_jax.prepare` does."""

import contextlib
import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from walt_jax.data import video
from walt_jax.data.records import VIDEO_FEATURES, DatasetWriter
from walt_jax.data.sources import Source, find_sources
from walt_jax.errors import UserError
from walt_jax.progress import bar as progress_bar

MAX_SECONDS = 20.0  # a record is read whole, for 17 of its frames too
_SOURCES_PER_SHARD, _MAX_SHARDS = 8, 1024


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What became of the sources; `report.json` in the dataset holds the same.

    Attributes:
      sources, records, frames: how many there were of each.
      skipped: for each source not, or not wholly, in the dataset its `source` name, the `reason`
        and `records_kept`, how many records were written before it failed.
    """

    sources: int
    records: int
    frames: int
    skipped: tuple[dict[str, Any], ...]


def prepare_dataset(
    source: str | Path,
    directory: str | Path,
    *,
    label_from_folder: bool = False,
    label_from_name: bool = False,
    label_regex: str | None = None,
    short_side: int | None = None,
    max_seconds: float = MAX_SECONDS,
    shards: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> PrepareReport:
    """Decodes every video of an input and writes a dataset of `VIDEO_FEATURES` records.

    Records are in the order of the sources and the files' bytes depend on the input and the
    options only, not on the number of workers. Memory holds one encoded record a worker.

    Args:
      source: folder, file, glob, manifest or tfds:NAME; see `walt_jax.data.sources`. So are the
        three label options. Label ids follow the sorted names, numbers by value.
      directory: where the dataset will be; see `DatasetWriter`.
      short_side: shrink to this many pixels on the shorter side; nothing is enlarged.
      max_seconds: a longer source becomes several records of equal length.
      shards: number of files (fewer if there are fewer sources); by default one for 8 sources, at
        most 1024. Each is written by one worker.
      workers: threads (decoding and encoding happen outside Python's lock); by default one a core.
      overwrite: replace a dataset that is there.
      progress: show a progress bar.

    Raises:
      UserError: a bad input or option, the directory is taken, or no source could be decoded.
    """
    for option, value in (("short-side", short_side), ("shards", shards), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1, got {value}: give a larger one.")
    if not max_seconds > 0:
        raise UserError(f"--max-seconds must be above 0, got {max_seconds:g}: give a larger one.")
    sources = find_sources(
        source,
        label_from_folder=label_from_folder,
        label_from_name=label_from_name,
        label_regex=label_regex,
    )
    names = sorted({s.label for s in sources if s.label is not None}, key=_label_order)
    label_ids = {name: i for i, name in enumerate(names)} | {None: -1}
    shards = min(shards or math.ceil(len(sources) / _SOURCES_PER_SHARD), len(sources), _MAX_SHARDS)
    options = {"short_side": short_side, "max_seconds": max_seconds}
    stop = threading.Event()

    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            DatasetWriter(
                directory,
                VIDEO_FEATURES,
                description=f"Videos prepared by walt_jax from {Path(str(source)).name}.",
                metadata={"kind": "videos", "label_names": names, "options": options},
                overwrite=overwrite,
            )
        )
        bar = stack.enter_context(
            progress_bar(total=len(sources), what="prepare", unit="video", disable=not progress)
        )

        def write_shard(shard: int) -> tuple[int, int, list[dict[str, Any]]]:
            records, frames, skipped = 0, 0, []
            bounds = [len(sources) * i // shards for i in (shard, shard + 1)]
            for item in sources[slice(*bounds)]:
                kept = 0
                try:
                    for record in _records(item, label_ids[item.label], short_side, max_seconds):
                        if stop.is_set():
                            return records, frames, skipped
                        writer.write(record, shard)
                        kept += 1
                        frames += record["num_frames"]
                except UserError as error:
                    skipped.append(
                        {"source": item.name, "reason": str(error), "records_kept": kept}
                    )
                records += kept
                bar.update()
            writer.close_shard(shard)
            return records, frames, skipped

        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            try:
                results = list(pool.map(write_shard, range(shards)))
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        skipped = tuple(entry for result in results for entry in result[2])
        report = PrepareReport(
            sources=len(sources),
            records=sum(result[0] for result in results),
            frames=sum(result[1] for result in results),
            skipped=skipped,
        )
        if report.records == 0:
            raise UserError(
                f"none of the {len(sources)} videos of {source} can be decoded; the first: "
                f"{skipped[0]['reason']}"
            )
        text = json.dumps(dataclasses.asdict(report), indent=2)
        (writer.partial / "report.json").write_text(text + "\n")
    return report


def _label_order(name: str) -> tuple[bool, int, str]:
    """Numbers in the order of their value, before words."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _records(
    source: Source, label: int, short_side: int | None, max_seconds: float
) -> Iterator[dict[str, Any]]:
    """Yields the records of a source; each holds at most `max_seconds`, none more than encoded."""
    frames, duration, digest = source.read(short_side)
    # Equal pieces, by the header's word, leave no scrap of a frame or two at the end.
    span = duration / math.ceil(duration / max_seconds) if duration > max_seconds else max_seconds
    base = {"label": label, "caption": source.caption, "source": source.name, "sha256": digest}
    times, coded, size, pieces = [], [], (0, 0), 1
    for time, frame in frames:
        if times and time >= pieces * span:
            yield _record(times, coded, size, source.start, base)
            times, coded = [], []
            pieces = math.floor(time / span) + 1
        times.append(time)
        coded.append(video.encode_frame(frame))
        size = frame.shape[:2]
    if not times:
        raise UserError(f"{source.name} has no frame: leave it out.")
    yield _record(times, coded, size, source.start, base)


def _record(
    times: list[float],
    coded: list[np.ndarray],
    size: tuple[int, int],
    start: float,
    base: dict[str, Any],
) -> dict[str, Any]:
    fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0
    return base | {
        "payload": np.concatenate(coded),
        "offsets": np.cumsum([0, *map(len, coded)], dtype=np.int64),
        "timestamps": np.array(times) - times[0],
        "fps": fps,
        "duration": len(times) / fps,
        "width": size[1],
        "height": size[0],
        "num_frames": len(times),
        "start": start + times[0],
    }
