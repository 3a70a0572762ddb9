"""Resizes against TensorFlow's and by what tells them apart."""

import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.evaluation.resize import RESIZES, resize

X = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 28, 3)).astype(np.uint8)
SIZES = [(33, 40), (20, 28), (7, 50), (9, 11)]


def by_tensorflow(name, x, size):
    tf = pytest.importorskip("tensorflow")
    flat = x.reshape(-1, *x.shape[-3:]).astype(np.float32)
    v1 = tf.compat.v1.image.resize_bilinear
    y = {
        "tf1-bilinear": lambda: v1(flat, size),
        "bilinear-corners": lambda: v1(flat, size, align_corners=True),
        "bilinear": lambda: v1(flat, size, half_pixel_centers=True),
        "bilinear-antialias": lambda: tf.image.resize(flat, size, "bilinear", antialias=True),
        "bicubic": lambda: tf.image.resize(flat, size, "bicubic"),
        "bicubic-antialias": lambda: tf.image.resize(flat, size, "bicubic", antialias=True),
    }[name]()
    return y.numpy().reshape(*x.shape[:-3], *size, 3)


NAMES = ["tf1-bilinear", "bilinear-corners", "bilinear", "bilinear-antialias", "bicubic"]


@pytest.mark.parametrize("name", [*NAMES, "bicubic-antialias"])
def test_is_tensorflows(name):
    for size in SIZES:
        ours = np.asarray(resize(X, size, name))
        np.testing.assert_allclose(ours, by_tensorflow(name, X, size), atol=0.2)
        worst = np.abs(ours - by_tensorflow(name, X, size)).max()
        # TensorFlow's cubic kernel is a table of 1024 entries.
        assert worst < (0.2 if "bicubic" in name else 2e-3)


def test_every_name_gives_another_picture():
    pictures = [np.asarray(resize(X, (15, 17), name)) for name in RESIZES]
    for i, a in enumerate(pictures):
        assert a.shape == (2, 3, 15, 17, 3) and a.dtype == np.float32
        for b in pictures[:i]:
            assert np.abs(a - b).max() > 1


def test_by_64_goes_by_64():
    once = resize(resize(X, (64, 64), "tf1-bilinear"), (90, 80), "tf1-bilinear")
    np.testing.assert_array_equal(resize(X, (90, 80), "tf1-bilinear-64"), once)


def test_short_side_keeps_the_aspect():
    ours = np.asarray(resize(X, (10, 10), "short-side"))
    np.testing.assert_allclose(ours, resize(X, (10, 14), "bilinear")[..., 2:12, :], atol=1e-4)


def test_refuses_an_unknown_name():
    with pytest.raises(UserError, match="'nearest': choose one of tf1-bilinear, "):
        resize(X, (8, 8), "nearest")
