"""Videos as notebooks show them."""

import io

import numpy as np
from PIL import Image

from walt_jax.notebook import show_videos


def test_videos_stand_side_by_side_and_repeat():
    rng = np.random.default_rng(0)
    short, wide = (
        rng.integers(0, 256, (2, 8, 8, 3), "u1"),
        rng.integers(0, 256, (3, 8, 16, 3), "u1"),
    )
    shown = show_videos([short, wide, short], 4.0, height=16, columns=2)
    assert shown.frames.shape == (3, 2 * (16 + 4), 16 + 4 + 32 + 4, 3)
    np.testing.assert_array_equal(shown.frames[1, :16:2, :16:2], short[1])
    np.testing.assert_array_equal(shown.frames[2, :16:2, :16:2], short[1])  # it stands
    np.testing.assert_array_equal(shown.frames[2, :16:2, 20:52:2], wide[2])
    np.testing.assert_array_equal(shown.frames[0, 20:36:2, :16:2], short[0])
    assert (shown.frames[:, :, 16:20] == 255).all()
    with Image.open(io.BytesIO(shown._repr_png_())) as png:
        assert png.format == "PNG" and png.n_frames == 3 and png.info["loop"] == 0
        png.seek(1)
        np.testing.assert_array_equal(np.asarray(png.convert("RGB")), shown.frames[1])


def test_titles_are_broken_and_end_above_their_videos():
    black = np.zeros((2, 1, 8, 8, 3), np.uint8)
    shown = show_videos(black, titles=["a", "one two three four"], height=48)
    frame = shown.frames[0]
    assert frame.shape[0] == 48 + 4 + 3 * 14  # three lines of eight letters
    assert (frame[-52:-4, :48] == 0).all() and (frame[: 2 * 14, :48] == 255).all()
    assert (frame[2 * 14 : 3 * 14, :48] < 128).any()
