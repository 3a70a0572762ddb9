"""Scores frame by frame against formulas, scikit-image and what they must not do."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from walt_jax.errors import UserError
from walt_jax.evaluation import frames
from walt_jax.models.perceptual import LpipsVgg

RNG = np.random.default_rng(0)
# Smooth, as pictures are.
X = np.cumsum(RNG.normal(0, 4, (2, 3, 24, 32, 3)), 3).astype(np.int64) % 256
X = X.astype(np.uint8)
Y = np.clip(X + RNG.normal(0, 12, X.shape), 0, 255).astype(np.uint8)


def test_psnr_is_its_formula():
    error = np.square((X / 255.0) - Y / 255.0).mean((2, 3, 4))
    np.testing.assert_allclose(frames.psnr(X, Y), (-10 * np.log10(error)).mean(1), rtol=1e-5)
    assert np.isinf(frames.psnr(X, X)).all()


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = []
    for a, b in zip(X.reshape(-1, 24, 32, 3), Y.reshape(-1, 24, 32, 3)):
        _, map_ = metrics.structural_similarity(
            a, b, channel_axis=-1, data_range=255, full=True, **how
        )
        expected.append(map_[5:-5, 5:-5].mean())  # the windows that lie inside
    ours = frames.ssim(X, Y)
    np.testing.assert_allclose(ours, np.reshape(expected, (2, 3)).mean(1), rtol=1e-3)
    np.testing.assert_allclose(frames.ssim(X, X), 1, rtol=1e-6)


def test_ms_ssim_falls_with_noise():
    x = np.cumsum(RNG.normal(0, 2, (1, 1, 176, 192, 3)), 3)
    x = (255 * (x - x.min()) / np.ptp(x)).astype(np.uint8)
    scores = [
        frames.ms_ssim(x, np.clip(x + RNG.normal(0, s, x.shape), 0, 255).astype(np.uint8))[0]
        for s in (0, 10, 40)
    ]
    assert scores[0] == pytest.approx(1) and 1 > scores[1] > scores[2] > 0


def test_lpips_is_the_mean_over_frames(tmp_path):
    tensors, channels, position = {}, 3, 0
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, *(512,) * 3, 0, *(512,) * 3):
        if width:
            noise = RNG.standard_normal((width, channels, 3, 3), np.float32)
            tensors[f"features.{position}.weight"] = noise * np.float32((2 / channels / 9) ** 0.5)
            tensors[f"features.{position}.bias"] = np.zeros(width, np.float32)
            channels = width
        position += 2 if width else 1
    for i, width in enumerate((64, 128, 256, 512, 512)):
        tensors[f"lin{i}.model.1.weight"] = np.ones((1, width, 1, 1), np.float32) / width
    save_file(tensors, tmp_path / "lpips.safetensors")
    path = str(tmp_path / "lpips.safetensors")
    score = frames.lpips(path)(X, Y)
    network = LpipsVgg(weights=path)
    floats = [np.float32(v[1]) / 127.5 - 1 for v in (X, Y)]
    expected = network.distance(network.load(), *floats).mean()
    assert score.shape == (2,) and score[1] == pytest.approx(float(expected), rel=1e-4)
    assert frames.lpips(path)(X, X).max() < 1e-6


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim"])
def test_refuses_what_cannot_be_compared(name):
    score = getattr(frames, name)
    with pytest.raises(UserError, match=r"one shape, .*32, 3\).*31, 3\) given"):
        score(X, Y[:, :, :, 1:])
    with pytest.raises(UserError, match="uint8 videos, float64 and uint8"):
        score(X / 255, Y)
    if name != "psnr":
        least = {"ssim": 11, "ms_ssim": 161}[name]
        with pytest.raises(UserError, match=f"{least}x{least} or more, 9x10 given"):
            score(X[:, :, :9, :10], Y[:, :, :9, :10])
