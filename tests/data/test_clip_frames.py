"""Which frames make a clip."""

import numpy as np
import pytest

from walt_jax.data.pipeline import clip_frames


@pytest.mark.parametrize("position, first", [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_clip_frames_at_the_native_rate(position, first):
    times = np.arange(25) / 30
    assert clip_frames(times, 5, 0, position).tolist() == list(range(first, first + 5))
    assert clip_frames(times, 5, 30, position).tolist() == list(range(first, first + 5))


def test_clip_frames_takes_the_nearest_in_time():
    times = np.arange(31) / 30
    assert clip_frames(times, 6, 8, 0.0).tolist() == [0, 4, 7, 11, 15, 19]  # 3.75 frames apart
    late = clip_frames(times, 6, 8, 1.0)
    assert late[-1] == 30 and late[0] == 11


def test_clip_frames_of_a_variable_rate():
    """A pause of a second: its last frame is shown until the next is nearer."""
    times = np.array([0, 0.1, 0.2, 0.3, 1.3, 1.4, 1.5])
    assert clip_frames(times, 4, 2, 0.0).tolist() == [0, 3, 4, 6]
    assert clip_frames(times, 16, 10, 0.0).tolist() == [0, 1, 2] + [3] * 6 + [4] * 5 + [5, 6]


def test_clip_frames_at_random_are_the_nearest_and_in_range():
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = np.cumsum(rng.uniform(0.01, 0.2, 40))
        times -= times[0]
        position, fps = rng.random(), rng.uniform(3, 30)
        count = max(1, int(times[-1] * fps * rng.random()))
        wanted = position * (times[-1] - (count - 1) / fps) + np.arange(count) / fps
        frames = clip_frames(times, count, fps, position)
        nearest = np.abs(times - wanted[:, None]).min(1)
        np.testing.assert_allclose(np.abs(times[frames] - wanted), nearest, atol=1e-9)


@pytest.mark.parametrize("position", [0.0, 0.999, 1.0])
@pytest.mark.parametrize("fps", [0, 8])
def test_clip_frames_of_whole_videos_and_images(fps, position):
    assert clip_frames(np.arange(9) / 8, 9, fps, position).tolist() == list(range(9))
    assert clip_frames(np.zeros(1), 1, fps, position).tolist() == [0]


def test_clip_frames_half_a_frame_short():
    assert clip_frames(np.arange(9) / 8.4, 9, 8, 0.7).tolist() == list(range(9))
