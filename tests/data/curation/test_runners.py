"""The same preparation on threads and on Beam: several processes, the job graph of a cluster."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from walt_jax import media, prepare
from walt_jax.data.curation import runners
from walt_jax.data.curation.config import (
    CaptionConfig,
    EndpointConfig,
    FilterConfig,
    PrepareConfig,
    ScoreConfig,
)
from walt_jax.data.curation.work import SOURCES, Work, write_sources
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import open_dataset
from walt_jax.data.sources import find_sources
from walt_jax.errors import UserError

REPO = Path(__file__).parents[3]
SCORED = PrepareConfig(
    short_side=24,
    scores=ScoreConfig(motion=True, sharpness=True, phash=True),
    filter=FilterConfig(duplicate_bits=2),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for i in range(9):
        frames = rng.integers(0, 255, (12, 32, 48, 3), np.uint8)
        media.write_mp4(folder / f"{i}.mp4", frames, 10)
    (folder / "bad.mp4").write_text("no video")
    return folder


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "plan.json"  # every run's own
    }


def test_little_work_needs_no_beam(monkeypatch):
    assert runners.default_runner(1024, scored=False) == "threads"
    monkeypatch.setattr(runners, "has_beam", lambda: True)
    assert runners.default_runner(1025, scored=False) == "DirectRunner"
    assert runners.default_runner(1, scored=True) == "DirectRunner"
    monkeypatch.setattr(runners, "has_beam", lambda: False)
    assert runners.default_runner(9999, scored=True) == "threads"


def test_an_argument_that_nothing_reads(videos, tmp_path):
    arguments = ["--input", str(videos), "--output", str(tmp_path / "out")]
    for flags in (["--temp_location", "gs://x"], ["stray"], ["--shrot-side", "9"]):
        with pytest.raises(UserError, match="Nothing reads the argument"):
            prepare.main([*arguments, *flags])
    pytest.importorskip("apache_beam", reason="needs apache-beam (the extra `data`)")
    with pytest.raises(UserError, match="Nothing reads the argument '--temp_locaton"):
        prepare.main([*arguments, "--runner", "DirectRunner", "--temp_locaton", "gs://x"])


def test_flags_reach_beam():
    pytest.importorskip("apache_beam", reason="needs apache-beam (the extra `data`)")
    from apache_beam.options import pipeline_options as beam_options

    flags = ["--temp_location=gs://bucket/tmp", "--sdk_worker_parallelism=3"]
    flags += ["--flink_master=host:8081", "--environment_type=DOCKER"]
    options = runners.pipeline_options("FlinkRunner", 4, flags)
    assert options.view_as(beam_options.StandardOptions).runner == "FlinkRunner"
    assert options.view_as(beam_options.GoogleCloudOptions).temp_location == "gs://bucket/tmp"
    assert options.view_as(beam_options.FlinkRunnerOptions).flink_master == "host:8081"
    direct = runners.pipeline_options("DirectRunner", 4, []).view_as(beam_options.DirectOptions)
    assert direct.direct_running_mode == "multi_processing" and direct.direct_num_workers == 4
    flags = ["--direct_num_workers=2", "--direct_running_mode=in_memory"]
    direct = runners.pipeline_options("DirectRunner", 4, flags).view_as(beam_options.DirectOptions)
    assert direct.direct_running_mode == "in_memory" and direct.direct_num_workers == 2


def test_the_job_of_a_cluster_says_everything(videos, tmp_path):
    """The portable graph that Flink and Dataflow get, read back, does the work."""
    beam = pytest.importorskip("apache_beam", reason="needs apache-beam (the extra `data`)")
    from apache_beam.runners.portability.portable_runner import PortableRunner

    sources = find_sources(videos)
    offsets = write_sources(tmp_path, sources, 3)
    assert len((tmp_path / SOURCES).read_text().splitlines()) == 3
    work = Work(SCORED, {}, str(tmp_path), {"about": "a test"})
    flags = ["--environment_type=DOCKER", "--environment_config=image:1"]
    options = runners.pipeline_options("FlinkRunner", 1, flags)
    pipeline = beam.Pipeline(options=options)
    runners.build(pipeline, work, list(enumerate(offsets)))
    job = PortableRunner.get_proto_pipeline(pipeline, options)
    names = {t.unique_name for t in job.components.transforms.values()}
    assert {"parts", "spread", "prepare"} <= names
    (environment,) = {e.urn for e in job.components.environments.values()}
    assert environment == "beam:env:docker:v1"
    # Numbers go between workers, and neither sources nor pixels.
    assert len(job.SerializeToString()) < 100_000
    in_memory = runners.pipeline_options("DirectRunner", 1, ["--direct_running_mode=in_memory"])
    again = beam.Pipeline.from_runner_api(job, beam.runners.DirectRunner(), in_memory)
    again.run().wait_until_finish()
    assert sum(len(open_dataset(tmp_path / f"{part:05d}")) for part in range(3)) == 9


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(videos, tmp_path):
    pytest.importorskip("apache_beam", reason="needs apache-beam (the extra `data`)")
    options = {"config": SCORED, "shards": 4}
    prepare_dataset(videos, tmp_path / "threads", runner="threads", **options)
    prepare_dataset(videos, tmp_path / "beam", runner="DirectRunner", workers=2, **options)
    for suffix in ("", ".scored"):
        threads, beam = (digests(tmp_path / f"{name}{suffix}") for name in ("threads", "beam"))
        assert threads == beam
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        *("beam", "beam.scored", "threads", "threads.scored")
    ]


def test_parts_by_way_of_a_store(videos, tmp_path):
    prepare_dataset(videos, tmp_path / "straight", config=SCORED, runner="threads")
    options = {"config": SCORED, "runner": "threads", "staging": "memory://bucket/tmp"}
    prepare_dataset(videos, tmp_path / "staged", **options)
    assert digests(tmp_path / "straight") == digests(tmp_path / "staged")
    store = fsspec.filesystem("memory")
    assert not store.find("/bucket/tmp")
    # What an interrupted run left in the store is not made again.
    made = []
    call = Work.__call__

    def stops(self, part, *args):
        if made:
            raise UserError("interrupted")
        made.append(part)
        return call(self, part, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "__call__", stops)
        with pytest.raises(UserError, match="interrupted"):
            prepare_dataset(videos, tmp_path / "again", workers=1, **options)
    assert len(store.glob("/bucket/tmp/*/*/metadata.json")) == 1
    shutil.rmtree(tmp_path / "again.scored.parts")  # as on another machine

    def counts(self, part, *args):
        made.append(part)
        return call(self, part, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "__call__", counts)
        prepare_dataset(videos, tmp_path / "again", **options)
    assert sorted(made) == [0, 1]
    assert digests(tmp_path / "straight") == digests(tmp_path / "again")


@pytest.mark.slow
def test_processes_that_share_a_store_alone(videos, tmp_path):
    pytest.importorskip("apache_beam", reason="needs apache-beam (the extra `data`)")
    options = {"config": SCORED, "shards": 4}
    prepare_dataset(videos, tmp_path / "threads", runner="threads", **options)
    options |= {"runner": "DirectRunner", "staging": f"file://{tmp_path}/bucket"}
    prepare_dataset(videos, tmp_path / "beam", workers=2, **options)
    assert digests(tmp_path / "threads") == digests(tmp_path / "beam")


def test_outputs_are_folders(videos, tmp_path):
    with pytest.raises(UserError, match="is a URL: give a folder"):
        prepare_dataset(videos, "gs://bucket/out")
    with pytest.raises(UserError, match="is no URL of a store"):
        prepare_dataset(videos, tmp_path / "out", staging=str(tmp_path))


@pytest.mark.slow
def test_beam_killed_goes_on(videos, tmp_path):
    pytest.importorskip("apache_beam", reason="needs apache-beam (the extra `data`)")
    output, parts = tmp_path / "out", tmp_path / "out.scored.parts"
    command = [sys.executable, "-m", "walt_jax.prepare", "--input", str(videos), "--shards", "9"]
    command += ["--output", str(output), "--runner", "DirectRunner", "--workers", "2"]
    command += ["--config.scores.sharpness=True", "--config.scores.text_area=False"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        # A group of its own: the kill takes Beam's processes along.
        process = subprocess.Popen(command, cwd=REPO, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if any(re.fullmatch(r"\d+", p.name) for p in parts.glob("*")):
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, log.read_text()
    assert not output.exists()
    done = [p.name for p in parts.iterdir() if p.name.isdecimal()]
    assert done
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"goes on: {len(done)} of 9 shards are there" in again.stderr
    config = PrepareConfig(scores=ScoreConfig(sharpness=True))
    prepare_dataset(videos, tmp_path / "straight", config=config, runner="threads", shards=9)
    assert digests(output) == digests(tmp_path / "straight")


@pytest.mark.slow
def test_what_a_worker_says_reaches_the_user(videos, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs apache-beam (the extra `data`)")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    endpoint = EndpointConfig("m", retries=0, cache=str(tmp_path / "cache"))
    config = PrepareConfig(captions=CaptionConfig(endpoint=endpoint))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/chat/completions does not answer"):
        prepare_dataset(videos, tmp_path / "out", config=config, runner="DirectRunner", workers=2)
    assert not (tmp_path / "out").exists()


def test_sources_of_a_part(videos, tmp_path):
    sources = find_sources(videos)
    offsets = write_sources(tmp_path, sources, 4)
    with open(tmp_path / SOURCES, "rb") as file:
        counts = []
        for offset in offsets:
            file.seek(offset)
            counts.append(len(json.loads(file.readline())))
    assert sum(counts) == 10 and min(counts) >= 2
