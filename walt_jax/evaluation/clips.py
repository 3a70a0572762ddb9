"""Clips of real or generated videos, cut as a protocol says.

Clip i is a function of (source, protocol, seed, i), whatever else is read. A source is a folder of
video files, searched recursively, or a dataset written by `walt_jax.prepare`.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from walt_jax.data.buckets import fit_frames
from walt_jax.data.pipeline import DataConfig, clip_frames
from walt_jax.errors import UserError
from walt_jax.evaluation.protocols import Protocol, Size
from walt_jax.evaluation.resize import resize
from walt_jax.evaluation.scores import Record
from walt_jax.evaluation.videos import Folder, Opened, Part, Prepared

_CLIP, _CHOICE = 5, 6  # tags of the random draws of a clip, and of which videos
_THREADS = 8
_resize = jax.jit(resize, static_argnums=(1, 2))


class Clips:
    """The real clips of a source, or the samples in a folder.

    Attributes:
      record: what they are, JSON values: kind, fingerprint, counts.
      labels: int (number of videos,), the class of each; -1 for none.
    """

    def __init__(
        self,
        source: str | Path,
        protocol: Protocol,
        *,
        seed: int = 0,
        samples: bool = False,
        part: Part = "all",
        data: DataConfig | None = None,
    ) -> None:
        """Finds the videos and checks what can be checked without decoding them.

        Args:
          source: a folder of videos, or a prepared dataset.
          protocol: how clips are cut.
          seed: of random choices.
          samples: whether they are generated: then each gives one clip, its first frames.
          part: of a prepared dataset, what training saw, what it held out, or all.
          data: how training cut its clips, and so what it held out; needed for a part.

        Raises:
          UserError: no videos, too few of them or of their frames, mixed sizes or frame rates.
        """
        self.protocol, self._seed, self._samples = protocol, seed, samples
        self._per_video = 1 if samples else protocol.temporal_clips * protocol.spatial_clips
        path = Path(source)
        prepared = (path / "metadata.json").is_file()
        self._source: Folder | Prepared = (
            Prepared(path, protocol, part, data)
            if prepared
            else Folder(path, None if samples else protocol.size)
        )
        self._check_alike()
        self._videos = self._choose()
        self.labels = self._source.labels[self._videos]
        self.record: Record = {
            **self._source.record,
            "part": part if prepared else "all",
            "videos": len(self._videos),
            "clips": len(self),
        }
        if self.random:
            self.record["seed"] = seed

    def __len__(self) -> int:
        return len(self._videos) * self._per_video

    @property
    def random(self) -> bool:
        """Whether the clips depend on the seed."""
        p = self.protocol
        return not self._samples and (p.clips == "random" or p.crop == "random" or p.num_real > 0)

    @property
    def fps(self) -> float:
        """Frames a second that clips are cut from; the median where they differ."""
        own = float(np.median(self._source.fps))
        return own if self._samples else self.protocol.fps or own

    @property
    def sizes(self) -> set[Size]:
        """(height, width) of the videos."""
        return set(self._source.sizes)

    def name(self, number: int) -> str:
        """The video that a clip is of."""
        return self._source.name(int(self._videos[number // self._per_video]))

    def caption(self, number: int) -> str:
        """The caption of a clip's video, or ''."""
        return self._source.caption(int(self._videos[number // self._per_video]))

    def read(self, number: int) -> np.ndarray:
        """Clip `number` before `compared`: uint8 (num_frames, H, W, 3).

        Raises:
          UserError: the video is damaged, too short, or of another size than the protocol's.
        """
        p = self.protocol
        video, clip = divmod(number, self._per_video)
        video = int(self._videos[video])
        opened = self._opened(video)
        rng = np.random.default_rng((self._seed, _CLIP, video, clip))
        draw, *corner = rng.random(3)
        temporal, spatial = divmod(clip, p.spatial_clips)
        position = draw if p.clips == "random" else _even(temporal, p.temporal_clips)
        if self._samples:
            position = 0.0
        fps = 0.0 if self._samples else p.fps
        if fps:
            short = opened.times[-1] + 0.5 / fps < (p.span - 1) / fps
        else:
            short = len(opened.times) < p.span
        if short:
            raise UserError(
                f"{self._source.name(video)} has {len(opened.times)} frames, too few for a clip of "
                f"{p.num_frames} frames with stride {p.stride}"
                + (f" at {fps:g} fps" if fps else "")
                + ": leave it out, or lower protocol.num_frames."
            )
        frames = opened.read(clip_frames(opened.times, p.span, fps, position)[:: p.stride])
        if self._samples or p.size is None:
            if p.size is not None and frames.shape[1:3] != p.size:
                raise UserError(
                    f"{self._source.name(video)} is {frames.shape[1]}x{frames.shape[2]}, but the "
                    f"protocol {p.name} is of samples of {p.size[0]}x{p.size[1]}: sample at that "
                    "size, or give --protocol.size."
                )
            return frames
        if p.spatial_clips > 1:
            place = _even(spatial, p.spatial_clips)
            wide = frames.shape[2] / frames.shape[1] > p.size[1] / p.size[0]
            corner = [0.5, place] if wide else [place, 0.5]
        elif p.crop == "centre":
            corner = [0.5, 0.5]
        return fit_frames(frames, p.size, tuple(corner))

    def batches(
        self, numbers: np.ndarray, batch_size: int, *, raw: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers (K,), uint8 clips (K, T, H, W, 3)), read by threads.

        As they are compared, or `raw`: before that.

        Raises:
          UserError: as `read`, or clips of several sizes.
        """
        read = self.read if raw else lambda n: compared(self.read(n), self.protocol)
        first: tuple[str, tuple[int, ...]] | None = None
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            waiting: collections.deque = collections.deque()
            groups = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
            ahead = max(1, 2 * _THREADS // batch_size)
            try:
                for group in [*groups, *[None] * ahead]:
                    if group is not None:
                        tasks = [pool.submit(read, int(n)) for n in group]
                        waiting.append((group, tasks))
                    if len(waiting) <= ahead and group is not None:
                        continue
                    if not waiting:
                        return
                    group, tasks = waiting.popleft()
                    clips = [task.result() for task in tasks]
                    first = first or (self.name(int(group[0])), clips[0].shape)
                    for number, clip in zip(group, clips):
                        if clip.shape != first[1]:
                            raise UserError(
                                f"{self.name(int(number))} gives clips of {_x(clip.shape[1:3])}, "
                                f"{first[0]} of {_x(first[1][1:3])}: give --protocol.size=(H,W) "
                                "to crop all to one size."
                            )
                    yield np.asarray(group), np.stack(clips)
            finally:
                pool.shutdown(cancel_futures=True)

    @functools.cached_property
    def _opened(self) -> Callable[[int], Opened]:
        """Opens a video; its other clips come soon after."""
        kept = 1 if self._per_video == 1 else 2 * _THREADS
        return functools.lru_cache(maxsize=kept)(self._source.open)

    def _choose(self) -> np.ndarray:
        """Indices of the videos used."""
        total, wanted = len(self._source.fps), self.protocol.num_real
        if self._samples:
            fixed = self.protocol.total_samples
            if fixed and total != fixed:
                raise UserError(
                    f"{self._source.path} holds {total} videos, but the protocol "
                    f"{self.protocol.name} is of {self.protocol.folds} x "
                    f"{self.protocol.num_samples} samples: sample that many, or give "
                    "--protocol.num_samples."
                )
            if total % self.protocol.folds:
                raise UserError(
                    f"{self._source.path} holds {total} videos, which "
                    f"protocol.folds={self.protocol.folds} does not divide: sample a multiple."
                )
            return np.arange(total)
        if not wanted:
            return np.arange(total)
        videos = -(-wanted // self._per_video)
        if videos * self._per_video != wanted or videos > total:
            raise UserError(
                f"{self._source.path} gives {total * self._per_video} clips, {self._per_video} a "
                f"video, but the protocol {self.protocol.name} is of {wanted} real ones: give more "
                "videos, or --protocol.num_real."
            )
        rng = np.random.default_rng((self._seed, _CHOICE))
        return np.sort(rng.permutation(total)[:videos])

    def _check_alike(self) -> None:
        """Refuses mixed sizes and frame rates, where the protocol does not bring them together."""
        p, source = self.protocol, self._source
        if (p.size is None or self._samples) and len(set(source.sizes)) > 1:
            a, b = _two(source.sizes)
            raise UserError(
                f"{source.path} mixes videos of {_x(source.sizes[a])} ({source.name(a)}) and "
                f"{_x(source.sizes[b])} ({source.name(b)}): give --protocol.size=(H,W) to crop all "
                "real ones to one size, or samples of one size."
            )
        rates = [round(f, 1) for f in source.fps]
        if (self._samples or not p.fps) and not p.any_fps and len(set(rates)) > 1:
            a, b = _two(rates)
            raise UserError(
                f"{source.path} mixes videos of {rates[a]:g} fps ({source.name(a)}) and "
                f"{rates[b]:g} fps ({source.name(b)}): give --protocol.fps to read real ones at "
                "one rate, or --protocol.any_fps=True to take every frame of each."
            )


def check_pair(real: Clips, fake: Clips) -> None:
    """Refuses real clips and samples that are not of one size and frame rate.

    Raises:
      UserError: naming both.
    """
    p = real.protocol
    if p.size is None and real.sizes != fake.sizes:
        (a,), (b,) = real.sizes, fake.sizes
        raise UserError(
            f"The real videos are {_x(a)} and the samples {_x(b)}: give --protocol.size=({b[0]},"
            f"{b[1]}) to crop the real ones."
        )
    if not p.any_fps and abs(real.fps - fake.fps) > 0.02 * real.fps:
        raise UserError(
            f"The real clips have {real.fps:g} fps and the samples {fake.fps:g}: give "
            f"--protocol.fps={fake.fps:g} to read the real ones at that rate, or "
            "--protocol.any_fps=True."
        )


def compared(frames: np.ndarray, protocol: Protocol) -> np.ndarray:
    """A clip as it goes into the feature network: resized, through JPEG; uint8 (T, H, W, 3)."""
    if protocol.compare_size is not None:
        pixels = _resize(frames, protocol.compare_size, protocol.compare_resize)
        frames = np.clip(np.rint(np.asarray(pixels)), 0, 255).astype(np.uint8)
    if protocol.jpeg_quality:
        options = [cv2.IMWRITE_JPEG_QUALITY, protocol.jpeg_quality]
        coded = (cv2.imencode(".jpg", f[..., ::-1], options)[1] for f in frames)
        frames = np.stack([cv2.imdecode(c, cv2.IMREAD_COLOR_RGB) for c in coded])
    return frames


def _even(i: int, count: int) -> float:
    """Place i of `count` from 0 to 1; a single one in the middle."""
    return i / (count - 1) if count > 1 else 0.5


def _two(values: list[Any]) -> tuple[int, int]:
    """The places of the first value and of the first that differs."""
    return 0, next(i for i, v in enumerate(values) if v != values[0])


def _x(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
