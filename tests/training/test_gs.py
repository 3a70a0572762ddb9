"""Workdirs on gs://: what is written by path, on a file system in memory that stands for it."""

import json

import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.training.goodput import ALIVE, Goodput
from walt_jax.training.metrics import METRICS, read_metrics
from walt_jax.training.optimizers import OptimizerConfig
from walt_jax.training.writers import _JsonLines

WORKDIR = "gs://bucket/run"


class Bucket(MemoryFileSystem):
    """Folders are there only where objects are, as in a bucket."""

    protocol = ("gs", "gcs")
    cachable = False
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **kwargs):
        pass


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    """What the bucket holds; TensorFlow's own way to Cloud has no stand-in."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: Bucket())
    monkeypatch.setattr(Bucket, "store", {})
    return Bucket.store


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
