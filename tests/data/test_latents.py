"""Cached latents: what the tokenizer says, whoever writes it and however often interrupted."""

import collections
import dataclasses
import math
import os
import pathlib
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from small_latents import make_tokenizer

from walt_jax.data import latents
from walt_jax.data.buckets import Bucket, BucketsConfig
from walt_jax.data.directories import lock_directory
from walt_jax.data.latents import LATENT_FEATURES
from walt_jax.data.packing import PackingConfig, cut
from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.records import open_dataset
from walt_jax.data.writer import write_dataset
from walt_jax.errors import UserError
from walt_jax.models.tokenizer.quantizers import Identity, Lfq, unpack_codes
from walt_jax.tasks import to_unit


@pytest.fixture
def interrupt(monkeypatch):
    """Makes reading stop before a batch, once; notes which batches are read."""
    read, original = [], Pipeline.batches

    def stop_before(stop):
        def batches(self, start=0, rows=None):
            for k, batch in enumerate(original(self, start, rows), start):
                if k == stop:
                    raise KeyboardInterrupt
                read.append(k)
                yield batch

        read.clear()
        monkeypatch.setattr(Pipeline, "batches", batches)
        return read

    return stop_before


def clips(data, number, batch_size=5):
    """The first clips that are encoded, and the names of their videos."""
    dataset = open_dataset(data.path)
    pipeline = Pipeline(dataset, data, batch_size=batch_size, seed=0, split="all", shuffle=False)
    batches = pipeline.batches()
    video = [next(batches)["video"] for _ in range(math.ceil(number / batch_size))]
    return np.concatenate(video)[:number], dataset.index["source"][:number]


def test_a_broken_video_has_no_stand_in(encode, data, tmp_path):
    """Training replaces it; latents under its name would be another video's."""
    folder = shutil.copytree(data.path, tmp_path / "videos")
    shard = sorted(folder.glob("*.array_record-*"))[-1]
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(bytes(64))
    broken = dataclasses.replace(data, path=str(folder), max_broken=1.0)
    pipeline = Pipeline(open_dataset(folder), broken, batch_size=5, seed=0, split="all")
    list(zip(pipeline.batches(), range(6)))
    assert pipeline.broken
    with pytest.raises(UserError, match=r"1 of the 24 records .*max_broken=0 allows"):
        encode(tmp_path / "latents", data=broken)
    assert not (tmp_path / "latents").exists()


def test_records_hold_what_the_tokenizer_says(straight, tokenizer, data):
    video, sources = clips(data, 10)
    expected = np.asarray(jax.jit(lambda x: tokenizer.encode(to_unit(x)))(video))
    assert expected.shape == (10, 3, 4, 4, 4) and expected.std() > 0.1
    for i in range(10):
        record = straight.read(i)
        np.testing.assert_allclose(record["latents"], expected[i], atol=2e-3, rtol=2e-3)
        assert record["source"] == sources[i]
        assert record["tokenizer_hash"] == tokenizer.hash
        assert (record["num_frames"], record["height"], record["width"]) == (3, 4, 4)
        assert record["fps"] == 4.0


