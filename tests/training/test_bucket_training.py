"""Training on buckets: every shape is compiled before the first step, and clips are counted."""

import logging

import pytest

from walt_jax import config as config_lib
from walt_jax.data.pipeline import Pipeline
from walt_jax.data.records import open_dataset
from walt_jax.errors import UserError
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.program import Program

TABLE = (
    {"resolution": 32, "num_frames": 9, "keep": 0.5, "batch_size": 8},
    {"resolution": 32, "num_frames": 5, "batch_size": 16},
)


def experiment(records, table=TABLE, **changes):
    values = config_lib.load("configs/sprites_tokenizer.py:debug")
    values["data"] |= {"path": str(records), "fps": 4.0, "eval_fraction": 0.0}
    values["data"]["buckets"] = {"table": table, "aspects": (1.0,), "multiple": 16}
    values |= {"num_steps": 4, "preview_every": 0, **changes}
    return config_lib.build(Experiment, values)


@pytest.mark.slow
def test_all_buckets_are_compiled_before_the_first_step(tmp_path, sprite_records, caplog):
    caplog.set_level(logging.INFO, logger="walt_jax")
    built = experiment(sprite_records)
    pipeline = Pipeline(open_dataset(sprite_records), built.data, batch_size=8, seed=built.seed)
    batches = [pipeline.plan(k)[0] for k in range(4)]
    assert len(pipeline.shapes()) == 2 and len(set(batches)) == 2
    train(built, tmp_path / "run")
    lines = [record.getMessage() for record in caplog.records]
    compiled = [i for i, line in enumerate(lines) if line.startswith("compiled")]
    steps = [i for i, line in enumerate(lines) if line.startswith("step")]
    assert len(compiled) == 2
    told = " ".join(lines[i] for i in compiled)
    assert "9, 32, 32" in told and "5, 32, 32" in told
    assert not steps or max(compiled) < min(steps)


def test_a_batch_that_the_devices_do_not_divide_is_told(tmp_path, sprite_records):
    table = (TABLE[0] | {"batch_size": 6}, TABLE[1])
    with pytest.raises(UserError, match=r"resolution 32, 9 frames.*multiple of the 8 devices"):
        train(experiment(sprite_records, table), tmp_path / "run", quiet=True)
    parts = experiment(sprite_records, batch_size=48, optimizer={"accumulate": 3})
    with pytest.raises(UserError, match=r"resolution 32, 9 frames.*8 devices.*accumulate=3\."):
        train(parts, tmp_path / "run", quiet=True)


def test_a_bucket_without_a_batch_size_takes_that_of_the_config(sprite_records):
    table = [{key: value for key, value in TABLE[1].items() if key != "batch_size"}]
    Program(experiment(sprite_records, table, batch_size=8), make_mesh(MeshConfig()))
