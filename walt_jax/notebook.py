"""Videos in notebooks: moving pictures that Jupyter, Colab and GitHub's pages show."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_LINE, _GAP, _LETTER = 14, 4, 6  # pixels: of a title's line, between videos, of a letter


@dataclasses.dataclass(frozen=True)
class Shown:
    """Pictures side by side, as an animated PNG that repeats: the last line of a cell shows it.

    Attributes:
      frames: uint8 (T, H, W, 3); fps: frames a second.
    """

    frames: np.ndarray
    fps: float

    def _repr_png_(self) -> bytes:
        file, pictures = io.BytesIO(), [Image.fromarray(frame) for frame in self.frames]
        options = {"save_all": True, "append_images": pictures[1:], "loop": 0}
        pictures[0].save(file, "PNG", duration=1000 / self.fps, **options)
        return file.getvalue()


def show_videos(
    videos: np.ndarray | Sequence[np.ndarray],
    fps: float = 8.0,
    titles: Sequence[str] = (),
    *,
    height: int = 128,
    columns: int = 4,
) -> Shown:
    """Shows videos, or pictures, side by side.

    Args:
      videos: uint8 (N, T, H, W, 3), or several (T, H, W, 3) of any sizes; shorter ones stand at
        their end.
      fps: frames a second.
      titles: a line above each; what is too long for its video is broken.
      height: of each in pixels, nearest neighbours.
      columns: videos in a row.
    """
    length = max(map(len, videos))
    tiles = []
    for i, video in enumerate(videos):
        width = round(height * video.shape[2] / video.shape[1])
        title = _title(titles[i], width) if i < len(titles) else None
        last = len(video) - 1
        frames = [video[min(t, last)] for t in range(length)]
        tiles.append([_tile(frame, (width, height), title) for frame in frames])
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    frames = [_stack([_stack([t[k] for t in row], 1) for row in rows], 0) for k in range(length)]
    return Shown(np.stack(frames), fps)


def _tile(frame: np.ndarray, size: tuple[int, int], title: np.ndarray | None) -> np.ndarray:
    picture = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.NEAREST))
    return picture if title is None else np.concatenate([title, picture])


def _title(text: str, width: int) -> np.ndarray:
    room, lines = max(1, width // _LETTER), [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= room or not lines[-1] else [*lines, word]
    picture = Image.new("RGB", (width, _LINE * len(lines)), "white")
    ImageDraw.Draw(picture).multiline_text((0, 0), "\n".join(lines), fill="black", spacing=2)
    return np.asarray(picture)


def _stack(pictures: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Pictures in a row (axis 1) or column (0), lower and right ends aligned by white."""
    across = 1 - axis
    most = max(p.shape[across] for p in pictures)
    padded = []
    for p in pictures:
        missing = [(0, 0), (0, 0), (0, 0)]
        # Above, so that a short title stands right over its video.
        room = most - p.shape[across]
        missing[across] = (room, 0) if across == 0 else (0, room)
        missing[axis] = (0, _GAP)
        padded.append(np.pad(p, missing, constant_values=255))
    return np.concatenate(padded, axis=axis)
