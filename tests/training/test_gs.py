"""Workdirs on gs://: what is written by path, on a file system in memory that stands for it."""

import dataclasses
import json
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from test_checkpoints import PROGRESS, numbers

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.goodput import ALIVE, Goodput
from walt_jax.training.metrics import METRICS, read_metrics
from walt_jax.training.optimizers import OptimizerConfig
from walt_jax.training.writers import _JsonLines

WORKDIR = "gs://bucket/run"


def test_a_config_claims_its_folder(bucket):
    config_lib.claim_workdir(WORKDIR, OptimizerConfig())
    assert list(bucket) == ["/bucket/run/config.json"]
    config_lib.claim_workdir(WORKDIR, OptimizerConfig())
    with pytest.raises(UserError, match="started with another config"):
        config_lib.claim_workdir(WORKDIR, OptimizerConfig(b1=0.5))
    assert config_lib.read_resolved(WORKDIR)["b1"] == 0.9


def test_metrics_are_appended_by_the_next_attempt(bucket):
    for attempt in (0, 1):
        writer = _JsonLines(epath.Path(WORKDIR) / METRICS)
        for step in (1, 2):
            writer.write_scalars(attempt + step, {"train/loss": 10.0 * attempt + step})
    steps, values = read_metrics(WORKDIR, "train/loss")
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [1, 11, 12])
    assert list(bucket) == [f"/bucket/run/{METRICS}"]  # no temporary one


def test_signs_of_life_are_left(bucket):
    Goodput(WORKDIR, writes=True).alive(3)
    assert json.loads(bucket[f"/bucket/run/{ALIVE}"].getvalue())["step"] == 3
    second = Goodput(WORKDIR, writes=False)
    second.resume({"step": 5.0}, 0.0)
    assert second.spent["step"] == 5 and second.spent["lost"] > 1e9 > second.spent["down"]


def test_damaged_checkpoints_are_moved_out_of_the_way(bucket, tmp_path):
    """All but the arrays, which only tensorstore reads from Cloud."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(numbers(step), dataclasses.replace(PROGRESS, step=step))
    local, there = tmp_path / "checkpoints", epath.Path(WORKDIR) / "checkpoints"
    for attempt in (1, 2):  # the second run writes step 4 anew, and it is damaged again
        for file in (p for p in local.rglob("*") if p.is_file()):
            (there / str(file.relative_to(local))).write_bytes(file.read_bytes())
        for step in (2, 4):
            (there / str(step) / "commit_success.txt").write_text("orbax wrote all")
        (there / "6" / "contents" / "metadata").write_text("{")  # a save that was cut off
        (there / "4" / "contents" / "metadata").write_text("{")
        with Checkpoints(WORKDIR, read_only=True) as checkpoints:
            assert checkpoints.steps == [2, 4]
        with Checkpoints(WORKDIR) as checkpoints:
            checkpoints.restore_part(())
            assert checkpoints.restored == checkpoints.latest == 2
            assert not (there / "6").exists()
        names = ["4", "4-1"][:attempt]
        damaged = epath.Path(WORKDIR) / "damaged"
        assert sorted(p.name for p in damaged.iterdir()) == [*names, "README"]
        assert all((damaged / name / "progress" / "metadata").exists() for name in names)
        assert not (there / "4").exists()
    assert all(name.startswith("/bucket/run/") for name in bucket)


def test_half_a_checkpoint_is_not_the_last_good_one(bucket, monkeypatch):
    def full(manager):
        for step in (2, 4):
            (epath.Path(WORKDIR) / f"checkpoints/{step}/contents/metadata").write_text("{")
        (epath.Path(WORKDIR) / "checkpoints/2/commit_success.txt").write_text("orbax wrote all")
        raise OSError("no room")

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", full)
    with pytest.raises(UserError, match=r"no room.*last good one is of step 2"):
        Checkpoints(WORKDIR).finish()


def test_a_missing_library_is_named_before_training(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(UserError, match=r"gs://bucket/run need .*: pip install google-cloud-sto"):
        Checkpoints(WORKDIR)
