"""Weights as one plain file."""

import dataclasses
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
from walt_jax.generation import Generator
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.tokenizers import load_tokenizer
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_holds_all_that_sampling_needs(denoiser_run, tmp_path, dtype):
    folder = tmp_path / "model"
    assert export_module.export(denoiser_run, folder, dtype=dtype) == 3
    ours, theirs = Generator.load(folder), Generator.load(denoiser_run)
    near = {"atol": 0, "rtol": 0 if dtype == "float32" else 2**-8}
    for name in ("params", "tokenizer"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if name == "tokenizer":
            assert a.config == b.config and (a.hash == b.hash) == (dtype == "float32")
            a, b = (a.params, a.mean, a.std), (b.params, b.mean, b.std)
        assert {x.dtype for x in jax.tree.leaves(a)} == {np.dtype(np.float32)}
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **near), a, b)
    blank = dataclasses.replace(theirs.task, tokenizer="")
    assert (ours.task, ours.step, ours.weights) == (blank, 3, "ema")
    assert (ours.label_names, ours.fps) == (theirs.label_names, theirs.fps)
    assert load_tokenizer(folder).hash == ours.tokenizer.hash
    leaves = [*jax.tree.leaves(theirs.params), *jax.tree.leaves(theirs.tokenizer)]
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size < 1.1 * sum(x.size for x in leaves) * np.dtype(dtype).itemsize + 40_000
    assert str(denoiser_run.parent) not in (folder / "config.json").read_text()


def test_a_tokenizers_folder(tokenizer_run, tmp_path):
    assert export_module.export(tokenizer_run, tmp_path / "model", step=1) == 1
    ours, theirs = load_tokenizer(tmp_path / "model"), load_tokenizer(tokenizer_run, 1)
    assert ours.hash == theirs.hash != load_tokenizer(tokenizer_run).hash
    with pytest.raises(UserError, match="another task: sample from a denoiser's"):
        Generator.load(tmp_path / "model")


def test_a_folder_that_is_not_as_it_was_written(denoiser_run, tmp_path):
    folder = tmp_path / "model"
    export_module.export(denoiser_run, folder, step=2)
    export_module.export(denoiser_run, folder, step=3)  # an export may be replaced
    with pytest.raises(UserError, match="holds ema of step 3 alone"):
        Generator.load(folder, 2)
    file = folder / "denoiser.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"denoiser\.safetensors is not the file that export\.json"):
        Generator.load(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"holds no denoiser\.safetensors"):
        Generator.load(folder)
    about = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(UserError, match="of format 2, and this walt_jax reads 1"):
        Generator.load(folder)
    (folder / "export.json").unlink()
    with pytest.raises(UserError, match="holds something else than an export"):
        export_module.export(denoiser_run, folder)
    assert (folder / "config.json").exists()


def test_bad_arguments_are_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.safetensors, or be a folder"):
        export_module.export(run, tmp_path / "x.npz")
    with pytest.raises(UserError, match="No checkpoint of step 7"):
        export_module.export(run, tmp_path / "x.safetensors", step=7)
    with pytest.raises(UserError, match="holds no run"):
        export_module.export(tmp_path, tmp_path / "x.safetensors")