def test_buckets_make_latents_of_their_shapes_and_packing_reads_them(encode, data, tmp_path):
    table = BucketsConfig(
        (Bucket(24, 9, 0.5, 4), Bucket(24, 5, 1.0, 3)), (1.0, 1.5), 8, strides=(2, 4, 4)
    )
    data = dataclasses.replace(data, buckets=table, eval_fraction=0.0)
    latents = encode(tmp_path / "latents", data=data, epochs=2)
    assert len(latents) == 48
    shapes = {tuple(latents.index[n][i] for n in ("num_frames", "height", "width"))
              for i in range(48)}  # fmt: skip
    assert {t for t, _, _ in shapes} == {5, 3} and {(h, w) for _, h, w in shapes} <= {
        (n // 4, m // 4) for n, m in table.sizes(24)
    }
    sources = sorted(open_dataset(data.path).index["source"])
    assert sorted(latents.index["source"]) == sorted(2 * sources)
    # A clip of each video in each epoch, its length drawn anew.
    lengths = [latents.index["num_frames"][latents.index["source"] == name] for name in sources]
    assert all(len(own) == 2 for own in lengths)
    assert {tuple(sorted(own.tolist())) for own in lengths} == {(3, 3), (3, 5), (5, 5)}
    again = dataclasses.replace(data, path=str(latents.directory))
    cached = Pipeline(latents, again, batch_size=9, seed=0)
    sizes = {s["latents"].shape[1:4]: s["latents"].shape[0] for s in cached.shapes()}
    assert sizes == {shape: 4 if shape[0] == 5 else 3 for shape in shapes}
    other = dataclasses.replace(again, buckets=dataclasses.replace(table, table=(Bucket(16, 5),)))
    with pytest.raises(UserError, match=r"which no bucket of config.data.buckets.table makes"):
        Pipeline(latents, other, batch_size=9, seed=0)
    packing = PackingConfig((1, 2, 2), 64, 8)
    packed = Pipeline(
        latents,
        dataclasses.replace(again, buckets=None, packing=packing),
        batch_size=2,
        seed=0,
    )
    batch = next(packed.batches())
    assert batch["latents"].shape == (2, 64, 1, 2, 2, 4)
    row = packed.plan(0)[1][0]
    record = latents.read(row[0].record)
    blocks = cut(record["latents"], (1, 2, 2))[0]
    np.testing.assert_array_equal(batch["latents"][0, : len(blocks)], blocks)


def test_every_epoch_has_every_video_once(straight, data):
    videos = open_dataset(data.path)
    for epoch in (slice(None, 24), slice(24, None)):
        assert collections.Counter(straight.index["source"][epoch]) == collections.Counter(
            videos.index["source"]
        )
    assert [shard["records"] for shard in straight.metadata["shards"]] == [15, 14, 15, 4]
    first, second = straight.read(0), straight.read(24)
    assert np.abs(first["latents"] - second["latents"]).max() > 0.01  # clips of another time


def test_two_processes_write_the_same(encode, straight, tmp_path, interrupt):
    """Threads, each with the number of a process: they share nothing but the folder."""
    read = interrupt(None)
    output, results = tmp_path / "latents", {}

    def work(index):
        results[index] = encode(output, process=(index, 2))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    threads[0].start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "latents.parts" / "plan.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert sorted(read) == list(range(10))  # nothing twice
    assert {len(d) for d in results.values()} == {48}
    assert {d.fingerprint for d in results.values()} == {straight.fingerprint}
    for name, column in straight.index.items():
        np.testing.assert_array_equal(results[0].index[name], column)
    assert [p.name for p in tmp_path.iterdir()] == ["latents"]


def test_resumed_is_straight(encode, straight, tmp_path, interrupt, caplog):
    output, last = tmp_path / "latents", straight.metadata["shards"][-1]
    interrupt(8)
    with pytest.raises(KeyboardInterrupt):
        encode(output)
    assert not output.exists()
    assert sorted(p.name for p in (tmp_path / "latents.parts").glob("0*")) == ["00000", "00001"]
    # A damaged shard is one that is missing.
    (damaged,) = (tmp_path / "latents.parts" / "00000").glob("*.array_record-*")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    read = interrupt(None)
    with caplog.at_level("INFO", "walt_jax"):
        resumed = encode(output)
    assert "goes on: 2 of 4 shards are there" in caplog.text
    assert read == [0, 1, 2, 6, 7, 8, 9]
    assert resumed.fingerprint == straight.fingerprint
    assert resumed.metadata == straight.metadata and last["records"] == 4
    for i in (0, 14, 15, 47):
        np.testing.assert_array_equal(resumed.read(i)["latents"], straight.read(i)["latents"])
    assert [p.name for p in tmp_path.iterdir()] == ["latents"]


def test_other_settings_are_refused_and_overwritten(encode, tokenizer, tmp_path, interrupt, data):
    output = tmp_path / "latents"
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        encode(output, seed=5)  # no shard is whole: nothing to go on with
    interrupt(5)
    with pytest.raises(KeyboardInterrupt):
        encode(output)
    interrupt(None)
    other = make_tokenizer(Identity(), 4, seed=1)
    for change, told in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"epochs": 1}, "epochs: 2 -> 1"),
        ({"tokenizer": other}, f"tokenizer_hash: '{tokenizer.hash}' -> '{other.hash}'"),
        ({"data": DataConfig(data.path, 5, 4.0, ((8, 8),))}, r"sizes: [[16, 16]] -> [[8, 8]]"),
    ):
        with pytest.raises(UserError) as error:
            encode(output, **change)
        assert f"other settings ({told}): give those to go on, --overwrite" in str(error.value)
    assert len(encode(output, seed=1, epochs=1, overwrite=True)) == 24


def test_an_interrupted_overwrite_keeps_the_old_and_goes_on(encode, tmp_path, interrupt):
    output = tmp_path / "latents"
    old = encode(output, epochs=1).fingerprint
    with pytest.raises(UserError, match="holds a dataset"):
        encode(output, epochs=1)
    interrupt(5)
    with pytest.raises(KeyboardInterrupt):
        encode(output, seed=1, overwrite=True)
    assert open_dataset(output).fingerprint == old
    with pytest.raises(UserError, match=r"other settings \(seed: 1 -> 0\)"):
        encode(output)
    read = interrupt(None)
    assert len(encode(output, seed=1)) == 48
    assert read == list(range(3, 10))
    assert [p.name for p in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_between_joining_and_cleaning_up(
    encode, tmp_path, interrupt, monkeypatch, overwrite
):
    """The dataset is there already, and so are its parts: the same command is done at once."""
    output = tmp_path / "latents"
    if overwrite:
        encode(output, seed=1, epochs=1)
    unlink = pathlib.Path.unlink

    def killed(path, *args, **kwargs):
        if path.name == "plan.json":
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathlib.Path, "unlink", killed)
        encode(output, overwrite=overwrite)
    fingerprint = open_dataset(output).fingerprint
    assert (tmp_path / "latents.parts" / "plan.json").exists()
    shutil.rmtree(tmp_path / "latents.parts" / "00000")  # as where files are moved, not linked
    read = interrupt(None)
    assert encode(output).fingerprint == fingerprint
    assert read == [] and [p.name for p in tmp_path.iterdir()] == ["latents"]
    with pytest.raises(UserError, match="holds a dataset"):
        encode(output)


