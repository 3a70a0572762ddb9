"""Sums of features: the same in any order, whole on disk, refused where they make no sense."""

import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.evaluation.moments import Moments

X = np.random.default_rng(0).normal(3.0, 2.0, (101, 7)).astype(np.float32)


def test_are_numpys_mean_and_covariance():
    moments = Moments.of(X)
    np.testing.assert_allclose(moments.mean, X.astype(np.float64).mean(0), rtol=1e-13)
    for unbiased in (True, False):
        expected = np.cov(X.astype(np.float64).T, bias=not unbiased)
        np.testing.assert_allclose(moments.covariance(unbiased), expected, rtol=1e-12, atol=1e-12)


def test_any_batches_and_shards_give_the_same():
    whole, parts = Moments.of(X), [Moments.empty(7) for _ in range(3)]
    for i, start in enumerate(range(0, 101, 13)):
        parts[i % 3].add(X[start : start + 13])
    joined = parts[0].merge(parts[1]).merge(parts[2])
    assert joined.count == whole.count == 101
    np.testing.assert_allclose(joined.total, whole.total, rtol=1e-14)
    np.testing.assert_allclose(joined.outer, whole.outer, rtol=1e-14)
    assert parts[0].count < 101  # merging changes neither side


def test_a_file_holds_them_bit_for_bit(any_folder):
    moments = Moments.of(X)
    moments.save(any_folder / "real.npz")
    loaded = Moments.load(any_folder / "real.npz")
    assert loaded.count == 101
    np.testing.assert_array_equal(loaded.total, moments.total)
    np.testing.assert_array_equal(loaded.outer, moments.outer)
    assert [p.name for p in any_folder.iterdir()] == ["real.npz"]


def test_refuses_what_is_no_set_of_features(tmp_path):
    moments = Moments.of(X)
    spoilt = X.copy()
    spoilt[4, 2] = np.nan
    with pytest.raises(UserError, match="video 105 "):
        moments.add(spoilt)
    assert moments.count == 101 and np.isfinite(moments.outer).all()
    with pytest.raises(ValueError, match=r"\(N, 7\)"):
        moments.add(X[:, :5])
    with pytest.raises(ValueError, match="7 and of 5"):
        moments.merge(Moments.of(X[:, :5]))
    with pytest.raises(UserError, match="at least 2 videos, 1 given"):
        Moments.of(X[:1]).covariance()
    with pytest.raises(UserError, match="no features"):
        _ = Moments.empty(3).mean
    with pytest.raises(UserError, match="does not exist"):
        Moments.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    with pytest.raises(UserError, match="holds no sums"):
        Moments.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "odd.npz", count=3, total=np.zeros(4), outer=np.zeros((3, 3)))
    with pytest.raises(UserError, match="do not fit"):
        Moments.load(tmp_path / "odd.npz")
