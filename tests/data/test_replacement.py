"""Records that cannot be decoded: replaced as the batch defines it, counted, and not too many."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest

from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.records import VIDEO_FEATURES, Dataset, open_dataset
from walt_jax.data.video import encode_frame
from walt_jax.data.writer import write_dataset
from walt_jax.errors import UserError

BAD = (2, 7)


def record(i, frames=8):
    coded = [encode_frame(np.full((16, 16, 3), 10 * i, np.uint8)) for _ in range(frames)]
    if i in BAD:
        coded = [np.zeros_like(c) for c in coded]
    return {
        "payload": np.concatenate(coded),
        "offsets": np.cumsum([0, *map(len, coded)], dtype=np.int64),
        "timestamps": np.arange(frames) / 8,
        "fps": 8.0,
        "duration": frames / 8,
        "width": 16,
        "height": 16,
        "num_frames": frames,
        "caption": "",
        "label": i,
        "source": f"{i}.mp4",
        "start": 0.0,
        "sha256": "00" * 32,
    }


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos") / "records"
    return write_dataset(folder, VIDEO_FEATURES, map(record, range(12)), shard_size=4)


def make(videos, batch_size=4, **config):
    config = {"num_frames": 5, "sizes": ((16, 16),), "max_broken": 0.5} | config
    config = DataConfig(str(videos.directory), eval_fraction=0.0, num_threads=2, **config)
    return Pipeline(open_dataset(videos.directory), config, batch_size=batch_size, seed=5)


def labels(pipeline, count=9, start=0, rows=None):
    batches = pipeline.batches(start, rows)
    return [b["label"].tolist() for b in itertools.islice(batches, count)]


def test_the_next_row_takes_its_place(videos, caplog):
    pipeline = make(videos)
    with caplog.at_level(logging.WARNING, logger="walt_jax"):
        found = labels(pipeline)
    planned = [pipeline.plan(k)[1].tolist() for k in range(9)]
    for k, (got, wanted) in enumerate(zip(found, planned)):
        for row, (label, record) in enumerate(zip(got, wanted)):
            if record not in BAD:
                assert label == record
                continue
            later = wanted[row + 1 :] + wanted[:row] + planned[(k + 1) % 9]
            assert label == next(r for r in later if r not in BAD)
    # Each is said once, though every epoch meets it.
    assert sorted(pipeline.broken) == [f"the record of {i}.mp4 at 0 s" for i in BAD]
    assert sum("takes its place" in m for m in caplog.messages) == 2
    assert all("is damaged" in reason for reason in pipeline.broken.values())


def test_the_pixels_are_the_replacements(videos):
    for batch in itertools.islice(make(videos).batches(), 6):
        assert "broken" not in batch
        shown = batch["video"].reshape(4, -1).mean(1) / 10
        np.testing.assert_allclose(shown, batch["label"], atol=0.1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_of_nothing_else(videos, batch_size):
    pipeline = make(videos, batch_size)
    found = labels(pipeline, 12 // batch_size)
    planned = [pipeline.plan(k)[1].tolist() for k in range(14 // batch_size)]
    assert not {*BAD} & {label for batch in found for label in batch}
    if batch_size == 1:
        flat = [r for (r,) in planned]
        expected = [next(r for r in flat[k:] if r not in BAD) for k in range(12)]
        assert [label for (label,) in found] == expected


def test_batch_k_is_the_same_at_every_reading(videos):
    straight = labels(make(videos))
    assert labels(make(videos), 4, start=3) == straight[3:7]
    for processes in (2, 4):
        share = 4 // processes
        parts = [labels(make(videos), rows=(i * share, (i + 1) * share)) for i in range(processes)]
        assert [[*itertools.chain(*rows)] for rows in zip(*parts)] == straight


@pytest.mark.slow
def test_worker_processes_count_too(videos):
    pipeline = make(videos, num_workers=2)
    batches = pipeline.batches()
    try:
        found = [next(batches)["label"].tolist() for _ in range(3)]
    finally:
        batches.close()
    assert found == labels(make(videos), 3) and len(pipeline.broken) == 2


def test_too_many_stop_the_run(videos):
    pipeline = make(videos, max_broken=0.1)
    with pytest.raises(
        UserError, match=r"2 of the 12 records of .* more than config\.data\.max_broken=0\.1 .*mp4"
    ):
        labels(pipeline)
    with pytest.raises(UserError, match=r"max_broken must lie in \[0, 1\]"):
        dataclasses.replace(pipeline.config, max_broken=2.0)


def test_a_shard_that_is_damaged_or_goes_away(tmp_path):
    videos = write_dataset(
        tmp_path / "d", VIDEO_FEATURES, (record(i) for i in (0, 1, 3, 4, 5, 6)), shard_size=3
    )
    pipeline = make(videos, batch_size=2, max_broken=0.5)
    first, second = sorted(videos.directory.glob("*.array_record-*"))
    with open(second, "r+b") as file:
        file.seek(second.stat().st_size // 2)
        file.write(bytes(64))
    found = labels(pipeline, 6)
    assert 1 <= len(pipeline.broken) <= 3
    assert all(second.name in key for key in pipeline.broken)
    assert len(found) == 6
    first.unlink()
    with pytest.raises(UserError, match=r"cannot be decoded|records in its place"):
        labels(make_unchecked(videos), 6)
    with pytest.raises(UserError, match="is missing: prepare the dataset again"):
        make(videos)


def make_unchecked(videos):
    """A pipeline of a dataset that was whole when it was opened."""
    config = DataConfig(
        str(videos.directory), num_frames=5, sizes=((16, 16),), eval_fraction=0.0, max_broken=0.3
    )
    return Pipeline(Dataset(videos.directory), config, batch_size=2, seed=5)
