"""Protocols: as the papers have them, and never under their name when changed."""

import pytest

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.evaluation import protocols


def test_magvit_on_ucf():
    p = protocols.choose("magvit_ucf101")
    assert (p.num_frames, p.size, p.folds, p.num_samples) == (16, (128, 128), 4, 10_000)
    assert (p.clips, p.crop, p.num_real, p.split) == ("random", "random", 0, "train")
    assert p.unbiased and p.total_samples == 40_000


def test_magvit_on_k600():
    p = protocols.choose("magvit_k600")
    assert (p.given_frames, p.num_frames - p.given_frames) == (5, 11)
    assert (p.size, p.compare_size, p.num_samples, p.folds) == ((128, 128), (64, 64), 50_000, 4)
    assert p.temporal_clips * p.spatial_clips == 6 and p.split == "eval"


@pytest.mark.parametrize("kind, span", [("16f", 16), ("128f", 128), ("128f_subsample8f", 121)])
def test_styleganv(kind, span):
    p = protocols.choose(f"styleganv_{kind}")
    assert p.num_real == p.num_samples == 2048 and not p.unbiased and p.jpeg_quality == 95
    assert p.span == span


def test_a_changed_protocol_has_no_papers_name():
    p = protocols.choose("magvit_ucf101", ("num_samples=256", "folds=1"))
    assert (p.name, p.source) == ("custom", "magvit_ucf101, changed")
    assert (p.num_samples, p.folds, p.size) == (256, 1, (128, 128))
    assert protocols.choose("magvit_ucf101", ("folds=4",)).name == "magvit_ucf101"


def test_records_hold_protocols():
    for p in protocols.PROTOCOLS.values():
        assert protocols.read(config_lib.to_dict(p)) == p


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("magvit", (), "No protocol 'magvit'.*magvit_ucf101"),
        ("custom", ("frames=3",), "Nothing reads protocol.frames.*num_frames"),
        ("custom", ("folds=0",), "protocol.folds must be at least 1, got 0"),
        ("custom", ("given_frames=16",), "at least one must be left"),
        ("custom", ("clips=odd",), "protocol.clips"),
        ("custom", ("compare_resize=nearest",), "No resize is named 'nearest'"),
        ("custom", ("jpeg_quality=101",), "at most 100"),
    ],
)
def test_mistakes_are_one_sentence(name, changes, words):
    with pytest.raises(UserError, match=words):
        protocols.choose(name, changes)
