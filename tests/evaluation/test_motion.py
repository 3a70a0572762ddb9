"""Scores of motion on pictures that move by known steps."""

import cv2
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.evaluation.motion import motion_strength, warping_error

RNG = np.random.default_rng(0)
PICTURE = cv2.GaussianBlur(RNG.uniform(0, 255, (96, 160, 3)), (0, 0), 3)
PICTURE = np.uint8(255 * (PICTURE - PICTURE.min()) / np.ptp(PICTURE))


def moving(step, frames=6):
    """A window of 64x96 that moves over the picture."""
    return np.stack([PICTURE[16:80, 4 + step * t :][:, :96] for t in range(frames)])[None]


def test_strength_is_the_step():
    for step in (1, 2, 5):
        expected = step / np.hypot(64, 96)
        assert motion_strength(moving(step))[0] == pytest.approx(expected, rel=0.1)
    assert motion_strength(moving(0))[0] < 1e-4


def test_strength_of_a_batch_is_that_of_each():
    both = motion_strength(np.concatenate([moving(1), moving(4)]))
    assert both.shape == (2,) and both.dtype == np.float32
    np.testing.assert_array_equal(both[1:], motion_strength(moving(4)))


def test_warping_error_forgives_motion_but_not_flicker():
    still, smooth = (warping_error(moving(step))[0] for step in (0, 3))
    assert still == 0
    assert smooth < 1e-3
    flickering = moving(3).copy()
    flickering[:, ::2] = (flickering[:, ::2] * 0.8).astype(np.uint8)
    assert warping_error(flickering)[0] > 5 * smooth
    plain = np.square(np.diff(moving(3) / 255.0, axis=1)).mean()
    assert smooth < plain / 5


def test_refuses_what_has_no_motion():
    with pytest.raises(UserError, match=r"motion strength takes two frames or more.*1x64x96"):
        motion_strength(moving(1)[:, :1])
    with pytest.raises(UserError, match=r"warping error takes .* of 16x16 or more, 6x8x8 given"):
        warping_error(moving(1)[:, :, :8, :8])
    with pytest.raises(UserError, match="float64"):
        warping_error(moving(1) / 255)
