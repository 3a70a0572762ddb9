"""Where clips come from: a folder of video files, or a prepared dataset."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from walt_jax.data.assignment import longest_clips
from walt_jax.data.pipeline import DataConfig, in_split
from walt_jax.data.records import VIDEO_FEATURES, Dataset, decode_frames, open_dataset
from walt_jax.data.sources import FileSource, find_sources
from walt_jax.data.video import EXTENSIONS, probe, read_video
from walt_jax.errors import UserError
from walt_jax.evaluation.protocols import Protocol, Size

Part = Literal["all", "train", "eval"]
_ENDS = 1 << 16  # bytes at both ends of a file that its fingerprint reads


class Opened(NamedTuple):
    """A video: seconds of each frame from 0, and what decodes frames of given indices."""

    times: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]


class Folder:
    """Video files; pictures between them are left out (galleries have some)."""

    def __init__(self, path: Path, crop: Size | None) -> None:
        if not path.exists():
            raise UserError(f"{path} does not exist: give a folder of videos.")
        found = find_sources(path) if any(path.iterdir()) else []
        self._files = [
            s for s in found if isinstance(s, FileSource) and s.path.suffix.lower() in EXTENSIONS
        ]
        if not self._files:
            raise UserError(f"{path} holds no video: give a folder of videos, or a prepared one.")
        self.path, headers = path, [probe(f.path) for f in self._files]
        self.sizes = [(h.height, h.width) for h in headers]
        self.fps = [h.fps for h in headers]
        self.labels = np.full(len(headers), -1)
        # A square crop has the short side of the whole frame: nothing larger need be kept.
        self._short_side = crop[0] if crop and crop[0] == crop[1] else None
        self.record = {"kind": "folder", "fingerprint": self._fingerprint()}

    def _fingerprint(self) -> str:
        """Of names, sizes and both ends of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            size = file.path.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with open(file.path, "rb") as f:
                digest.update(f.read(_ENDS))
                if size > 2 * _ENDS:
                    f.seek(-_ENDS, os.SEEK_END)
                digest.update(f.read(_ENDS))
        return digest.hexdigest()[:16]

    def name(self, video: int) -> str:
        """For messages."""
        return str(self._files[video].path)

    def caption(self, video: int) -> str:
        """The video's caption, or ''."""
        return self._files[video].caption

    def open(self, video: int) -> Opened:
        """Opens it; raises UserError where it is damaged."""
        opened = read_video(self._files[video].path, short_side=self._short_side, threads=1)
        return Opened(opened.times, lambda rows: opened.frames[rows])


class Prepared:
    """A dataset of `walt_jax.prepare`; records too short for a clip are left out and counted."""

    def __init__(self, path: Path, protocol: Protocol, part: Part, data: DataConfig | None) -> None:
        self._dataset: Dataset = open_dataset(path, VIDEO_FEATURES)
        index = self._dataset.index
        cut = DataConfig(str(path), num_frames=protocol.span, fps=protocol.fps)
        fits = longest_clips(index, cut.fps) >= cut.num_frames
        used = np.ones(len(fits), bool)
        if part != "all":
            used = longest_clips(index, data.fps) >= data.num_frames
            used[used] = in_split(index["source"][used], data.eval_fraction, part)
        self._rows = np.flatnonzero(fits & used)
        if not len(self._rows):
            raise UserError(
                f"{path} holds no video of {protocol.span} frames in its part {part!r}: lower "
                "protocol.num_frames, or choose another --real_part."
            )
        self.path = path
        sizes = np.stack([index["height"], index["width"]], 1)[self._rows]
        self.sizes = [tuple(map(int, size)) for size in sizes]
        self.fps = index["fps"][self._rows].tolist()
        self.labels = np.asarray(index["label"])[self._rows]
        self.record = {
            "kind": "prepared",
            "fingerprint": self._dataset.fingerprint,
            "eval_fraction": None if part == "all" else data.eval_fraction,
            "too_short": int(np.sum(used & ~fits)),
        }

    def name(self, video: int) -> str:
        """For messages."""
        return f"{self._dataset.index['source'][self._rows[video]]} in {self.path}"

    def caption(self, video: int) -> str:
        """The video's caption, or ''."""
        return self._dataset.read(int(self._rows[video]))["caption"]

    def open(self, video: int) -> Opened:
        """Opens it; raises UserError where it is damaged."""
        record: dict[str, Any] = self._dataset.read(int(self._rows[video]))
        return Opened(record["timestamps"], lambda rows: decode_frames(record, rows))
