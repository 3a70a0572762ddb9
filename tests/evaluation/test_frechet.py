"""Distances between sets of features against closed forms, SciPy's root and published figures."""

import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.evaluation.frechet import frechet_distance, inception_score, kernel_distance
from walt_jax.evaluation.moments import Moments


def gaussian(count, mean, covariance):
    """Moments of exactly this mean and (unbiased) covariance."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    outer = covariance * (count - 1) + count * np.multiply.outer(mean, mean)
    return Moments(count, count * mean, outer)


def by_sqrtm(a, b, unbiased=True):
    """The textbook's way."""
    linalg = pytest.importorskip("scipy.linalg")
    c1, c2 = a.covariance(unbiased), b.covariance(unbiased)
    root = linalg.sqrtm(c1 @ c2)
    return np.square(a.mean - b.mean).sum() + np.trace(c1 + c2 - 2 * root.real)


def features(seed, count, dims):
    """Correlated features with a mean far from 0."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(2.0, 1.0, dims)
    mixing = rng.normal(size=(dims, dims)) / np.sqrt(dims) + np.eye(dims)
    return (rng.normal(size=(count, dims)) @ mixing + mean).astype(np.float32)


def test_the_published_figures_of_synthetic_features():
    rng = np.random.RandomState(7)
    x = rng.random_sample((600, 32))
    y = x @ (np.eye(32) + 0.1 * rng.random_sample((32, 32))) + 0.05
    x, y = Moments.of(x), Moments.of(y)
    assert frechet_distance(x, y) == pytest.approx(23.003381032321897, rel=1e-9)
    assert frechet_distance(x, y, unbiased=False) == pytest.approx(23.003022347074868, rel=1e-9)


def test_closed_form_of_gaussians():
    """Covariances with the same axes: the sum over axes of the squared difference of deviations."""
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    s1, s2 = np.array([4.0, 1.0, 0.5, 0.0, 2.0]), np.array([1.0, 3.0, 0.5, 0.7, 0.0])
    a = gaussian(50, [1, 2, 3, 4, 5], axes @ np.diag(s1**2) @ axes.T)
    b = gaussian(80, [1, 0, 3, 4, 8], axes @ np.diag(s2**2) @ axes.T)
    assert frechet_distance(a, b) == pytest.approx(4 + 9 + np.square(s1 - s2).sum(), rel=1e-12)


def test_constant_features_are_as_far_apart_as_their_means():
    ones = [Moments.of(np.full((n, 400), v)) for n, v in ((16, 1.5), (40, 1.0))]
    assert frechet_distance(*ones) == pytest.approx(400 * 0.25, rel=1e-12)


@pytest.mark.parametrize("count", [64, 500])
def test_zero_for_itself_and_symmetric(count):
    a, b = (Moments.of(features(seed, count, 400)) for seed in (0, 1))
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert there == pytest.approx(back, rel=1e-12) and there > 100
    assert frechet_distance(a, a) < 1e-10 * np.trace(a.covariance())


def test_scipys_root_where_it_is_stable():
    a, b = (Moments.of(features(seed, 1200, 400)) for seed in (0, 1))
    for unbiased in (True, False):
        ours = frechet_distance(a, b, unbiased=unbiased)
        assert ours == pytest.approx(by_sqrtm(a, b, unbiased), rel=1e-6)


def test_fewer_videos_than_dimensions():
    """Features that live in 40 of 400 dimensions: as those 40 alone, and steady under rounding."""
    small = [features(seed, 64, 40) for seed in (0, 1)]
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(400, 400)))[0][:40]
    expected = frechet_distance(*(Moments.of(f) for f in small))
    a, b = (f @ turn for f in small)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)
    noise = np.random.default_rng(3).normal(size=a.shape) * 1e-7 * np.abs(a).max()
    assert frechet_distance(Moments.of(a + noise), Moments.of(b)) == pytest.approx(
        expected, rel=1e-5
    )


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = features(0, 6, 3), features(1, 6, 3)
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    expected = np.mean([kernel(a, b) for s in (x, y) for i, a in enumerate(s)
                        for j, b in enumerate(s) if i != j]) * 2  # fmt: skip
    expected -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    value, deviation = kernel_distance(x, y, size=10)
    assert value == pytest.approx(expected, rel=1e-4) and deviation == 0


def test_kernel_distance_is_unbiased_and_repeatable():
    """Near 0 for two samples of one distribution, whatever their number; not for another."""
    x, y, far = features(0, 400, 20), features(0, 800, 20)[400:], features(1, 400, 20)
    same, deviation = kernel_distance(x, y, subsets=50, size=100)
    assert abs(same) < deviation
    assert kernel_distance(x, far, subsets=50, size=100)[0] > 20 * deviation
    assert kernel_distance(x, y, subsets=50, size=100) == (same, deviation)
    assert kernel_distance(x, y, subsets=50, size=100, seed=1)[0] != same


def test_refuses_what_cannot_be_compared():
    a = features(0, 9, 4)
    for distance, kind in ((frechet_distance, Moments.of), (kernel_distance, np.asarray)):
        with pytest.raises(UserError, match="4 and of 3 dimensions"):
            distance(kind(a), kind(a[:, :3]))
        with pytest.raises(UserError, match="at least 2 videos"):
            distance(kind(a), kind(a[:1]))


def test_inception_score_between_one_and_the_classes():
    sure = np.repeat(np.eye(5) * 100, 4, 0)  # four of each class
    assert inception_score(sure, splits=1) == (pytest.approx(5), 0)
    assert inception_score(np.zeros((20, 5)), splits=4) == (pytest.approx(1), pytest.approx(0))
    # Parts in order: here each holds one class only.
    assert inception_score(sure, splits=5)[0] == pytest.approx(1)


def test_inception_score_is_its_formula():
    logits = np.random.default_rng(0).normal(size=(30, 7))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:10], p[10:20], p[20:])]
    mean, deviation = inception_score(logits + 1000, splits=3)
    assert mean == pytest.approx(np.mean(parts)) and deviation == pytest.approx(np.std(parts))
    with pytest.raises(UserError, match="30 videos cannot be split into 31 parts"):
        inception_score(logits, splits=31)
