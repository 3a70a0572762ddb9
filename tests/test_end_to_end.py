"""The whole way at the smallest size: what `make demo` runs, and the commands after it."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from walt_jax import config as config_lib
from walt_jax import demo, encode, sample
from walt_jax.data.pipeline import Pipeline
from walt_jax.data.records import open_dataset
from walt_jax.diffusion import Ddim
from walt_jax.errors import UserError
from walt_jax.generation import Generator
from walt_jax.tasks import to_unit
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.metrics import read_metrics
from walt_jax.training.tokenizers import load_tokenizer

STEPS = Ddim(num_steps=2)
SCALE = demo.Scale(variant="debug", num_sprites=48, epochs=1, num_samples=4, num_steps=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo's folder and summary."""
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(out, None, SCALE)


def test_the_demo_writes_what_it_promises(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {
        "tokenizer_psnr_db",
        "denoiser_loss_first",
        "denoiser_loss_last",
        "samples",
        "colour_right",
        "shape_right",
        "direction_right",
        "colour_chance",
        "shape_chance",
        "direction_chance",
        "seconds",
    } <= summary.keys()
    assert summary["samples"] == 4 and np.isfinite(summary["tokenizer_psnr_db"])
    page = (out / "index.html").read_text()
    for file in (out / "media").iterdir():
        assert f"media/{file.name}" in page and file.stat().st_size > 0


def test_the_denoisers_workdir_stands_alone(finished, tmp_path, monkeypatch):
    """Sampling needs neither the tokenizer's run nor the data."""
    out, _ = finished
    alone = tmp_path / "moved"
    (out / "denoiser").rename(alone)
    try:
        sample.main(["--workdir", str(alone), "--labels", "red square left,3", "--num", "3",
                     "--guidance", "2", "--steps", "2", "--out", str(tmp_path / "s")])  # fmt: skip
    finally:
        alone.rename(out / "denoiser")
    files = {f.name for f in (tmp_path / "s").iterdir()}
    written = {"0000.mp4", "0001.mp4", "0002.mp4"}
    assert files == written | {"grid.png", "index.html", "samples.jsonl"}
    assert "red square left" in (tmp_path / "s" / "index.html").read_text()


def test_a_sample_depends_on_its_seed_and_label_only(finished):
    generator = Generator.load(finished[0] / "denoiser")
    labels = np.arange(10, dtype=np.int32)
    whole = generator.sample(labels, sampler=STEPS, batch_size=16, progress=False)
    parts = generator.sample(labels, sampler=STEPS, batch_size=8, progress=False)
    assert whole.shape == (10, 5, 32, 32, 3) and whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - parts).max() <= 1
    other = generator.sample(labels, sampler=STEPS, seed=1, progress=False)
    assert np.abs(whole.astype(int) - other).max() > 1


def test_an_unknown_class_is_one_sentence(finished):
    generator = Generator.load(finished[0] / "denoiser")
    with pytest.raises(UserError, match="No class 'purple cow'"):
        generator.labels(["purple cow"])


def test_encoding_again_is_refused_and_a_foreign_tokenizer_too(finished, tmp_path):
    out, _ = finished
    with pytest.raises(UserError, match="holds a dataset"):
        encode.main(["--workdir", str(out / "tokenizer"), "--output", str(out / "latents")])
    values = config_lib.load("configs/sprites_tokenizer.py:debug")
    values["data"]["path"] = str(out / "records")
    values["seed"] = 1
    train(config_lib.build(Experiment, values | {"num_steps": 1}), tmp_path / "other", quiet=True)
    values = config_lib.load("configs/sprites_walt.py:debug")
    values["task"]["tokenizer"] = str(tmp_path / "other")
    values["data"]["path"] = str(out / "latents")
    with pytest.raises(UserError, match="encode the videos again"):
        train(config_lib.build(Experiment, values), tmp_path / "walt", quiet=True)


def test_the_denoiser_trains_on_videos_too(finished, tmp_path):
    """Without cached latents, clips are encoded in the step; and the loop scores samples."""
    out, _ = finished
    values = config_lib.load("configs/sprites_walt.py:debug")
    values["task"]["tokenizer"] = str(out / "tokenizer")
    values["data"]["path"] = str(out / "records")
    values |= {"num_steps": 2, "preview_every": 0}
    sampling = {"changes": ("num_frames=5", "num_samples=2"), "num_steps": 2}
    values["evaluators"] = ({"name": "read_back", "every": 1, "sampling": sampling},)
    scores = train(config_lib.build(Experiment, values), tmp_path / "walt", quiet=True)
    assert 0.1 < scores["eval/loss"] < 10
    steps, shares = read_metrics(tmp_path / "walt", "score/read_back")
    assert steps.tolist() == [1, 2] and shares[-1] == scores["score/read_back"]


def _configs():
    """All; those that are much like another one, and most of the family, are slow tests."""
    alike = ("tokenizer_k600", "tokenizer_imagenet", "walt_k600", "walt_sr2", "walt_imagenet")
    alike += ("sprites_text", "walt_sr1", "tokenizer_t2v")
    for path in sorted(Path("configs").rglob("*.py")):
        later = path.parent.name == "family" and path.stem != "dit"
        later = later or path.stem in alike
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * later)


