"""`python -m walt_jax.prepare`: from files to a dataset, and what it says when it cannot."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax import media, prepare
from walt_jax.data import records
from walt_jax.data.curation.config import PrepareConfig
from walt_jax.data.preparation import prepare_dataset
from walt_jax.errors import UserError

REPO = Path(__file__).parents[1]
CLIPS = Path(os.environ.get("WALT_TEST_DATA", REPO.parent / "shared" / "clips"))


def write_clips(folder, count, frames=8, size=(48, 64), fps=10):
    for i in range(count):
        path = folder / f"class{i % 3}" / f"clip{i:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.full((*size, 3), 20 + 200 * i // count, np.uint8)
        media.write_mp4(path, np.repeat(image[None], frames, 0), fps)
    return folder


def digests(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def manifest():
    rows = (CLIPS / "MANIFEST.md").read_text().splitlines() if CLIPS.is_dir() else []
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows if row.count("|") > 10]
    return [c for c in cells if re.search(r"\.\w+$", c[0])]


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}")
@pytest.mark.parametrize("row", manifest(), ids=lambda row: row[0])
def test_every_real_clip(row, tmp_path):
    report = prepare_dataset(
        CLIPS / row[0], tmp_path / "d", short_side=32, max_seconds=15, label_from_name=True
    )
    dataset = records.open_dataset(tmp_path / "d", records.VIDEO_FEATURES)
    assert report.frames == dataset.index["num_frames"].sum() == int(row[5])
    assert report.skipped == () and dataset.label_names == (Path(row[0]).stem,)
    assert (dataset.index["duration"] < 15.2).all()
    ends = dataset.index["start"] + dataset.index["duration"]
    np.testing.assert_allclose(dataset.index["start"], [0, *ends[:-1]], atol=0.1)
    # Equal pieces: no scrap at the end.
    assert dataset.index["num_frames"].min() > 0.9 * dataset.index["num_frames"].max()
    record = dataset.read(len(dataset) - 1)
    assert record["sha256"] == row[-1] and record["source"] == Path(row[0]).name
    frames = records.decode_frames(record, [0, record["num_frames"] - 1])
    assert min(frames.shape[1:3]) == 32 and frames.std() > 5


def test_command(tmp_path, capsys):
    folder = write_clips(tmp_path / "in", 7)
    (folder / "class1" / "bad.mp4").write_text("no video")
    (folder / "class1" / "empty.mp4").touch()
    output = tmp_path / "out"
    arguments = ["--input", str(folder), "--output", str(output), "--label-from-folder"]
    prepare.main([*arguments, "--short-side", "24"])
    printed = capsys.readouterr().out
    assert "7 records, 56 frames" in printed
    assert "2 of 9 videos were skipped" in printed and "report.json" in printed
    report = json.loads((output / "report.json").read_text())
    assert [entry["source"] for entry in report["skipped"]] == [
        "class1/bad.mp4",
        "class1/empty.mp4",
    ]
    assert "0 bytes" in report["skipped"][1]["reason"]
    dataset = records.open_dataset(output)
    assert dataset.label_names == ("class0", "class1", "class2")
    assert dataset.index["label"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert (dataset.index["height"] == 24).all() and (dataset.index["width"] == 32).all()
    np.testing.assert_allclose(dataset.index["fps"], 10, rtol=1e-6)
    with pytest.raises(UserError, match="--overwrite"):
        prepare.main(arguments)
    prepare.main([*arguments, "--overwrite"])
    assert (records.open_dataset(output).index["height"] == 48).all()


@pytest.mark.parametrize("variant", ["", "text", "score", "debug"])
def test_shipped_preparation(variant):
    """It builds, every threshold has its score, and the docstring's commands are this program's."""
    path = REPO / "preparations" / "videos.py"
    config = config_lib.build(PrepareConfig, config_lib.load(f"{path}:{variant}"))
    assert config.scores.text_area == (variant == "text")
    assert config.filter.is_on == (variant != "score")
    for name in config.filter.ranges():
        assert getattr(config.scores, name)
    assert config.filter.duplicate_bits is None or config.scores.phash
    doc = re.match(r'"""(.*?)"""', path.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    commands = re.findall(r"^ +python -m walt_jax\.prepare (.*)$", doc, re.M)
    assert len(commands) == 2
    for args in map(shlex.split, commands):
        overrides = [a.removeprefix("--config.") for a in args if a.startswith("--config.")]
        config_lib.build(PrepareConfig, config_lib.override({}, overrides))
        prepare._parser().parse_args([a for a in args if not a.startswith("--config.")])


def test_a_key_that_nothing_reads(tmp_path):
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"config\.scores\.moton; did you mean 'motion'"):
        prepare.main([*arguments, "--config.scores.moton=True"])


def test_nothing_decodable(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"none of the 1 videos.*a\.mp4"):
        prepare_dataset(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    command = [sys.executable, "-m", "walt_jax.prepare", "--input", str(tmp_path / "in")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: none of the 1 videos")


@pytest.mark.parametrize(
    "options", [{"short_side": 0}, {"workers": 0}, {"shards": 0}, {"max_seconds": 0}]
)
def test_bad_options(tmp_path, options):
    with pytest.raises(UserError, match="give a larger one"):
        prepare_dataset(tmp_path, tmp_path / "out", **options)


def test_same_bytes_with_any_number_of_workers(tmp_path):
    folder = write_clips(tmp_path / "in", 9)
    (folder / "class0" / "bad.mp4").write_text("no video")

    def prepared(name, **options):
        prepare_dataset(folder, tmp_path / name, **options)
        return digests(tmp_path / name)

    assert prepared("one", workers=1) == prepared("four", workers=4)
    three = prepared("three", shards=3)
    assert len([name for name in three if "array_record" in name]) == 3
    one, three = (records.open_dataset(tmp_path / name) for name in ("one", "three"))
    assert one.fingerprint == three.fingerprint


def test_manifest_segments_and_pieces(tmp_path):
    write_clips(tmp_path, 1, frames=60, fps=10)
    (tmp_path / "m.csv").write_text(
        "path,caption,label,start,end\n"
        "class0/clip000.mp4,all of it,long,,\n"
        "class0/clip000.mp4,the middle,short,2,3.5\n"
        "class0/clip000.mp4,nothing,short,9,10\n"
    )
    report = prepare_dataset(tmp_path / "m.csv", tmp_path / "out", max_seconds=2.5)
    dataset = records.open_dataset(tmp_path / "out")
    assert dataset.index["num_frames"].tolist() == [20, 20, 20, 15]
    np.testing.assert_allclose(dataset.index["start"], [0, 2, 4, 2], atol=1e-6)
    assert dataset.index["label"].tolist() == [0, 0, 0, 1]
    assert dataset.read(3)["caption"] == "the middle"
    np.testing.assert_allclose(dataset.read(1)["timestamps"], np.arange(20) / 10, atol=1e-6)
    (skipped,) = report.skipped
    assert skipped["records_kept"] == 0 and "from 9 s to 10 s" in skipped["reason"]


def test_single_frame(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", np.full((1, 32, 32, 3), 99, np.uint8), 25)
    prepare_dataset(tmp_path / "a.mp4", tmp_path / "out")
    record = records.open_dataset(tmp_path / "out").read(0)
    assert (record["num_frames"], record["fps"], record["duration"]) == (1, 1.0, 1.0)
    assert record["timestamps"].tolist() == [0.0]


def test_folder_of_images(tmp_path):
    for name in ("n01/a.JPEG", "n02/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "in" / name), np.full((32, 48, 3), 99, np.uint8))
    (tmp_path / "in" / "n02" / "c.jpg").write_text("no image")
    report = prepare_dataset(
        tmp_path / "in", tmp_path / "out", short_side=16, label_from_folder=True
    )
    dataset = records.open_dataset(tmp_path / "out")
    assert dataset.index["label"].tolist() == [0, 1]
    assert dataset.index["num_frames"].tolist() == [1, 1]
    assert dataset.index["width"].tolist() == [24, 24]
    (skipped,) = report.skipped
    assert skipped["source"] == "n02/c.jpg" and "as an image" in skipped["reason"]
    np.testing.assert_allclose(records.decode_frames(dataset.read(1), [0]), 99, atol=1)


def test_killed_and_run_again_it_gives_the_same_shards(tmp_path):
    folder = write_clips(tmp_path / "in", 12, frames=100, size=(240, 320))
    (folder / "class0" / "bad.mp4").write_text("no video")
    output, parts = tmp_path / "out", tmp_path / "out.scored.parts"
    command = [sys.executable, "-m", "walt_jax.prepare", "--input", str(folder), "--shards", "12"]
    command += ["--workers", "1", "--output"]
    process = subprocess.Popen([*command, str(output)], cwd=REPO, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (parts / "00003").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    whole = sorted(p for p in parts.iterdir() if p.name.isdecimal())
    assert 4 <= len(whole) < 12 and not output.exists()
    kept = {p: p.stat().st_ino for path in whole for p in path.glob("*.array_record-*")}
    with pytest.raises(UserError, match=r"begun with other settings.*short_side"):
        prepare_dataset(folder, output, shards=12, short_side=99)
    done = subprocess.run([*command, str(output)], cwd=REPO, check=True, capture_output=True)
    assert b"goes on: " in done.stderr
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["in", "out"]
    # What was there is what is there now: the same files, by links.
    assert set(kept.values()) <= {p.stat().st_ino for p in output.iterdir()}
    prepare_dataset(folder, tmp_path / "straight", shards=12)
    assert digests(output) == digests(tmp_path / "straight")