def test_two_runs_at_once_are_refused(encode, tmp_path):
    lock = lock_directory(tmp_path / "latents.parts")
    with pytest.raises(UserError, match=r"latents\.parts is being written by another process"):
        encode(tmp_path / "latents")
    os.close(lock)


def test_what_does_not_fit_leaves_nothing(encode, data, tmp_path):
    for change, told in (
        ({"data": DataConfig(data.path, 6, 4.0, ((16, 16),))}, "6 frames does not fit"),
        ({"data": DataConfig(data.path, 5, 4.0, ((18, 16),))}, "18x16 do not fit"),
        ({"batches_per_shard": 0}, "must be at least 1"),
    ):
        with pytest.raises(UserError, match=told):
            encode(tmp_path / "latents", **change)
    assert list(tmp_path.iterdir()) == []


def test_codes_come_back(encode, data, tmp_path):
    tokenizer = make_tokenizer(Lfq(), 18)
    codes = encode(tmp_path / "codes", tokenizer=tokenizer, epochs=1)
    with pytest.raises(UserError, match="holds latents already"):
        encode(tmp_path / "again", data=DataConfig(str(tmp_path / "codes")))
    video, sources = clips(data, 24)
    said = jax.jit(lambda x: tokenizer.codes(to_unit(x)))(video)
    latents = jax.jit(lambda x: tokenizer.encode(to_unit(x)))(video)
    assert np.unique(said).size > 100
    for i in range(24):
        record = codes.read(i)
        assert record["codes"].dtype == np.uint8 and record["codes"].shape == (3 * 4 * 4 * 18 / 8,)
        np.testing.assert_array_equal(unpack_codes(record["codes"], 18, (3, 4, 4)), said[i])
    # Read by the trainer: the same codes, and their latents normalised.
    pipeline = Pipeline(
        codes, DataConfig(str(codes.directory)), batch_size=24, seed=0, split="all", shuffle=False
    )
    batch = next(pipeline.batches())
    (shapes,) = pipeline.shapes()
    assert codes.index["source"].tolist() == sources.tolist()
    assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {
        k: (batch[k].shape, batch[k].dtype) for k in ("latents", "codes", "label", "fps")
    }
    np.testing.assert_array_equal(batch["codes"], said)
    np.testing.assert_allclose(batch["latents"], latents, rtol=1e-3)
    np.testing.assert_allclose(tokenizer.from_codes(batch["codes"]), latents, rtol=1e-5)


@pytest.mark.parametrize(
    "quantizer, channels", [pytest.param(Identity(), 4, marks=pytest.mark.slow), (Lfq(), 6)]
)
def test_long_clips_are_encoded_chunk_by_chunk(
    encode, data, tmp_path, monkeypatch, quantizer, channels
):
    """9 frames, 5 latents: chunks of 2, 2 and 1."""
    options = {
        "tokenizer": make_tokenizer(quantizer, channels),
        "data": dataclasses.replace(data, num_frames=9),
        "epochs": 1,
    }
    whole = encode(tmp_path / "whole", **options)
    monkeypatch.setattr(latents, "_AT_ONCE", 5)
    monkeypatch.setattr(latents, "_CHUNK", 2)
    chunks = encode(tmp_path / "chunks", **options)
    assert len(chunks) == len(whole) == 24
    for i in (0, 23):
        one, other = whole.read(i), chunks.read(i)
        if "codes" in one:
            np.testing.assert_array_equal(one["codes"], other["codes"])
        else:
            np.testing.assert_allclose(one["latents"], other["latents"], atol=2e-3)


def test_a_record_of_a_foreign_tokenizer_is_refused(straight, tmp_path):
    examples = [straight.read(i) for i in range(4)]
    examples[2]["tokenizer_hash"] = "somebody else's"
    mixed = write_dataset(tmp_path / "mixed", LATENT_FEATURES, examples, metadata=straight.metadata)
    batches = Pipeline(
        mixed, DataConfig(str(mixed.directory)), batch_size=2, seed=0, split="all", shuffle=False
    ).batches()
    next(batches)
    with pytest.raises(UserError, match=r"Record 2 of .*mixed was made by tokenizer somebody"):
        next(batches)
