"""Real processes: a score killed by -9 and gone on with, by one process and by two."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from walt_jax.evaluation import scores
from walt_jax.evaluation.scoring import FOLDER

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SAVING = """
import time
from walt_jax import cli, evaluate
from walt_jax.evaluation import partial
partial.SAVE_EVERY, save = 0.0, partial._Sums.save
partial._Sums.save = lambda self: (save(self), time.sleep({pause}))  # to be killed in
cli.run(evaluate.main)
"""
ARGUMENTS = (
    *("checkpoint", "--features=tiny_features:load", "--protocol.num_frames=5"),
    *("--protocol.num_samples=16", "--protocol.folds=2", "--steps=2"),
)


def start(workdir, *extra, devices=1, pause=0.0):
    """`python -m walt_jax.evaluate checkpoint` in the background, saving at every batch."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    command = [sys.executable, "-c", SAVING.format(pause=pause), *ARGUMENTS]
    command += ["--workdir", str(workdir), "--per_device=2", *extra]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def pair(workdir, devices=1, pause=0.0):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    options = {"devices": devices, "pause": pause}
    return [start(workdir, *flags, f"--process_id={i}", **options) for i in range(2)]


def finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors


def only(workdir):
    (score,) = scores.read_scores(workdir)
    assert not list((workdir / FOLDER).glob("sums-*"))
    return score


def kill_in_the_middle(workdir, *processes):
    """As soon as some of the samples are counted."""
    deadline = time.monotonic() + 600
    while not list((workdir / FOLDER).glob("sums-*/sums*.npz")):
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (workdir / scores.SCORES).exists()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, denoiser_run):
    """The score by one process with one device, undisturbed."""
    run = shutil.copytree(denoiser_run, tmp_path_factory.mktemp("straight") / "run")
    finish(start(run))
    return only(run)


def same(score, other):
    assert score.record["samples"] == other.record["samples"]
    np.testing.assert_allclose(score.folds, other.folds, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 4])
def test_two_processes_score_as_one(copied, straight, devices):
    finish(*pair(copied, devices))
    same(only(copied), straight)


def test_eight_devices_score_as_one(copied, straight):
    finish(start(copied, devices=8))
    same(only(copied), straight)


def test_a_killed_process_goes_on(copied, straight):
    process = start(copied, pause=2.0)
    kill_in_the_middle(copied, process)
    again = start(copied)
    _, errors = again.communicate(timeout=900)
    assert again.returncode == 0 and "goes on" in errors, errors
    same(only(copied), straight)


def test_one_process_goes_on_with_what_two_left(copied, straight):
    processes = pair(copied, pause=2.0)
    kill_in_the_middle(copied, *processes)
    finish(start(copied, devices=2))
    same(only(copied), straight)


def test_a_mistake_is_one_line(copied):
    process = start(copied, "--protocol.num_frames=99")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: The protocol custom needs videos of 99")
    assert "Traceback" not in errors


def test_every_line_is_whole(copied):
    """Two jobs write to one file."""
    processes = [start(copied), start(copied, "--seed=1")]
    finish(*processes)
    lines = (copied / scores.SCORES).read_text().splitlines()
    assert {json.loads(line)["record"]["samples"]["seed"] for line in lines} == {0, 1}
