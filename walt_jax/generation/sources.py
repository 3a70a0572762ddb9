"""Pictures, videos and masks that people give, as the arrays that a model takes."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from walt_jax.data.buckets import Size, fit_frames
from walt_jax.data.pipeline import clip_frames
from walt_jax.data.video import EXTENSIONS, iter_frames, read_image, read_video
from walt_jax.errors import UserError

logger = logging.getLogger(__name__)
Source = str | Path | np.ndarray


def name_of(source: Source) -> str:
    """For messages."""
    return "The array" if isinstance(source, np.ndarray) else str(source)


def size_of(source: Source) -> Size:
    """Height and width of a picture or video.

    Raises:
      UserError: it cannot be read.
    """
    if isinstance(source, np.ndarray):
        return _frames(source).shape[1:3]
    if not _is_video(source):
        return read_image(_existing(source)).shape[:2]
    _, frame = next(iter_frames(_existing(source)))  # upright, which the header's size is not
    return frame.shape[:2]


def read_source(source: Source, fps: float, size: Size) -> np.ndarray:
    """A picture or video at a model's rate, scaled to cover a size and cropped to it.

    Args:
      source: a file, whose frames are taken at `fps`, nearest in time; or an array, uint8 (H, W, 3)
        or (T, H, W, 3), whose frames are taken as they are.
      fps: frames a second.
      size: height and width.

    Returns:
      uint8 (T, *size, 3); a picture is one frame.

    Raises:
      UserError: it cannot be read, or is no such array.
    """
    if isinstance(source, np.ndarray):
        return _fitted(_frames(source), size, name_of(source))
    if not _is_video(source):
        return _fitted(read_image(_existing(source))[None], size, str(source))
    video = read_video(_existing(source), short_side=max(size))
    count = int((video.times[-1]) * fps + 0.5) + 1
    rate = (len(video.times) - 1) / max(video.times[-1], 1e-9)
    if abs(rate - fps) > 0.01 * fps and len(video.times) > 1:
        logger.info("%s: %.4g fps, taken at %.4g: %d frames.", source, rate, fps, count)
    frames = video.frames[clip_frames(video.times, count, fps, 0.0)]
    return _fitted(frames, size, str(source), size_of(source))


def read_prompts(file: str | Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
      UserError: there is no such file, or no text in it.
    """
    if not Path(file).is_file():
        raise UserError(f"{file} is no file: give one with a prompt a line.")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{file} is no text in UTF-8: give a file with a prompt a line.") from e
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{file} has no prompts: write one a line.")
    return prompts


def read_mask(mask: Source | Sequence[float], size: Size) -> np.ndarray:
    """Where to paint, bool (H, W).

    Args:
      mask: four shares of the frame, 0 to 1: top, left, bottom, right of a box (also as text,
        `0.25,0.25,0.75,0.75`); a picture's file, white where to paint; or bool (H, W).
      size: of the frame; a picture is scaled and cropped like the video.

    Raises:
      UserError: it is none of these, or all or nothing of the frame is to be painted.
    """
    if isinstance(mask, str) and "," in mask:
        try:
            mask = [float(part) for part in mask.split(",")]
        except ValueError as error:
            raise UserError(
                f"{mask!r} is no box: write top,left,bottom,right as shares of the frame, such as "
                "0.25,0.25,0.75,0.75."
            ) from error
    if isinstance(mask, str | Path):
        painted = read_source(mask, 1.0, size)[0].mean(-1) > 127
    elif isinstance(mask, np.ndarray) and mask.ndim == 2:
        picture = np.repeat(np.uint8(255 * (mask > 0))[..., None], 3, -1)
        painted = fit_frames(picture[None], size)[0].mean(-1) > 127
    else:
        painted = _box(mask, size)
    if painted.all() or not painted.any():
        how = "all of the frame" if painted.all() else "nothing"
        raise UserError(f"The mask paints {how}: give one that is white in a part of the frame.")
    return painted


def letterbox(source: Source, fps: float, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """A picture or video within a frame of another aspect, and what is left to paint.

    Returns:
      uint8 (T, *size, 3), black beside it, and bool (H, W), True there.

    Raises:
      UserError: it cannot be read, or its aspect leaves nothing to paint.
    """
    h, w = size_of(source)
    scale = min(size[0] / h, size[1] / w)
    inner = min(size[0], round(h * scale)), min(size[1], round(w * scale))
    if inner == tuple(size):
        raise UserError(
            f"The video has the aspect of the frame, {size[0]}x{size[1]}, so that nothing is left "
            "to paint: give the box that is to be painted as mask, or another size."
        )
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    video = read_source(source, fps, inner)
    frames = np.zeros((len(video), *size, 3), np.uint8)
    painted = np.ones(size, bool)
    frames[:, top : top + inner[0], left : left + inner[1]] = video
    painted[top : top + inner[0], left : left + inner[1]] = False
    return frames, painted


def _box(box: object, size: Size) -> np.ndarray:
    shares = np.asarray(box, float)
    inside = shares.shape == (4,) and shares.min() >= 0 and shares.max() <= 1
    if not inside or shares[0] >= shares[2] or shares[1] >= shares[3]:
        raise UserError(
            f"{box} is no box: give top, left, bottom and right as shares of the frame, 0 to 1, "
            "top above bottom and left before right."
        )
    top, left, bottom, right = np.round(shares * [*size, *size]).astype(int)
    painted = np.zeros(size, bool)
    painted[top:bottom, left:right] = True
    return painted


def _fitted(frames: np.ndarray, size: Size, name: str, original: Size | None = None) -> np.ndarray:
    h, w = original or frames.shape[1:3]
    if (h, w) == tuple(size):
        return frames
    fitted = fit_frames(frames, size)
    cropped = "" if abs(w / h * size[0] / size[1] - 1) < 0.01 else " and cropped"
    logger.info("%s: %dx%d is scaled%s to %dx%d.", name, h, w, cropped, *size)
    return fitted


def _frames(array: np.ndarray) -> np.ndarray:
    frames = array[None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(
            f"A picture is uint8 (H, W, 3) and a video uint8 (T, H, W, 3), got {array.dtype} "
            f"{array.shape}: convert it, floats in [0, 1] by np.uint8(255 * x)."
        )
    return frames


def _is_video(path: str | Path) -> bool:
    return Path(path).suffix.lower() in EXTENSIONS


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give a picture or video file.")
    return Path(path)