@pytest.mark.parametrize("path", _configs())
def test_every_config_takes_a_debug_step(finished, tmp_path, path):
    out, _ = finished
    values = config_lib.load(f"{path}:debug")
    for part in ("data", "images"):
        if values.get(part):
            values[part]["path"] = str(out / "records")
    if values["task"]["name"] == "denoiser":
        values["task"]["tokenizer"] = str(out / "tokenizer")
        if values["data"]["num_frames"] > 1 and not values["task"]["model"].get("upsampling"):
            values["data"]["path"] = str(out / "latents")
    experiment = config_lib.build(Experiment, values | {"num_steps": 1, "preview_every": 1})
    scores = train(experiment, tmp_path / "run", quiet=True)
    assert scores and all(np.isfinite(v) for v in scores.values())
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert "preview" in events.Tags()["images"]
    (shown,) = events.Images("preview")
    assert shown.encoded_image_string[:3] == b"GIF"
    assert set(read_metrics(tmp_path / "run", "train/loss")[0]) == {1}


@pytest.mark.slow
def test_a_denoiser_starts_from_another_run(finished, tmp_path):
    """Text, images, another grid: the step-0 evaluation is that of the weights it starts from."""
    out, _ = finished
    values = config_lib.load("configs/walt_t2v.py:debug") | {"num_steps": 2, "preview_every": 0}
    values["task"]["tokenizer"] = str(out / "tokenizer")
    values["data"]["path"] = str(out / "latents")
    values["images"]["path"] = str(out / "records")
    values["optimizer"] |= {"learning_rate": 0.05}
    first = train(config_lib.build(Experiment, values), tmp_path / "first", quiet=True)
    values["task"]["init_from"] = str(tmp_path / "first")
    values["num_steps"] = 1
    train(config_lib.build(Experiment, values), tmp_path / "second", quiet=True)
    steps, losses = read_metrics(tmp_path / "second", "eval/loss")
    assert steps[0] == 0 and losses[0] == pytest.approx(first["eval/loss"], rel=1e-4)
    assert losses[0] != pytest.approx(read_metrics(tmp_path / "first", "eval/loss")[1][0], rel=1e-3)
    videos = tmp_path / "videos"
    sample.main(["--workdir", str(tmp_path / "second"), "--prompt", "a red square", "--num", "2",
                 "--sampler", "dpmpp_2m", "--steps", "2", "--guidance", "2", "--out", str(videos),
                 "--guidance_schedule", "power_cosine"])  # fmt: skip
    assert (videos / "0001.mp4").exists()
    assert "a red square" in (videos / "index.html").read_text()
    long = ["--prompt", "x" * 300, "--out", str(tmp_path / "none"), "--steps", "2"]
    with pytest.raises(UserError, match="make it shorter"):
        sample.main(["--workdir", str(tmp_path / "second"), *long])


def test_a_failed_start_leaves_the_workdir_free(finished, tmp_path):
    """A mistyped path must not claim the workdir for the wrong config."""
    out, _ = finished
    values = config_lib.load("configs/sprites_tokenizer.py:debug")
    values["data"]["path"] = str(tmp_path / "mistyped")
    with pytest.raises(UserError, match="not a complete dataset"):
        train(config_lib.build(Experiment, values), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()
    values["data"]["path"] = str(out / "latents")
    with pytest.raises(UserError, match="holds latents"):
        train(config_lib.build(Experiment, values), tmp_path / "run", quiet=True)
    # What is found at compiling, with the tokenizer loaded by then.
    values = config_lib.load("configs/sprites_walt.py:debug", ["task.model.grid=(2,8,8)"])
    values["task"]["tokenizer"] = str(out / "tokenizer")
    values["data"]["path"] = str(out / "latents")
    with pytest.raises(UserError, match="do not fit this denoiser"):
        train(config_lib.build(Experiment, values), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_damaged_checkpoint_is_one_sentence(finished, tmp_path):
    out, _ = finished
    shutil.copytree(out / "denoiser", tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint / "ema")
    with pytest.raises(UserError, match=r"damaged.*delete"):
        Generator.load(tmp_path / "run")


def test_the_demo_keeps_what_is_not_its_own(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "mine.mp4").write_bytes(b"mine")
    for videos in (tmp_path / "videos", None):
        with pytest.raises(UserError, match="give another --out"):
            demo.run(tmp_path, videos, SCALE)
    assert (tmp_path / "videos" / "mine.mp4").read_bytes() == b"mine"


def test_latents_are_normalised_by_the_weights_that_encode(finished):
    """Mean and std are the moving average's on the held-out clips, not those of training."""
    tokenizer = load_tokenizer(finished[0] / "tokenizer")
    values = config_lib.read_resolved(finished[0] / "tokenizer")
    experiment = config_lib.build(Experiment, values)
    pipeline = Pipeline(
        open_dataset(experiment.data.path),
        dataclasses.replace(experiment.data, num_workers=0),
        batch_size=experiment.batch_size,
        seed=0,
        split="eval",
        shuffle=False,
    )
    batches = itertools.islice(pipeline.batches(), experiment.eval_batches)
    encode = jax.jit(lambda x: tokenizer.encode(to_unit(x)))
    z = np.concatenate([encode(batch["video"]) for batch in batches])
    np.testing.assert_allclose(z.mean((0, 1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(z.std((0, 1, 2, 3)), 1, atol=1e-3)


def test_latents_carry_the_tokenizer(finished):
    latents = open_dataset(finished[0] / "latents")
    records = open_dataset(finished[0] / "records")
    assert set(latents.index["source"]) <= set(records.index["source"])
    record = latents.read(0)
    assert record["tokenizer_hash"] == latents.metadata["tokenizer_hash"]
    assert record["latents"].shape == (2, 4, 4, 8) and record["latents"].dtype == np.float16
    assert latents.label_names == records.label_names
    assert len(jax.devices()) == 8  # all of the above ran on a mesh
