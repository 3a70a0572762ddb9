"""Writing videos and frame grids to files."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image


class Mp4Writer:
    """Writes a video to H.264 in mp4 as its frames come; the file appears when all are there.

    with Mp4Writer("video.mp4", fps=8) as writer:
        for frames in pieces:
            writer.write(frames)
    """

    def __init__(self, path: str | Path, fps: float, *, crf: int = 18) -> None:
        """See `write_mp4`."""
        self._path, self._fps, self._crf = Path(path), fps, crf
        self._partial = self._path.with_name(f".{self._path.name}.partial")
        self._container, self._stream = None, None

    def __enter__(self) -> "Mp4Writer":
        self._container = av.open(str(self._partial), "w", format="mp4")
        return self

    def write(self, frames: np.ndarray) -> None:
        """Adds uint8 RGB frames (T, H, W, 3), all of the first ones' size."""
        frames = _checked(frames, self._path)
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            rate = Fraction(float(self._fps)).limit_denominator(1001)
            self._stream = self._container.add_stream("libx264", rate=rate)
            self._stream.width, self._stream.height = frames.shape[2], frames.shape[1]
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"crf": str(self._crf), "preset": "veryfast"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Ends the file; after an error there is none."""
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)


def _checked(frames: np.ndarray, path: str | Path) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"A video is uint8 (T, H, W, 3), got {frames.dtype} {frames.shape} for {path}."
        )
    return frames


def write_mp4(path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 18) -> None:
    """Writes uint8 RGB frames (T, H, W, 3) as H.264 in mp4; odd sizes are padded by one pixel.

    Args:
      path: the file to write.
      frames: uint8 (T, H, W, 3), sRGB.
      fps: frames a second.
      crf: x264's constant rate factor; 0 is near lossless, 18 visually lossless, 51 the worst.
    """
    frames = _checked(frames, path)
    with Mp4Writer(path, fps, crf=crf) as writer:
        writer.write(frames)


def write_gif(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes uint8 RGB frames (T, H, W, 3) as a GIF that repeats, each with its own 256 colours."""
    pictures = [Image.fromarray(frame) for frame in _checked(frames, path)]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0, optimize=False
    )


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Writes a uint8 RGB image (H, W, 3) as PNG."""
    if not cv2.imwrite(str(path), np.asarray(image)[..., ::-1]):
        raise OSError(f"could not write the image {path}.")


def frame_grid(videos: np.ndarray, *, columns: int = 8, pad: int = 2) -> np.ndarray:
    """Lays videos out as rows of evenly spaced frames: (N, T, H, W, 3) -> (H', W', 3), uint8."""
    videos = np.asarray(videos)
    picks = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    tiles = np.pad(
        videos[:, picks], ((0, 0), (0, 0), (0, pad), (0, pad), (0, 0)), constant_values=255
    )
    n, t, h, w, c = tiles.shape
    return tiles.transpose(0, 2, 1, 3, 4).reshape(n * h, t * w, c)
