"""Training in bfloat16 on real clips, adversarial losses included, beside the same in float32."""

import os
from pathlib import Path

import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax.data.preparation import prepare_dataset
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.metrics import read_metrics

REPO = Path(__file__).parents[2]
CLIPS = Path(os.environ.get("WALT_TEST_DATA", REPO.parent / "shared" / "clips"))
STEPS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no real clips at {CLIPS}"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "records"
    prepare_dataset(CLIPS, path, short_side=64)
    return path


def curves(records, workdir, dtype):
    model = {"channels": 8, "multipliers": (1, 2, 2, 4), "num_res_blocks": 1, "norm_groups": 4}
    discriminator = {"channels": 8, "multipliers": (2, 4, 4), "clip": (9, 64, 64), "dtype": dtype}
    experiment = config_lib.build(
        Experiment,
        {
            "task": {
                "name": "tokenizer",
                "model": model | {"dtype": dtype},
                "adversarial": {"discriminator": discriminator},
            },
            "data": {"path": str(records), "num_frames": 9, "fps": 8.0, "sizes": ((64, 64),)},
            "num_steps": STEPS,
            "batch_size": 2,
            "optimizer": {
                "learning_rate": 5e-4, "warmup_steps": 20, "b1": 0.0, "b2": 0.99, "grad_clip": 0.0,
            },
            "log_every": 10,
        },
    )  # fmt: skip
    train(experiment, workdir)
    names = ("loss", "mse", "discriminator", "grad_norm")
    return {name: np.array(read_metrics(workdir, f"train/{name}")[1]) for name in names}


def test_bfloat16_follows_float32(records, tmp_path):
    ours = {d: curves(records, tmp_path / d, d) for d in ("float32", "bfloat16")}
    for of_dtype in ours.values():
        assert all(np.isfinite(values).all() for values in of_dtype.values())
    last = {d: values["mse"][-5:].mean() for d, values in ours.items()}
    assert last["bfloat16"] < 0.5 * ours["bfloat16"]["mse"][0]
    assert abs(last["bfloat16"] / last["float32"] - 1.0) < 0.15
