"""Real processes: kill -9 and resume, two hosts, and the errors of the command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax.data.records import open_dataset
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.experiment import Experiment

CONFIG = "configs/sprites_tokenizer.py:debug"
QUICK = ("--config.preview_every=0", "--config.eval_every=100", "--config.checkpoint_every=2")


def start(workdir, records, *extra, devices=1, cache):
    """`python -m walt_jax.train` in the background."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "walt_jax.train", "--config", CONFIG]
    command += ["--workdir", str(workdir), f"--config.data.path={records}", *QUICK, *extra]
    command += ["--compilation_cache", str(cache)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Waits; returns what it wrote to stderr."""
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return errors


def newest(workdir):
    """The newest checkpoint's arrays, and its progress."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        arrays = checkpoints.restore_part(("step", "params", "ema", "opt_state", "extra"))
        folder = checkpoints.directory / str(checkpoints.restored) / "progress"
        return arrays, json.loads((folder / "metadata").read_text())


def losses(workdir):
    """step -> training loss."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, sprite_records):
    """An undisturbed run of 8 steps on one process with two devices."""
    folder = tmp_path_factory.mktemp("straight")
    run = start(folder / "run", sprite_records, "--config.num_steps=8", devices=2, cache=folder)
    finish(run)
    return folder / "run"


def test_a_killed_run_resumes_bit_for_bit(tmp_path, sprite_records, straight):
    compiled = set(straight.parent.glob("*-cache"))
    arguments = (tmp_path / "run", sprite_records, "--config.num_steps=8")
    process = start(*arguments, devices=2, cache=straight.parent)
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.latest in (2, 4)
    errors = finish(start(*arguments, devices=2, cache=straight.parent))
    assert "goes on from step" in errors
    assert compiled and set(straight.parent.glob("*-cache")) == compiled
    ours, theirs = newest(tmp_path / "run"), newest(straight)
    assert jax.tree.structure(ours[0]) == jax.tree.structure(theirs[0])
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    assert ours[1]["step"] == ours[1]["next_batch"] == theirs[1]["next_batch"] == 8
    assert ours[1]["clips"] == theirs[1]["clips"] == 64
    assert losses(tmp_path / "run") == losses(straight)


def test_two_processes_train_as_one(tmp_path, sprite_records, straight):
    """Every batch is the same, so the losses are: one process of two devices, two of one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        start(
            tmp_path / "run",
            sprite_records,
            "--config.num_steps=8",
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            cache=tmp_path / f"cache{i}",
        )
        for i in range(2)
    ]
    for process in processes:
        finish(process)
    ours, theirs = losses(tmp_path / "run"), losses(straight)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def encode(workdir, output, *extra, cache):
    """`python -m walt_jax.encode` in the background: 24 clips in 6 shards of 2 batches."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "walt_jax.encode", "--workdir", str(workdir)]
    command += ["--output", str(output), "--batch_size=2", "--batches_per_shard=2", *extra]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_killed_processes_encode_as_one(tmp_path, straight):
    """What kill -9 leaves is gone on with; the records are those of one process, bit for bit."""
    alone = encode(straight, tmp_path / "alone", cache=tmp_path / "cache")

    def pair():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
        return [
            encode(
                straight,
                tmp_path / "pair",
                *(*flags, f"--process_id={i}"),
                cache=tmp_path / f"cache{i}",
            )
            for i in range(2)
        ]

    finish(alone)
    killed = pair()
    deadline = time.monotonic() + 120
    while not any((tmp_path / "pair.parts").glob("0000?")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in killed:
        process.kill()
        process.communicate()
    assert not (tmp_path / "pair").exists()
    errors = [finish(process) for process in pair()]
    assert "of 6 shards are there" in errors[0]
    whole, parts = open_dataset(tmp_path / "alone"), open_dataset(tmp_path / "pair")
    assert len(whole) == 24 and parts.fingerprint == whole.fingerprint
    assert parts.metadata == whole.metadata
    assert not (tmp_path / "pair.parts").exists()
    for process in pair():  # the first process looks, all say what it found
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "holds a dataset" in errors.splitlines()[-1], errors


@pytest.mark.slow  # tests/training/test_survival.py has it within a process
def test_a_diverged_run_stops_and_names_the_step(tmp_path, sprite_records, straight):
    process = start(
        tmp_path / "run",
        sprite_records,
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.grad_clip=0.0",
        devices=2,
        cache=straight.parent,
    )
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: The loss is ") and " at step " in last
    assert "Traceback" not in errors


def test_another_config_in_the_workdir_is_refused(tmp_path, sprite_records):
    quick = [flag.removeprefix("--config.") for flag in QUICK]
    values = config_lib.load(CONFIG, [f"data.path={sprite_records}", "num_steps=8", *quick])
    config_lib.claim_workdir(tmp_path, config_lib.build(Experiment, values))
    process = start(tmp_path, sprite_records, "--config.num_steps=9", cache=tmp_path)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 2 and "num_steps: 8 -> 9" in errors, errors
    assert "Traceback" not in errors
