"""Scores of motion by optical flow: how much there is, and how well frames continue each other.

Flow is OpenCV's dense inverse search (1603.03590, `DISOpticalFlow`, medium preset) between
neighbouring frames in grey.
"""

from collections.abc import Iterator

import cv2
import numpy as np

from walt_jax.errors import UserError

_LEAST = 16  # pixels a side; smaller frames leave nothing of the flow's pyramid


def motion_strength(videos_BTHWC: np.ndarray) -> np.ndarray:
    """How far pixels move from a frame to the next, on average.

    Args:
      videos_BTHWC: uint8, two frames or more.

    Returns:
      float32 (B,), lengths of the flow as a share of the frame's diagonal, so that videos of any
      size compare; multiply by the frame rate to have it a second.

    Raises:
      UserError: one frame, too small frames, or no uint8 videos.
    """
    _check("motion strength", videos_BTHWC)
    diagonal = np.hypot(*videos_BTHWC.shape[2:4])
    return np.array(
        [
            np.mean([np.linalg.norm(flow, axis=-1).mean() for _, _, flow, _ in _pairs(video)])
            / diagonal
            for video in videos_BTHWC
        ],
        np.float32,
    )


def warping_error(videos_BTHWC: np.ndarray) -> np.ndarray:
    """The flow-warping error (1808.00449, section 4.2): low where motion is smooth and consistent.

    The next frame is pulled back along the flow and compared with this one, where both flows agree
    (forward and backward, so that what appears or is covered does not count).

    Args:
      videos_BTHWC: uint8, two frames or more.

    Returns:
      float32 (B,): mean squared difference of pixels in [0, 1]; 0 for a still video.

    Raises:
      UserError: as `motion_strength`.
    """
    _check("the warping error", videos_BTHWC)
    return np.array([_of_video(video) for video in videos_BTHWC], np.float32)


def _of_video(video: np.ndarray) -> float:
    errors = []
    for this, following, there, back in _pairs(video, both=True):
        pulled, returned = _warp(following, there), _warp(back, there)
        # As in 1808.00449, equation 3.
        apart = np.square(there + returned).sum(-1)
        lengths = np.square(there).sum(-1) + np.square(returned).sum(-1)
        seen = (apart <= 0.01 * lengths + 0.5) & _inside(there)
        if seen.any():
            difference = pulled.astype(np.float32) - this
            errors.append(np.square(difference[seen] / 255).mean())
    return float(np.mean(errors)) if errors else 0.0


def _pairs(video: np.ndarray, both: bool = False) -> Iterator[tuple]:
    """(frame, the next one, flow from one to the other, flow back or None)."""
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    for i in range(len(video) - 1):
        there = search.calc(grey[i], grey[i + 1], None)
        back = search.calc(grey[i + 1], grey[i], None) if both else None
        yield video[i], video[i + 1], there, back


def _targets(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows that pixels move to."""
    rows, columns = np.indices(flow.shape[:2], np.float32)
    return columns + flow[..., 0], rows + flow[..., 1]


def _warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    return cv2.remap(image, *_targets(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _inside(flow: np.ndarray) -> np.ndarray:
    columns, rows = _targets(flow)
    height, width = flow.shape[:2]
    return (columns >= 0) & (columns <= width - 1) & (rows >= 0) & (rows <= height - 1)


def _check(name: str, videos: np.ndarray) -> None:
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8:
        raise UserError(
            f"{name} takes uint8 videos (B, T, H, W, 3), {videos.dtype} {videos.shape} given: "
            "convert them."
        )
    if videos.shape[1] < 2 or min(videos.shape[2:4]) < _LEAST:
        size = "x".join(map(str, videos.shape[1:4]))
        raise UserError(
            f"{name} takes two frames or more of {_LEAST}x{_LEAST} or more, {size} given: leave it "
            "out or use larger videos."
        )
