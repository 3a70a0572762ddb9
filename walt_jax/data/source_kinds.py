"""The kinds of sources: a file, a member of a tar, an example of a TFDS dataset; as JSON too, as
which they travel to the workers."""

import contextlib
import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from walt_jax.data import stores, video
from walt_jax.errors import UserError


class Reading(NamedTuple):
    """An opened source.

    Attributes:
      frames: (seconds from the first frame, uint8 (H, W, 3) sRGB); raises UserError on the way.
      duration: seconds, by what is known before decoding; 0.0 where nothing is.
      sha256: hex, of the file's bytes, or of the frames' bytes where there is no file.
    """

    frames: Iterator[tuple[float, np.ndarray]]
    duration: float
    sha256: str


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A video file, or the part of it from `start` to `end` seconds; or an image, one frame.

    Attributes:
      path: local, or the URL of a store.
      name: unique in its input; the path relative to it.
      label: class name or None.
    """

    path: Path | str
    name: str
    caption: str = ""
    label: str | None = None
    start: float = 0.0
    end: float | None = None

    def read(self, short_side: int | None) -> Reading:
        """Opens the file; raises UserError where it is neither a video nor an image."""
        with contextlib.ExitStack() as stack:
            local = stack.enter_context(stores.local_copy(self.path))
            with _named(local, self.path):
                reading = _read(local, self.start, self.end, short_side)
            return _until_read(reading, local, self.path, stack.pop_all())


@dataclasses.dataclass(frozen=True)
class TarSource:
    """A video or image in a tar, as WebDataset packs them.

    Attributes:
      tar: path or URL; offset, size: where in it the bytes lie; suffix: of the member's name.
      name, caption, label: as of `FileSource`.
    """

    tar: str
    offset: int
    size: int
    suffix: str
    name: str
    caption: str = ""
    label: str | None = None
    start: float = 0.0

    def read(self, short_side: int | None) -> Reading:
        """Reads the member's bytes; errors as of `FileSource`."""
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="walt_jax-"))
            local = Path(folder) / f"member{self.suffix}"
            with stores.open_file(self.tar) as tar:
                tar.seek(self.offset)
                local.write_bytes(tar.read(self.size))
            if local.stat().st_size != self.size:
                raise UserError(f"{self.tar} is truncated within {self.name}: fetch it again.")
            with _named(local, self.name):
                reading = _read(local, 0.0, None, short_side)
            return _until_read(reading, local, self.name, stack.pop_all())


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """An example of a TFDS dataset.

    Attributes:
      dataset: name, or directory of a prepared one; split, index: which example.
      feature: name of its Video or Image feature.
      fps: frames a second.
      name, caption, label: as of `FileSource`.
    """

    dataset: str
    split: str
    index: int
    feature: str
    fps: float
    name: str
    caption: str = ""
    label: str | None = None
    start: float = 0.0

    def read(self, short_side: int | None) -> Reading:
        """Decodes the example."""
        example = open_tfds(self.dataset)[self.split][self.index]
        frames = np.asarray(example[self.feature])
        frames = np.stack([_rgb(f) for f in (frames if frames.ndim == 4 else frames[None])])
        timed = ((i / self.fps, video.shrink(f, short_side)) for i, f in enumerate(frames))
        duration = len(frames) / self.fps if len(frames) > 1 else 0.0
        return Reading(timed, duration, hashlib.sha256(frames.tobytes()).hexdigest())


Source = FileSource | TarSource | TfdsSource
_KINDS = {"file": FileSource, "tar": TarSource, "tfds": TfdsSource}


def to_json(source: Source) -> dict[str, Any]:
    """A source as JSON values."""
    (kind,) = (name for name, cls in _KINDS.items() if type(source) is cls)
    values = dataclasses.asdict(source)
    return {"kind": kind} | {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def from_json(values: dict[str, Any]) -> Source:
    """The source that `to_json` made these of."""
    values = dict(values)
    return _KINDS[values.pop("kind")](**values)


@functools.lru_cache(maxsize=8)
def open_tfds(name: str) -> dict[str, Any]:
    """All splits of NAME, or the one of NAME/SPLIT; NAME is a dataset's name or directory."""
    head, _, split = name.rpartition("/")
    if Path(name).is_dir():
        splits = tfds.builder_from_directory(name).as_data_source()
    elif head and Path(head).is_dir():
        splits = {split: tfds.builder_from_directory(head).as_data_source(split=split)}
    else:
        try:
            splits = tfds.data_source(name)
        except Exception:  # TFDS raises whatever it trips over
            if not head or split in tfds.builder_cls(head).builder_configs:
                raise
            splits = {split: tfds.data_source(head, split=split)}
    return splits if isinstance(splits, dict) else {"all": splits}


def _read(path: Path, start: float, end: float | None, short_side: int | None) -> Reading:
    if path.suffix.lower() in video.IMAGES:
        if start or end is not None:
            raise UserError(f"{path} is an image, which has no start and end: leave them out.")
        frames = iter([(0.0, video.read_image(path, short_side))])
        return Reading(frames, 0.0, _sha256(path))
    length = video.probe(path).duration
    until = length if end is None else min(end, length or end)
    frames = video.iter_frames(path, start=start, end=end, short_side=short_side, threads=1)
    return Reading(frames, max(0.0, until - start), _sha256(path))


def _until_read(
    reading: Reading, local: Path, known: str | Path, stack: contextlib.ExitStack
) -> Reading:
    """The reading, whose temporary file stays until its frames are read or given up."""

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        with stack, _named(local, known):
            yield from reading.frames

    return reading._replace(frames=frames())


@contextlib.contextmanager
def _named(local: Path, known: str | Path) -> Iterator[None]:
    """Errors name a source as the user knows it, not its temporary copy."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(local), str(known))) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rgb(frame: np.ndarray) -> np.ndarray:
    return np.broadcast_to(frame, (*frame.shape[:2], 3)).astype(np.uint8, copy=False)
