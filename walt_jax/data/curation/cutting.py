"""From a stream of decoded frames to clips: scene cuts, frame rate, lengths. Nothing is held that
the next frames cannot change, so memory does not grow with the length of a video."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np

from walt_jax.data import video
from walt_jax.data.curation.config import CutConfig
from walt_jax.errors import UserError

Timed = tuple[float, np.ndarray]
_DETECTOR_SIDE = 144  # pixels of the shorter side that cuts are looked for in


@dataclasses.dataclass
class Clip:
    """A clip of a source.

    Attributes:
      scene: number of its scene in the source, from 0.
      times: seconds of its frames from the source's first; coded: each frame as JPEG.
      size: (height, width) in pixels.
      kept: False for what is left of a scene and too short.
    """

    scene: int
    times: list[float]
    coded: list[np.ndarray]
    size: tuple[int, int]
    kept: bool = True

    @property
    def fps(self) -> float:
        """Average frames a second; 1.0 for a single frame."""
        times = self.times
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0

    @property
    def seconds(self) -> float:
        """Its length, the last frame's own time included."""
        return len(self.times) / self.fps


def cut_clips(frames: Iterable[Timed], duration: float, config: CutConfig) -> Iterator[Clip]:
    """Yields the clips of a source, in order; an image, a source of one frame, is never too short.

    Args:
      frames: (seconds from the first frame, uint8 (H, W, 3) sRGB), in order.
      duration: seconds, as known before decoding; 0.0 where nothing is.
      config: the rules.
    """
    span = config.clip_seconds or config.max_seconds
    if not config.clip_seconds and config.detector == "none" and duration > span:
        # Equal pieces, by the header's word, leave no scrap of a frame or two at the end.
        span = duration / math.ceil(duration / span)
    frames = iter(frames)
    first = list(itertools.islice(frames, 2))
    frames, image = itertools.chain(first, frames), len(first) == 1
    clip, start, pieces = None, 0.0, 1
    for scene, time, frame in _resampled(_scenes(frames, config), config.fps):
        if clip is not None and scene != clip.scene:
            yield _checked(clip, config)
            clip = None
        elif clip is not None and time - start >= pieces * span - 1e-6:
            yield _checked(clip, config)
            pieces = math.floor((time - start + 1e-6) / span) + 1
            clip = Clip(scene, [], [], frame.shape[:2])
        if clip is None:
            clip, start, pieces = Clip(scene, [], [], frame.shape[:2]), time, 1
        clip.times.append(time)
        clip.coded.append(video.encode_frame(frame))
    if clip is not None:
        yield clip if image else _checked(clip, config)


def _checked(clip: Clip, config: CutConfig) -> Clip:
    # Half a frame short of the wanted length has all of its frames.
    clip.kept = clip.seconds >= config.min_clip_seconds - 0.5 / clip.fps
    return clip


def _scenes(frames: Iterable[Timed], config: CutConfig) -> Iterator[tuple[int, float, np.ndarray]]:
    """Numbers the scenes; a detector speaks of frames a few behind, which wait for it."""
    if config.detector == "none":
        yield from ((0, time, frame) for time, frame in frames)
        return
    detect, delay = _detector(config)
    waiting: collections.deque[tuple[int, Timed]] = collections.deque()
    cuts: set[int] = set()
    scene, began = 0, 0.0

    def numbered() -> tuple[int, float, np.ndarray]:
        nonlocal scene, began
        i, (time, frame) = waiting.popleft()
        if i in cuts and time - began >= config.min_scene_seconds:
            scene, began = scene + 1, time
        cuts.discard(i)
        return scene, time, frame

    for i, (time, frame) in enumerate(frames):
        waiting.append((i, (time, frame)))
        cuts.update(detect(i, frame))
        if len(waiting) > delay:
            yield numbered()
    while waiting:
        yield numbered()


def _detector(config: CutConfig) -> tuple[Any, int]:
    """A function (frame number, frame) -> numbers of cuts, and how many frames late it may be."""
    try:
        from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
    except ImportError as error:
        raise UserError(
            f"config.cut.detector={config.detector} needs PySceneDetect: pip install "
            "'walt_jax[data]', or turn it off."
        ) from error
    kind, name = {
        "adaptive": (AdaptiveDetector, "adaptive_threshold"),
        "content": (ContentDetector, "threshold"),
    }[config.detector]
    # Short scenes are judged by the frames' own times, not by a constant rate.
    detector = kind(min_scene_len=0, **({name: config.threshold} if config.threshold else {}))

    def detect(i: int, frame: np.ndarray) -> list[int]:
        small = cv2.cvtColor(video.shrink(frame, _DETECTOR_SIDE), cv2.COLOR_RGB2BGR)
        return [cut.frame_num for cut in detector.process_frame(FrameTimecode(i, 30.0), small)]

    return detect, detector.event_buffer_length


def _resampled(
    frames: Iterable[tuple[int, float, np.ndarray]], fps: float
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Of each scene the frames nearest to its start + k / fps, none twice; all where fps is 0."""
    if not fps:
        yield from frames
        return
    previous, start, k, taken = None, 0.0, 0, True
    for frame in frames:
        scene, time, _ = frame
        if previous is None or scene != previous[0]:
            start, k, previous = time, 0, None
        used = False
        while start + k / fps <= time + 1e-9:
            wanted = start + k / fps
            k += 1
            if previous is not None and wanted - previous[1] <= time - wanted:
                if not taken:
                    yield previous
                    taken = True
            elif not used:
                yield frame
                used = True
        previous, taken = frame, used
