"""Training in bfloat16 on real clips, adversarial losses included, beside the same in float32."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from walt_jax.data.preparation import prepare_dataset
from walt_jax.training.metrics import read_metrics

REPO = Path(__file__).parents[2]
CLIPS = Path(os.environ.get("WALT_TEST_DATA", REPO.parent / "shared" / "clips"))
OVERRIDES = {
    "task.model.channels": 8,
    "task.model.multipliers": (1, 2, 2, 4),
    "task.model.norm_groups": 4,
    "task.adversarial.discriminator.channels": 8,
    "num_steps": 200,
    "batch_size": 4,
    "data.fps": 8.0,
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup_steps": 20,
    "log_every": 10,
    "eval_every": 200,
    "preview_every": 0,
    "checkpoint_every": 200,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no real clips at {CLIPS}"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "records"
    prepare_dataset(CLIPS, path, short_side=32)
    return path


def curves(records, workdir, dtype):
    """The metrics of a training on one device, in a process without the tests' options."""
    dtypes = {f"task.{k}.dtype": dtype for k in ("model", "adversarial.discriminator")}
    values = OVERRIDES | dtypes | {"data.path": records}
    command = [sys.executable, "-m", "walt_jax.train", "--workdir", str(workdir)]
    command += ["--config", "configs/tokenizer_ucf101.py:debug"]
    command += [f"--config.{key}={value}" for key, value in values.items()]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(command, cwd=REPO, env=environment, check=True)
    names = ("loss", "mse", "discriminator", "grad_norm")
    return {name: np.array(read_metrics(workdir, f"train/{name}")[1]) for name in names}


def test_bfloat16_follows_float32(records, tmp_path):
    ours = {dtype: curves(records, tmp_path / dtype, dtype) for dtype in ("float32", "bfloat16")}
    for of_dtype in ours.values():
        assert all(np.isfinite(values).all() for values in of_dtype.values())
    last = {dtype: of_dtype["mse"][-5:].mean() for dtype, of_dtype in ours.items()}
    assert last["bfloat16"] < 0.5 * ours["bfloat16"]["mse"][0]
    assert abs(last["bfloat16"] / last["float32"] - 1.0) < 0.15
