"""Statistics of real clips: kept, found again, and refused where they do not fit."""

import dataclasses

import numpy as np
import pytest
import tiny_features

from walt_jax.errors import UserError
from walt_jax.evaluation import reference
from walt_jax.evaluation.clips import Clips
from walt_jax.evaluation.moments import Moments
from walt_jax.evaluation.protocols import Protocol

PROTOCOL = Protocol(num_frames=5, size=(16, 16), any_fps=True)


@pytest.fixture(scope="module")
def net():
    return tiny_features.load()


@pytest.fixture(scope="module")
def kept(tmp_path_factory, sprite_records, net):
    """Clips, their statistics and the file."""
    clips = Clips(sprite_records, PROTOCOL)
    cache = tmp_path_factory.mktemp("cache")
    made, path = reference.statistics(clips, net, cache, progress=False)
    assert made.source == clips.record and path.parent == cache
    assert [f.name for f in cache.iterdir()] == [path.name]
    return clips, made.moments, path


def test_they_are_the_sums_of_all_clips(kept, net):
    clips, moments, _ = kept
    features = net(np.stack([clips.read(i) for i in range(len(clips))]))
    direct = Moments.of(features)
    assert moments.count == direct.count == 24
    np.testing.assert_allclose(moments.outer, direct.outer, rtol=1e-12)


def test_they_are_made_once(kept, net, monkeypatch):
    clips, moments, path = kept
    monkeypatch.setattr(Clips, "batches", None)
    again, _ = reference.statistics(clips, net, path.parent, progress=False)
    np.testing.assert_array_equal(again.moments.outer, moments.outer)


def test_another_seed_is_another_file(kept, net, sprite_records):
    _, moments, path = kept
    clips = Clips(sprite_records, PROTOCOL, seed=1)
    other, file = reference.statistics(clips, net, path.parent, progress=False)
    assert file != path and not np.array_equal(other.moments.outer, moments.outer)


def test_features_of_the_first_clips_are_kept(kept, net, any_folder):
    clips, moments, path = kept
    made, file = reference.statistics(clips, net, any_folder, kept=5, progress=False)
    assert file.name != path.name and [f.name for f in any_folder.iterdir()] == [file.name]
    np.testing.assert_array_equal(made.moments.outer, moments.outer)
    np.testing.assert_array_equal(made.rows, net(np.stack([clips.read(i) for i in range(5)])))


def test_what_concerns_the_samples_alone_may_differ(kept, net):
    p = dataclasses.replace(PROTOCOL, num_samples=7, folds=2, unbiased=False, name="other")
    assert reference.load(kept[2], p, net).moments.count == 24


def test_a_mismatch_is_refused_with_its_fields(kept, net):
    p = dataclasses.replace(PROTOCOL, num_frames=4, stride=2)
    with pytest.raises(UserError) as error:
        reference.load(kept[2], p, net)
    text = str(error.value)
    assert "protocol.num_frames: 5 -> 4; protocol.stride: 1 -> 2" in text
    assert "protocol.size" not in text
    other = tiny_features.load("1", resize="tf1-bilinear")
    with pytest.raises(UserError, match=r"features.weights: .*; features.resize: 'half-pixel' ->"):
        reference.load(kept[2], PROTOCOL, other)


def test_files_that_are_no_statistics(kept, net, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        reference.load(tmp_path / "none.npz", PROTOCOL, net)
    kept[1].save(tmp_path / "bare.npz")  # the sums alone
    with pytest.raises(UserError, match="does not say how it was made"):
        reference.load(tmp_path / "bare.npz", PROTOCOL, net)
    (tmp_path / "broken.npz").write_bytes(kept[2].read_bytes()[:100])
    with pytest.raises(UserError, match=r"broken.npz holds no sums"):
        reference.load(tmp_path / "broken.npz", PROTOCOL, net)
