"""Weights as one plain file."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors

from walt_jax import config as config_lib
from walt_jax import export as export_module
from walt_jax.errors import UserError
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.weights import load_weights

sys.path.append(str(Path(__file__).parent / "training"))
import tiny_task


@pytest.fixture(scope="module")
def run(tmp_path_factory, sprite_records):
    folder = tmp_path_factory.mktemp("run")
    values = tiny_task.get_config().to_dict()
    values |= {"num_steps": 3, "mesh": {"data": 2, "context": -1}}
    values["data"]["path"] = str(sprite_records)
    train(config_lib.build(Experiment, values), folder, quiet=True)
    return folder


@pytest.mark.parametrize("part", ["ema", "params"])
def test_every_array_is_there_as_it_was(run, tmp_path, part, capsys):
    file = tmp_path / "weights" / "tiny.safetensors"
    export_module.main(["--workdir", str(run), "--output", str(file), "--part", part])
    assert f"{part} of step 3 in {file}" in capsys.readouterr().out
    with Checkpoints(run, read_only=True) as checkpoints:
        tree = checkpoints.restore_part((part,))[part]
    arrays = load_weights(str(file))
    assert sorted(arrays) == [f"{a}/{b}" for a in ("first", "last") for b in ("bias", "kernel")]
    for name, x in arrays.items():
        network, leaf = name.split("/")
        np.testing.assert_array_equal(x, tree[network][leaf])
    assert len(arrays) == len(jax.tree.leaves(tree)) and not list(file.parent.glob("*.tmp"))
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["config"]) == config_lib.read_resolved(run)
    assert (metadata["step"], metadata["part"]) == ("3", part)


def test_bad_arguments_are_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export_module.export(run, tmp_path / "x.npz")
    with pytest.raises(UserError, match="No checkpoint of step 7"):
        export_module.export(run, tmp_path / "x.safetensors", step=7)
    with pytest.raises(UserError, match="holds no run"):
        export_module.export(tmp_path, tmp_path / "x.safetensors")
