"""A run goes on on another number of hosts, each of which holds a part of the parameters."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CONFIG = Path(__file__).with_name("tiny_task.py")


def train(workdir, records, hosts, steps, cache):
    """So many steps of the run, on hosts of one device each; what they said."""
    command = [sys.executable, "-m", "launch.local_pod", f"--processes={hosts}"]
    command += [f"--compilation_cache={cache}", "--preload=walt_jax.training.loop", "--"]
    command += ["python", "-m", "walt_jax.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.data.path={records}", "--config.batch_size=4"]
    command += [f"--config.mesh.fsdp={hosts}", "--config.optimizer.schedule=constant"]
    command += [f"--config.num_steps={steps}", "--replace_config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def logged(workdir, key):
    """step -> value."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


@pytest.mark.slow
def test_two_hosts_then_one_then_four_train_as_one(tmp_path, sprite_records):
    """The records of every batch are the same, the losses to the order of float sums."""
    straight, moved, cache = (tmp_path / name for name in ("straight", "moved", "cache"))
    train(straight, sprite_records, 1, 12, cache)
    said = [train(moved, sprite_records, n, steps, cache) for n, steps in [(2, 4), (1, 8), (4, 12)]]
    assert "goes on from step" not in said[0]
    assert "[0] goes on from step 4\n" in said[1] and "[0] goes on from step 8\n" in said[2]
    assert logged(moved, "train/rows") == logged(straight, "train/rows")
    ours, theirs = (logged(folder, "train/loss") for folder in (moved, straight))
    assert list(ours) == list(theirs) == list(range(1, 13))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
