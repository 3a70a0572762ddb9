"""Writing videos and frame grids to files."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np


def write_mp4(path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 18) -> None:
    """Writes uint8 RGB frames (T, H, W, 3) as H.264 in mp4; odd sizes are padded by one pixel.

    Args:
      path: the file to write.
      frames: uint8 (T, H, W, 3), sRGB.
      fps: frames a second.
      crf: x264's constant rate factor; 0 is near lossless, 18 visually lossless, 51 the worst.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"write_mp4 takes uint8 (T, H, W, 3), got {frames.dtype} {frames.shape} for {path}."
        )
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(float(fps)).limit_denominator(1001))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


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
