"""A tiny model that takes text, given latents, images and other sizes; of random weights."""

import pytest
from runs import save_run

import walt_jax
from walt_jax import config as config_lib
from walt_jax.training.experiment import Experiment
from walt_jax.training.tokenizers import keep_tokenizer


@pytest.fixture(scope="session")
def given_run(tmp_path_factory, denoiser_values, sprite_records):
    """Its workdir: 9 frames of 32x32 at 4 fps, latents (3, 4, 4)."""
    values = config_lib.override(
        dict(denoiser_values),
        [
            "task.model.num_classes=0",
            "task.model.grid=(3, 4, 4)",
            "task.model.windows=((1, 0, 0), (0, 2, 2))",
            "task.model.positions=fractional",
            "task.model.relative_bias=False",
            "task.model.given=channels",
            "task.given.first=0.3",
            "task.given.last=0.2",
            "task.given.ends=0.2",
            "task.given.region=0.2",
            "task.model.text_features=8",
            "task.text.width=8",
            "task.text.num_layers=1",
            "task.text.num_heads=2",
            "task.text.max_bytes=24",
            "data.caption_bytes=24",
            "data.num_frames=9",
            "image_batch_size=2",
        ],
    )
    values["images"] = values["data"] | {"path": str(sprite_records), "num_frames": 1}
    workdir = tmp_path_factory.mktemp("given") / "run"
    experiment = config_lib.build(Experiment, values)
    save_run(workdir, experiment, (7,))
    keep_tokenizer(experiment.task.prepare(str(workdir)), workdir)
    return workdir


@pytest.fixture(scope="session")
def walt(given_run):
    return walt_jax.load(given_run)
