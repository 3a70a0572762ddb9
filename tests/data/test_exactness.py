"""The same batches on any number of processes, across kill -9, and from one number of hosts to
another in the middle of an epoch; the position in the data is one number."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import video_record, write_latents, write_videos

from walt_jax.config import build
from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.records import open_dataset
from walt_jax.training.checkpoints import Progress

BATCH = 4
SHAPES = ((2, 4, 4, 8), (4, 8, 8, 8), (2, 8, 8, 8), (4, 4, 8, 8))
TABLE = (
    {"resolution": 40, "num_frames": 9, "keep": 0.5, "batch_size": 4},
    {"resolution": 40, "num_frames": 5, "batch_size": 8},
    {"resolution": 16, "num_frames": 5, "batch_size": 12},
    {"resolution": 16, "num_frames": 1, "batch_size": 8},
)
KINDS = {
    "one shape": {"sizes": ((16, 16),), "num_frames": 5},
    "buckets": {"buckets": {"table": TABLE, "multiple": 8, "aspects": (1.0, 1.6)}},
    "packed": {
        "packing": {
            "block": (2, 4, 4),
            "blocks": 10,
            "videos": 4,
            "drop": {"rate": 0.4, "distribution": "beta", "start": 0.1, "clips": 100},
        }
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Videos and images of several sizes and lengths, and latents of four shapes."""
    folder = tmp_path_factory.mktemp("exactness")
    sizes = ((40, 64), (48, 48), (16, 24), (24, 16))
    records = [
        video_record(i, (12, 6, 6, 1, 9)[i % 5], size=sizes[i % 4], source=f"{i}.mp4")
        for i in range(60)
    ]
    write_videos(folder / "videos", records)
    write_latents(folder / "latents", [f"{i}.mp4" for i in range(60)], SHAPES)
    return folder


def open_pipeline(folders, kind):
    """The pipeline of a kind; also in the processes below."""
    folder = str(Path(folders) / ("latents" if kind == "packed" else "videos"))
    values = {"path": folder, "fps": 0.0, "eval_fraction": 0.0, "num_threads": 2} | KINDS[kind]
    return Pipeline(open_dataset(folder), build(DataConfig, values), batch_size=BATCH, seed=7)


def digests(batch):
    """One for each row, of everything in it."""
    names = sorted(name for name in batch if name != "caption")
    return [
        hashlib.sha256(b"".join(batch[n][i].tobytes() for n in names)).hexdigest()[:16]
        for i in range(len(batch["label"]))
    ]


def read(pipeline, start, stop, process=0, processes=1):
    """The digests of a process's rows in batches start to stop."""
    share = BATCH // processes
    rows = (process * share, (process + 1) * share)
    batches = itertools.islice(pipeline.batches(start, rows), stop - start)
    return [digests(batch) for batch in batches]


def joined(parts):
    """The whole batches from those of all processes."""
    return [list(itertools.chain(*rows)) for rows in zip(*parts)]


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_may_change_in_mid_epoch(folders, kind):
    """Four hosts, then one, then two read the sequence of one: none is lost or repeated."""
    pipeline = open_pipeline(folders, kind)
    epoch = pipeline.batches_per_epoch
    marks = [0, epoch // 3, 2 * epoch // 3, epoch + 3]
    straight = read(open_pipeline(folders, kind), 0, marks[-1])
    found = []
    for (start, stop), processes in zip(itertools.pairwise(marks), (4, 1, 2)):
        parts = [
            read(open_pipeline(folders, kind), start, stop, i, processes) for i in range(processes)
        ]
        found += joined(parts)
    assert found == straight
    assert [len(rows) for rows in straight] == [len(pipeline.plan(k)[1]) for k in range(marks[-1])]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_each_video_once(folders, kind):
    """But for those that fill up the last batch of a bucket, and what the epoch leaves out."""
    pipeline = open_pipeline(folders, kind)
    rows = [row for k in range(pipeline.batches_per_epoch) for row in pipeline.plan(k)[1]]
    everything = pipeline.records.tolist()
    if kind == "packed":
        whole = pipeline.plan.epoch(0)
        assert Counter(v.record for row in whole for v in row) == Counter(everything)
        assert set(rows) == set(whole) and 0 <= len(rows) - len(whole) < BATCH
    else:
        assert set(map(int, rows)) == set(everything)
        most = sum(pipeline.assignment.batch_sizes[i] - 1 for i in pipeline.assignment.used)
        assert len(rows) - len(everything) <= most


def test_the_position_is_a_number():
    """What a checkpoint holds of the data is the next batch's number."""
    (field,) = [f for f in dataclasses.fields(Progress) if "batch" in f.name]
    assert len(json.dumps({field.name: 2**40})) < 40 and isinstance(
        getattr(Progress(), field.name), int
    )


SCRIPT = """
import json, sys
from test_exactness import digests, open_pipeline
folder, kind, start, first, stop, out = sys.argv[1:]
pipeline = open_pipeline(folder, kind)
with open(out, "a") as file:
    for batch in pipeline.batches(int(start), (int(first), int(stop))):
        file.write(json.dumps(digests(batch)) + "\\n")
        file.flush()
"""


def start(folders, kind, batch, process, processes, out):
    """A real process that reads its rows from a batch on, for ever."""
    share = BATCH // processes
    here = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    rows = (process * share, (process + 1) * share)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folders), kind, *map(str, (batch, *rows)), str(out)],
        env=env,
        stderr=subprocess.PIPE,
    )


def whole_lines(path):
    """What a process wrote, without a line that it was killed in."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_and_kill(folders, kind, batch, processes, count, folder):
    """Starts processes, kills all at once by SIGKILL after so many batches; what they read."""
    outs = [folder / f"{batch}-{processes}-{i}.jsonl" for i in range(processes)]
    running = [start(folders, kind, batch, i, processes, out) for i, out in enumerate(outs)]
    deadline = time.monotonic() + 300
    try:
        while min(len(whole_lines(out)) for out in outs) < count:
            for process in running:
                assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.wait()
            process.stderr.close()
    return joined([whole_lines(out) for out in outs])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_are_killed_go_on_where_the_last_whole_batch_was(folders, tmp_path, kind):
    """One, two and four real processes, each killed at a random batch, the next going on."""
    rng, position, found = random.Random(0), 0, []
    for processes in (2, 4, 1):
        count = rng.randint(2, 12)
        rows = run_and_kill(folders, kind, position, processes, count, tmp_path)
        assert len(rows) >= count
        kept = rng.randint(1, len(rows))  # the last checkpoint was a while ago
        found += rows[:kept]
        position += kept
    assert found == read(open_pipeline(folders, kind), 0, position)
    assert len(np.unique([d for rows in found for d in rows])) > 10
