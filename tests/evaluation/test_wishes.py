"""What samples are to show: classes, text, and the frames that they continue."""

import dataclasses

import jax
import numpy as np
import pytest
from runs import save_run

from walt_jax import config as config_lib
from walt_jax.diffusion import Ddim
from walt_jax.errors import UserError
from walt_jax.evaluation.clips import Clips
from walt_jax.evaluation.evaluators import Sampling
from walt_jax.evaluation.protocols import Protocol
from walt_jax.evaluation.wishes import Wishes
from walt_jax.generation import Generator
from walt_jax.tasks import to_uint8, to_unit
from walt_jax.training.experiment import Experiment
from walt_jax.training.tokenizers import keep_tokenizer

PROTOCOL = Protocol(num_frames=5, fps=4.0, size=(32, 32), num_samples=30)


@pytest.fixture(scope="module")
def real(sprite_records):
    return Clips(sprite_records, PROTOCOL)


@pytest.fixture(scope="module")
def generator(denoiser_run):
    return Generator.load(denoiser_run)


def wishes(generator, real, sampling=Sampling(), **changes):  # noqa: B008
    return Wishes(generator, dataclasses.replace(PROTOCOL, **changes), real, sampling)


def test_classes_in_turn(generator, real):
    made = wishes(generator, None)
    assert made.labels.tolist() == list(range(30))  # of 48
    assert made(np.array([29, 3])).label.tolist() == [29, 3]


def test_classes_of_the_real_videos(generator, real):
    made = wishes(generator, real, labels="real", num_samples=4000)
    assert set(made.labels) == set(real.labels)
    again = wishes(generator, real, labels="real", num_samples=4000)
    np.testing.assert_array_equal(made.labels, again.labels)
    other = wishes(generator, real, Sampling(seed=1), labels="real", num_samples=4000)
    assert (other.labels != made.labels).any()


def test_statistics_have_no_classes_and_no_frames(generator):
    with pytest.raises(UserError, match="takes the real clips' classes: give the videos"):
        wishes(generator, None, labels="real")


def test_a_model_without_given_frames(generator, real):
    with pytest.raises(UserError, match=r"gives 1 frames.*given='none'"):
        wishes(generator, real, given_frames=1)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tokenizer_run, sprite_records):
    """A denoiser of frame prediction, as W.A.L.T's on Kinetics-600."""
    values = config_lib.load("configs/walt_k600.py:debug")
    values["task"]["tokenizer"] = str(tokenizer_run)
    values["data"] |= {"path": str(sprite_records), "fps": 4.0}
    workdir = tmp_path_factory.mktemp("predictor") / "run"
    experiment = config_lib.build(Experiment, values)
    save_run(workdir, experiment, (1,))
    keep_tokenizer(experiment.task.prepare(str(workdir)), workdir)
    return Generator.load(workdir)


@pytest.mark.slow
def test_samples_continue_real_clips(predictor, real):
    made = wishes(predictor, real, given_frames=1)
    options = {"sampler": Ddim(num_steps=2), "per_device": 1}
    numbers, videos = zip(*predictor.stream(np.arange(8), made, **options))
    numbers, videos = np.concatenate(numbers), np.concatenate(videos)
    clips = np.stack([real.read(int(made._order[i])) for i in numbers])
    assert len({clip.tobytes() for clip in clips}) == 8
    tokenizer = predictor.tokenizer
    back = jax.jit(lambda x: tokenizer.decode(tokenizer.encode(to_unit(x))))
    first = to_uint8(back(clips[:, :1]))
    assert np.abs(videos[:, :1].astype(int) - first).max() <= 1
    assert np.abs(videos[:, 1:].astype(int) - clips[:, 1:]).max() > 10
