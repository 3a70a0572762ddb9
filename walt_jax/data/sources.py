"""What to prepare: finds the videos and images behind `--input`; names, captions, labels them.

An input is a folder (searched recursively), one file, a glob, a CSV or JSONL manifest, or
`tfds:NAME[/SPLIT]` with a TFDS dataset's name or directory that has a Video feature.
"""

import csv
import dataclasses
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from walt_jax.data import video
from walt_jax.errors import UserError

MANIFEST_COLUMNS = ("path", "caption", "label", "start", "end")
TFDS_FPS = 25.0  # TFDS's Video feature has no times; used where there is no `fps` feature either


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
      name: unique in its input; the path relative to it.
      label: class name or None.
    """

    path: Path
    name: str
    caption: str = ""
    label: str | None = None
    start: float = 0.0
    end: float | None = None

    def read(self, short_side: int | None) -> Reading:
        """Opens the file; raises UserError where it is neither a video nor an image."""
        if self.path.suffix.lower() in video.IMAGES:
            frames = iter([(0.0, video.read_image(self.path, short_side))])
            return Reading(frames, 0.0, self._sha256())
        length = video.probe(self.path).duration
        end = length if self.end is None else min(self.end, length or self.end)
        frames = video.iter_frames(
            self.path, start=self.start, end=self.end, short_side=short_side, threads=1
        )
        return Reading(frames, max(0.0, end - self.start), self._sha256())

    def _sha256(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One example of a TFDS dataset. Attributes as in `FileSource`; `load` decodes its frames."""

    load: Callable[[], np.ndarray]
    fps: float
    name: str
    caption: str = ""
    label: str | None = None
    start: float = 0.0

    def read(self, short_side: int | None) -> Reading:
        """Decodes the example."""
        frames = self.load()
        timed = ((i / self.fps, video.shrink(f, short_side)) for i, f in enumerate(frames))
        return Reading(timed, len(frames) / self.fps, hashlib.sha256(frames.tobytes()).hexdigest())


Source = FileSource | TfdsSource


def find_sources(
    source: str | Path,
    *,
    label_from_folder: bool = False,
    label_from_name: bool = False,
    label_regex: str | None = None,
) -> list[Source]:
    """Lists the videos and images of an input, in an order that depends on nothing but the input.

    Args:
      source: see the module's docstring. A manifest's columns are path, caption, label, start and
        end (seconds); only path is needed, and it is relative to the manifest.
      label_from_folder: the parent folder's name is the label.
      label_from_name: the file's name without its extension is the label.
      label_regex: the first group of this pattern, searched in the name, is the label.

    Raises:
      UserError: nothing there, a bad manifest line, or a label rule that does not apply.
    """
    text = str(source)
    rules = [label_from_folder, label_from_name, label_regex is not None]
    if sum(rules) > 1:
        raise UserError(
            "--label-from-folder, --label-from-name and --label-regex exclude each other: give one."
        )
    path = Path(text)
    if text.startswith("tfds:"):
        sources = _from_tfds(text.removeprefix("tfds:"))
    elif path.is_dir():
        sources = _from_folder(path)
    elif path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        sources = _from_manifest(path)
    elif path.is_file():
        sources = [FileSource(path, path.name)]
    elif glob.has_magic(text):
        sources = _from_glob(text)
    else:
        raise UserError(f"--input {text} does not exist: give a folder, file, glob or tfds:NAME.")
    if not sources:
        raise UserError(
            f"--input {text} holds no video or image: check the path and the files' extensions."
        )
    if not any(rules):
        return sources
    return [_labelled(s, label_from_folder, label_regex) for s in sources]


def _labelled(source: Source, from_folder: bool, regex: str | None) -> Source:
    if not isinstance(source, FileSource):
        raise UserError(f"{source.name} is no file: labels by name are for files, leave them out.")
    if from_folder:
        label = source.path.absolute().parent.name
    elif regex is None:
        label = source.path.stem
    else:
        try:
            match = re.search(regex, source.name)
            label = match.group(1) if match else None
        except (re.error, IndexError) as error:
            raise UserError(
                f"--label-regex {regex!r} is not a pattern with one group ({error}): correct it."
            ) from error
        if label is None:
            raise UserError(f"--label-regex {regex!r} does not match {source.name}: correct it.")
    return dataclasses.replace(source, label=label)


