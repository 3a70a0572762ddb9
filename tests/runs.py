"""Runs with checkpoints that no training made: fresh weights, saved as the loop saves them."""

import json
import shutil

import jax
import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax.data.records import open_dataset
from walt_jax.training.checkpoints import Checkpoints, Progress
from walt_jax.training.experiment import Experiment
from walt_jax.training.state import TrainState
from walt_jax.training.tokenizers import keep_tokenizer


def save_run(workdir, experiment, steps):
    """A workdir with checkpoints of these steps, each of other weights."""
    config_lib.claim_workdir(workdir, experiment)
    dataset = open_dataset(experiment.data.path)
    about = {"label_names": dataset.label_names, "fps": experiment.data.fps, "fingerprint": ""}
    (workdir / config_lib.DATASET).write_text(json.dumps(about))
    shapes = jax.eval_shape(experiment.task.init, jax.random.key(0))
    extra = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), experiment.task.init_extra())
    if "latent_square" in extra:
        extra["latent_square"] += 1.0
    with Checkpoints(workdir, keep=len(steps)) as checkpoints:
        for step in steps:
            rng = np.random.default_rng(step)
            params = jax.tree.map(lambda x, rng=rng: drawn(x, rng), shapes)
            state = TrainState(np.asarray(step, np.int32), params, params, {}, extra)
            checkpoints.save(state, Progress(step=step, next_batch=step))


def drawn(shape, rng):
    """Weights of a size that lets signals through."""
    fan = max(1, np.prod(shape.shape[:-1]))
    return rng.normal(scale=1 / np.sqrt(fan), size=shape.shape).astype(shape.dtype)


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory, sprite_records):
    """A tokenizer's workdir with checkpoints 1 and 2."""
    values = config_lib.load("configs/sprites_tokenizer.py:debug")
    values["data"]["path"] = str(sprite_records)
    workdir = tmp_path_factory.mktemp("runs") / "tokenizer"
    save_run(workdir, config_lib.build(Experiment, values), (1, 2))
    return workdir


@pytest.fixture(scope="session")
def denoiser_values(tokenizer_run, sprite_records):
    """The config of a denoiser of 5 frames of 32x32, on pixels."""
    values = config_lib.load("configs/sprites_walt.py:debug")
    values["task"]["tokenizer"] = str(tokenizer_run)
    values["data"]["path"] = str(sprite_records)
    return values | {"num_steps": 3, "preview_every": 0, "eval_every": 100}


@pytest.fixture(scope="session")
def denoiser_run(tmp_path_factory, denoiser_values):
    """A denoiser's workdir with checkpoints 2 and 3, of 3 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "denoiser"
    experiment = config_lib.build(Experiment, denoiser_values)
    save_run(workdir, experiment, (2, 3))
    keep_tokenizer(experiment.task.prepare(str(workdir)), workdir)
    return workdir


@pytest.fixture
def copied(tmp_path, denoiser_run):
    """A denoiser's workdir of the test's own."""
    return shutil.copytree(denoiser_run, tmp_path / "denoiser")
