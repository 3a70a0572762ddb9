"""What a config or a command asks to be scored."""

import types

import numpy as np
import pytest
import tiny_features

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.evaluation import evaluators
from walt_jax.evaluation.evaluators import ClipMatch, Evaluator, Fid
from walt_jax.evaluation.protocols import Protocol

SAMPLES = types.SimpleNamespace(
    protocol=Protocol(num_frames=5, num_samples=2, folds=2),
    texts=("red", "a blue square", "green"),
    mesh=None,
)
VIDEOS = np.random.default_rng(0).integers(0, 256, (4, 5, 8, 8, 3), np.uint8)


def test_named_in_a_config():
    values = {"name": "fid", "allow": ("trained",), "kernel_videos": 9}
    fid = config_lib.build(Evaluator, values, "config.evaluators")
    assert fid == Fid(allow=("trained",), kernel_videos=9) and fid.features == "inception"


@pytest.mark.parametrize("trained, name", [(True, "clip_match"), (False, "clip_fixture")])
def test_each_video_is_matched_with_its_own_prompt(monkeypatch, trained, name):
    asked = []

    class Match:
        images = tiny_features.load(allow=("trained",) * trained)

        def __call__(self, videos, texts):
            return np.array([v.mean() * len(t) for v, t in zip(videos, texts)])

    def load(*args):
        asked.append(args)
        return Match()

    monkeypatch.setattr(evaluators, "_text_match", load)
    measure = ClipMatch(weights="folder", allow=("trained",)).measure(SAMPLES)
    assert asked == [("folder", None, ("trained",))]
    for numbers in (np.array([3, 0]), np.array([1, 2])):
        measure.add(numbers, VIDEOS[numbers])
    means = VIDEOS.mean((1, 2, 3, 4)) * [3, 13, 5, 3]
    (found,) = measure.results().values()
    assert measure.results().keys() == {name}
    np.testing.assert_allclose(found, means.reshape(2, 2).mean(1))
    assert measure.record["features"]["trained"] is trained


def test_a_model_without_text_is_not_matched():
    samples = types.SimpleNamespace(**vars(SAMPLES) | {"texts": ()})
    with pytest.raises(UserError, match="clip needs a model of text"):
        ClipMatch().measure(samples)