def _from_folder(folder: Path) -> list[Source]:
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in video.EXTENSIONS | video.IMAGES
        and not path.name.startswith(".")  # macOS leaves ._name.mp4 beside name.mp4
        and path.is_file()
    )
    return [FileSource(folder / name, name) for name in names]


def _from_glob(pattern: str) -> list[Source]:
    # Names are relative to the part before the first wildcard.
    fixed = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed)
    paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    return [FileSource(p, p.relative_to(root).as_posix()) for p in paths]


def _from_manifest(manifest: Path) -> list[Source]:
    return [
        _manifest_source(manifest, f"{manifest} line {line}", row)
        for line, row in _manifest_rows(manifest)
    ]


def _manifest_rows(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(manifest, encoding="utf-8-sig", newline="") as file:
            if manifest.suffix.lower() == ".csv":
                reader = csv.DictReader(file, restkey="a column without a heading")
                yield from ((reader.line_num, row) for row in reader)
                return
            for line, text in enumerate(file, start=1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise UserError(f"{manifest} line {line} is not a JSON object: correct it.")
                    yield line, row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{manifest} cannot be read ({error}): correct it.") from error


def _manifest_source(manifest: Path, where: str, row: dict[str, Any]) -> FileSource:
    unknown = sorted(set(row) - set(MANIFEST_COLUMNS))
    if unknown:
        raise UserError(
            f"{where} has {', '.join(map(repr, unknown))}, which nothing reads: the columns are "
            f"{', '.join(MANIFEST_COLUMNS)}."
        )
    given = {k: str(v).strip() for k, v in row.items() if v is not None and str(v).strip()}
    if "path" not in given:
        raise UserError(f"{where} has no path: give one, relative to the manifest.")
    times = {}
    for key in ("start", "end"):
        try:
            times[key] = float(given[key]) if key in given else None
        except ValueError as error:
            raise UserError(f"{where}: {key} {given[key]!r} is not seconds: correct it.") from error
    return FileSource(
        path=manifest.parent / given["path"],
        name=given["path"],
        caption=given.get("caption", ""),
        label=given.get("label"),
        start=times["start"] or 0.0,
        end=times["end"],
    )


def _from_tfds(name: str) -> list[Source]:
    try:
        splits = _open_tfds(name)
    except Exception as error:  # TFDS raises whatever it trips over
        raise UserError(
            f"tfds:{name} cannot be opened ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "check the name, or prepare it with tfds and give its directory."
        ) from error
    if not isinstance(splits, dict):
        splits = {"all": splits}
    return [s for split in sorted(splits) for s in _from_tfds_split(name, split, splits[split])]


def _open_tfds(name: str) -> Any:
    """All splits of NAME, or the one of NAME/SPLIT; NAME is a dataset's name or directory."""
    head, _, split = name.rpartition("/")
    if Path(name).is_dir():
        return tfds.builder_from_directory(name).as_data_source()
    if head and Path(head).is_dir():
        return {split: tfds.builder_from_directory(head).as_data_source(split=split)}
    try:
        return tfds.data_source(name)
    except Exception:  # TFDS raises whatever it trips over
        if not head or split in tfds.builder_cls(head).builder_configs:
            raise
    return {split: tfds.data_source(head, split=split)}


def _from_tfds_split(name: str, split: str, examples: Any) -> Iterator[TfdsSource]:
    features = examples.dataset_info.features

    def first(kind: type, *names: str) -> str | None:
        found = [
            k for k, f in features.items() if isinstance(f, kind) and (not names or k in names)
        ]
        return found[0] if found else None

    frames = first(tfds.features.Video)
    label = first(tfds.features.ClassLabel)
    caption = first(tfds.features.Text, "caption", "text", "description")
    if frames is None:
        raise UserError(
            f"tfds:{name} has no Video feature, only {', '.join(features)}: give a video dataset."
        )
    for i in range(len(examples)):
        example = examples[i]
        known = label is not None and example[label] >= 0
        yield TfdsSource(
            load=lambda i=i: np.stack([_rgb(f) for f in examples[i][frames]]),
            fps=float(example["fps"]) if "fps" in features else TFDS_FPS,
            name=f"{split}/{i:06d}",
            caption=example[caption].decode() if caption else "",
            label=features[label].int2str(int(example[label])) if known else None,
        )


def _rgb(frame: np.ndarray) -> np.ndarray:
    return np.broadcast_to(frame, (*frame.shape[:2], 3)).astype(np.uint8, copy=False)
