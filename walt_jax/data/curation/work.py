"""One part of a preparation, from its sources to its records: what a Beam worker does.

Pixels never leave the worker: what goes between workers is the number of a part.
"""

import collections
import dataclasses
import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from walt_jax.data import stores
from walt_jax.data.curation import scores
from walt_jax.data.curation.config import EndpointConfig, PrepareConfig, endpoint_settings
from walt_jax.data.curation.cutting import Clip, cut_clips
from walt_jax.data.parts import PartStore
from walt_jax.data.records import VIDEO_FEATURES
from walt_jax.data.source_kinds import FileSource, Source, from_json, to_json
from walt_jax.errors import UserError

SOURCES = "sources.jsonl"
LAST = "metadata.json"  # of what is uploaded, so that a part that has it is whole
Note = dict[str, Any]


def features(config: PrepareConfig) -> tfds.features.FeaturesDict:
    """What a record holds: that of `VIDEO_FEATURES`, and a column for every score."""
    extra = scores.columns(config.scores)
    if config.cut.detector != "none":
        extra["scene"] = tfds.features.Scalar(np.int64)  # number of the scene in its source
    return tfds.features.FeaturesDict({**VIDEO_FEATURES, **extra})


@dataclasses.dataclass(frozen=True)
class Work:
    """Everything that a worker needs besides the number of its part; small, and picklable.

    Attributes:
      config: what is made of the sources.
      label_ids: class name -> number.
      folder: of the parts, or the URL of one; it holds `sources.jsonl`, one part a line.
      settings: of the parts, as `PartStore` has them.
    """

    config: PrepareConfig
    label_ids: dict[str, int]
    folder: str
    settings: dict[str, Any]

    def __call__(self, part: int, offset: int, stop: threading.Event | None = None) -> Note:
        """Makes the part whose sources are listed at byte `offset`; returns its note.

        Once `stop` is set it gives up, leaves nothing and raises InterruptedError.

        Raises:
          UserError: the endpoint of the captions or a model fails. Sources that cannot be decoded
            are in the note.
        """
        with stores.open_file(stores.join(self.folder, SOURCES)) as file:
            file.seek(offset)
            sources = [from_json(values) for values in json.loads(file.readline())]
        note: Note = {"sources": len(sources), "records": 0, "frames": 0}
        note |= {"skipped": [], "dropped": [], "refused": []}
        examples = self._examples(sources, note, stop)
        if not stores.is_remote(self.folder):
            self._store(Path(self.folder)).write(part, examples, note)
            return note
        with tempfile.TemporaryDirectory(prefix="walt_jax-") as scratch:
            store = self._store(Path(scratch))
            store.write(part, examples, note)
            made = store.path(part)
            stores.upload(made, f"{self.folder}/{made.name}", last=LAST)
        return note

    def _store(self, folder: Path) -> PartStore:
        return PartStore(folder, features(self.config), self.settings)

    def _examples(
        self, sources: Iterable[Source], note: Note, stop: threading.Event | None
    ) -> Iterator[dict[str, Any]]:
        """The records in their order, while captions of the next ones are asked for."""
        endpoint = self.config.captions.endpoint
        limit = endpoint.concurrency if endpoint else 0
        waiting: collections.deque[tuple[Source, Clip, str, str | Future]] = collections.deque()
        ask = _captioner(endpoint) if endpoint else None
        with ThreadPoolExecutor(max(1, limit)) as pool:
            for source, clip, digest, caption in self._clips(sources, note):
                if stop is not None and stop.is_set():
                    raise InterruptedError
                answer = pool.submit(ask, clip) if ask and not caption else caption
                waiting.append((source, clip, digest, answer))
                if len(waiting) > limit:
                    yield self._example(*waiting.popleft(), note)
            while waiting:
                yield self._example(*waiting.popleft(), note)

    def _clips(
        self, sources: Iterable[Source], note: Note
    ) -> Iterator[tuple[Source, Clip, str, str]]:
        config = self.config
        for source in sources:
            kept = 0
            try:
                caption = source.caption
                if not caption and config.captions.sidecar and isinstance(source, FileSource):
                    caption = _sidecar(source.path, config.captions.sidecar)
                frames, duration, digest = source.read(config.short_side)
                for clip in cut_clips(frames, duration, config.cut):
                    if clip.kept:
                        yield source, clip, digest, caption
                        kept += 1
                    else:
                        left = f"{clip.seconds:.2f} s are left of its scene {clip.scene}, less than"
                        reason = f"{left} min_clip_seconds"
                        note["dropped"].append(
                            {"source": source.name, "start": clip.times[0], "reason": reason}
                        )
            except UserError as error:
                entry = {"source": source.name, "reason": str(error), "records_kept": kept}
                note["skipped"].append(entry)

    def _example(
        self, source: Source, clip: Clip, digest: str, answer: str | Future, note: Note
    ) -> dict[str, Any]:
        caption = answer
        if isinstance(answer, Future):
            result = answer.result()
            caption = result.text
            if result.refusal:
                note["refused"].append(
                    {"source": source.name, "start": clip.times[0], "reason": result.refusal}
                )
        times = np.array(clip.times)
        note["records"] += 1
        note["frames"] += len(times)
        scene = {"scene": clip.scene} if self.config.cut.detector != "none" else {}
        return {
            "payload": np.concatenate(clip.coded),
            "offsets": np.cumsum([0, *map(len, clip.coded)], dtype=np.int64),
            "timestamps": times - times[0],
            "fps": clip.fps,
            "duration": clip.seconds,
            "width": clip.size[1],
            "height": clip.size[0],
            "num_frames": len(times),
            "caption": caption,
            "label": self.label_ids.get(source.label, -1),
            "source": source.name,
            "start": source.start + clip.times[0],
            "sha256": digest,
            **scene,
            **scores.score(clip, caption, self.config.scores),
        }


def _captioner(endpoint: EndpointConfig) -> Callable[[Clip], Any]:
    from walt_jax.data.curation.captions import captioner  # an HTTP client that few runs need

    return captioner(endpoint, *endpoint_settings(endpoint))


def _sidecar(path: Path | str, extension: str) -> str:
    """The text beside a video, `clip.txt` or `clip.mp4.txt`; "" where there is none."""
    stem, name = str(path).rpartition(".")[0], str(path)
    for candidate in (stem + extension, name + extension):
        if stores.exists(candidate):
            return stores.read_text(candidate).strip()
    return ""


def write_sources(folder: Path | str, sources: list[Source], parts: int) -> list[int]:
    """Lists the sources of every part in `folder`; returns the byte where each part's begin."""
    offsets, text = [], b""
    for part in range(parts):
        bounds = [len(sources) * i // parts for i in (part, part + 1)]
        offsets.append(len(text))
        text += json.dumps([to_json(s) for s in sources[slice(*bounds)]]).encode() + b"\n"
    with stores.open_file(stores.join(folder, SOURCES), "wb") as file:
        file.write(text)
    return offsets
