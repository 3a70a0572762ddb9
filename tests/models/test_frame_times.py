"""Denoisers that are told where in a long video their frames lie."""

import dataclasses

import jax
import numpy as np
import pytest
from small_denoisers import SMALL, build, latents, network_of

from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig

CONFIG = dataclasses.replace(SMALL, frame_times=True, relative_bias=False)
MODEL = build(CONFIG)
Z, T = latents(2), [3, 500]


def out(*times, z=Z):
    return np.asarray(MODEL(z, T, times=np.asarray(times, np.float32)))


def test_only_distances_count_and_whether_the_video_begins_here():
    later = out([5, 6, 9], [40, 50, 60])
    np.testing.assert_allclose(later, out([105, 106, 109], [1, 11, 21]), atol=1e-5)
    assert np.abs(later[0] - out([5, 6, 10], [40, 50, 60])[0]).max() > 1e-3
    assert np.abs(later[0] - out([0, 1, 4], [40, 50, 60])[0]).max() > 1e-3
    np.testing.assert_allclose(later[1], out([0, 1, 4], [40, 50, 60])[1], atol=1e-5)


def test_frames_without_times_are_the_first_ones():
    np.testing.assert_allclose(MODEL(Z, T), out([0, 1, 2], [0, 1, 2]), atol=1e-5)


def test_no_other_position_tells_frames_apart():
    times = [[1, 4, 2], [7, 7, 9]]
    turned = out(*[row[::-1] for row in times], z=Z[:, ::-1])
    np.testing.assert_allclose(turned[:, ::-1], out(*times), atol=1e-4)
    assert "temporal_embedding" not in network_of(CONFIG)[1]


@pytest.mark.slow
def test_images_pass_at_the_videos_beginning():
    image = Z[:, :1]
    np.testing.assert_allclose(MODEL(image, T), out([0], [0], z=image), atol=1e-5)


def test_times_that_do_not_fit_are_one_sentence():
    with pytest.raises(UserError, match=r"'times' has the shape \(2, 2\).*\(2, 3\)"):
        out([0, 1], [0, 1])
    with pytest.raises(UserError, match=r"takes no 'times'.*frame_times=False"):
        build(SMALL)(Z, T, times=np.zeros((2, 3)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"relative_bias": True}, "relative_bias has no offsets between frames"),
        ({"positions": "fractional"}, "positions='fractional'"),
        ({"grid": (4, 4, 4), "patch_size": (2, 1, 1)}, "patches of one frame"),
    ],
)
def test_what_does_not_go_with_frame_times_is_one_sentence(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_windows_of_one_frame_keep_their_bias():
    config = DenoiserConfig(**{**vars(CONFIG), "windows": ((1, 2, 2),), "relative_bias": True})
    paths = jax.tree_util.tree_leaves_with_path(network_of(config)[1])
    assert any("biases" in jax.tree_util.keystr(path) for path, _ in paths)
