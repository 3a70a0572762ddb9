"""One score, whatever makes it: devices, batches, a kill in the middle."""

import dataclasses

import jax
import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.evaluation import partial, scores, scoring
from walt_jax.evaluation.evaluators import Fid, Fvd, Is, Sampling, SpriteReadBack
from walt_jax.generation import Generator
from walt_jax.parallel import MeshConfig, make_mesh

SAMPLING = Sampling(
    changes=("num_frames=5", "num_samples=10", "folds=2"), num_steps=2, per_device=2
)
FVD = Fvd(sampling=SAMPLING, features="tiny_features:load")


def score(workdir, evaluators=(FVD,), devices=8, step=3, **options):
    """Scores of a checkpoint."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    generator = Generator.load(workdir, step, mesh=mesh)
    values = config_lib.read_resolved(workdir)
    options = {"mesh": mesh, "progress": False} | options
    groups = scoring.make(evaluators, generator, values, workdir, **options)
    return [made for group in groups for made in group(generator)]


@pytest.fixture
def straight(copied):
    (made,) = score(copied)
    (copied / scores.SCORES).unlink()
    return made


def test_stand_in_weights_make_no_fvd(straight):
    assert straight.name == "frechet_fixture"
    assert len(straight.folds) == 2 and straight.folds[0] != straight.folds[1]
    assert all(np.isfinite(straight.folds)) and min(straight.folds) > 0


def same(a, b):
    np.testing.assert_allclose(a.folds, b.folds, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 3])
def test_the_score_is_that_of_any_number_of_devices(copied, straight, devices):
    (made,) = score(copied, devices=devices)
    same(made, straight)


def test_a_batch_of_another_size_changes_nothing(copied, straight):
    (made,) = score(copied, [dataclasses.replace(
        FVD, sampling=dataclasses.replace(SAMPLING, per_device=1))])  # fmt: skip
    same(made, straight)
    assert made.record != straight.record  # which says so, since on other devices it may


def test_a_killed_score_goes_on_with_what_it_has(copied, straight, monkeypatch):
    """Killed after some batches; the rest is made by another number of devices."""
    made, stream = [], Generator.stream

    def watched(self, numbers, *args, **kwargs):
        made.append(len(numbers))
        for batch in stream(self, numbers, *args, **kwargs):
            yield batch
            if len(made) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", watched)
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        score(copied, devices=3)
    assert not (copied / scores.SCORES).exists()
    (again,) = score(copied, devices=1)
    assert made == [20, 14]
    same(again, straight)
    assert not list((copied / scoring.FOLDER).glob("sums-*"))


def test_a_score_that_is_there_is_not_made_again(copied, monkeypatch):
    (first,) = score(copied)
    monkeypatch.setattr(Generator, "stream", None)
    (again,) = score(copied)
    assert again.folds == first.folds and again.time
    assert len(scores.read_scores(copied)) == 1


def test_the_record_says_what_it_depends_on(copied):
    (made,) = score(copied)
    (kept,) = scores.read_scores(copied)
    assert kept == dataclasses.replace(made, time=kept.time, record=kept.record)
    record = kept.record
    assert record["protocol"] == config_lib.to_dict(
        scoring.fitted(SAMPLING, Generator.load(copied, 3), config_lib.read_resolved(copied))
    ) | {"size": [32, 32]}
    assert record["protocol"]["fps"] == 4.0  # of the run
    assert record["covariance"] == "unbiased"
    assert record["real"].keys() >= {"fingerprint", "part", "videos", "clips", "seed"}
    assert record["samples"].keys() >= {
        *("step", "weights", "params", "tokenizer", "seed", "sampler", "guidance", "count")
    }
    assert record["samples"]["weights"] == "ema" and record["samples"]["step"] == 3
    assert record["features"]["trained"] is False and len(record["features"]["weights"]) == 64
    assert record["code"]["version"]
    assert (copied / scoring.FOLDER).glob("00000003-*.png")


def test_evaluators_of_one_sampling_share_their_samples(copied, straight, monkeypatch):
    calls, stream = [], Generator.stream
    monkeypatch.setattr(Generator, "stream", lambda *a, **k: calls.append(1) or stream(*a, **k))
    others = (
        Is(sampling=SAMPLING, features=FVD.features),
        Fid(sampling=SAMPLING, features="tiny_features:load_frames", allow=("trained",)),
    )
    made = score(copied, [FVD, *others, SpriteReadBack(sampling=SAMPLING)])
    assert len(calls) == 1
    assert [m.name for m in made] == [
        *("frechet_fixture", "is_fixture", "fvd_tiny"),
        *("read_back/colour", "read_back/shape", "read_back/direction", "read_back"),
    ]
    same(made[0], straight)
    assert 1 < made[1].value < 6 and made[2].value > 0
    assert all(0 <= m.value <= 1 for m in made[3:])
    assert made[-1].value <= min(m.value for m in made[3:-1])


def test_other_samples_score_otherwise(copied, straight):
    """Another checkpoint, seed and set of weights: each counts."""
    others = [
        score(copied, step=2),
        score(copied, [dataclasses.replace(FVD, sampling=dataclasses.replace(SAMPLING, seed=1))]),
        score(copied, [dataclasses.replace(FVD, weights="1")]),
    ]
    values = {made.folds for (made,) in others} | {straight.folds}
    assert len(values) == 4


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"changes": ("num_frames=5",)}, "how many samples.*num_samples"),
        ({"changes": ("num_frames=6", "num_samples=2")}, "needs videos of 6 frames.*makes 5"),
        ({"changes": ("num_frames=3", "num_samples=2")}, "tiny needs clips of at least 4 frames"),
        (
            {"changes": ("num_frames=5", "num_samples=2"), "features": "tiny_features:load_exact"},
            "tiny needs clips of 4 frames, but protocol.num_frames is 5",
        ),
        ({"changes": ("num_frames=5", "num_samples=2", "fps=8")}, "at 8 fps.*trained at 4"),
        ({"protocol": "magvit_ucf101"}, r"is of videos of \(128, 128\).*this run is of \(32, 32\)"),
        ({"changes": ("num_frames=5", "num_samples=2", "given_frames=1")}, "given='none'"),
        ({"changes": ("num_frames=5", "num_samples=2", "num_real=99")}, "gives 24 clips.*of 99"),
        ({"real_part": "eval"}, "num_samples"),
    ],
)
def test_what_does_not_fit_is_one_sentence(copied, changes, words):
    net = changes.pop("features", FVD.features)
    sampling = dataclasses.replace(SAMPLING, **({"changes": ()} | changes))
    if "real_part" in changes:
        sampling = dataclasses.replace(sampling, changes=("num_frames=5",))
    with pytest.raises(UserError, match=words) as error:
        score(copied, [dataclasses.replace(FVD, sampling=sampling, features=net)])
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert not (copied / scores.SCORES).exists()
