"""The format on disk: what goes in comes out, TFDS reads it, and damage is named."""

import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from walt_jax.data import records, video, writer
from walt_jax.errors import UserError

LATENT_FEATURES = tfds.features.FeaturesDict(
    {
        "latents": records.exact(np.float16, None, None, None, 8),
        "mean": records.exact(np.float32, None),
        "fps": records.exact(np.float64),
        "label": tfds.features.Scalar(np.int64),
        "caption": tfds.features.Text(),
    }
)


def video_example(i, frames=12, height=24, width=37):
    rng = np.random.default_rng(i)
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, 3) + np.arange(frames)[:, None, None, None]
    images = (127 + 100 * np.sin(0.2 * (x + y)[None, ..., None] + phase)).astype(np.uint8)
    coded = [video.encode_frame(image) for image in images]
    example = {
        "payload": np.concatenate(coded),
        "offsets": np.cumsum([0, *map(len, coded)], dtype=np.int64),
        "timestamps": np.arange(frames) / 29.97,
        "fps": 30000 / 1001,
        "duration": frames / 29.97,
        "width": width,
        "height": height,
        "num_frames": frames,
        "caption": f"ünïcode {i}",
        "label": i - 1,
        "source": f"folder/{i}.mp4",
        "start": 0.5 * i,
        "sha256": "00" * 32,
    }
    return example, images


def latent_example(i):
    rng = np.random.default_rng(i)
    return {
        "latents": rng.normal(size=(1 + i, 4, 6 + i, 8)).astype(np.float16),
        "mean": rng.normal(size=i).astype(np.float32),
        "fps": 8.0,
        "label": i,
        "caption": "",
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records") / "dataset"
    return writer.write_dataset(
        directory,
        records.VIDEO_FEATURES,
        (video_example(i, frames=5 + i)[0] for i in range(7)),
        shard_size=3,
        metadata={"label_names": ["a", "b"], "kind": "videos"},
    )


def copy(dataset, tmp_path):
    for path in dataset.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_round_trip(dataset):
    assert len(dataset) == 7
    assert dataset.label_names == ("a", "b")
    assert dataset.metadata["kind"] == "videos"
    for i in range(7):
        example, images = video_example(i, frames=5 + i)
        record = dataset.read(i)
        assert set(record) == set(records.VIDEO_FEATURES)
        for key, value in example.items():
            np.testing.assert_array_equal(record[key], value, err_msg=key)
        assert isinstance(record["caption"], str) and isinstance(record["fps"], float)
        frames = records.decode_frames(record, [4, 0, 0])
        assert frames.dtype == np.uint8 and frames.shape == (3, 24, 37, 3)
        error = frames.astype(int) - images[[4, 0, 0]]
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 35
    with pytest.raises(IndexError):
        dataset.read(7)
    with pytest.raises(IndexError):
        records.decode_frames(dataset.read(0), [5])


def test_index_without_payloads(dataset, tmp_path, monkeypatch):
    opened = records.open_dataset(dataset.directory)
    monkeypatch.setattr(records, "ArrayRecordReader", None)
    np.testing.assert_array_equal(opened.index["num_frames"], np.arange(5, 12))
    np.testing.assert_array_equal(opened.index["fps"], [30000 / 1001] * 7)
    np.testing.assert_array_equal(opened.index["label"], np.arange(7) - 1)
    assert opened.index["source"].tolist() == [f"folder/{i}.mp4" for i in range(7)]
    expected = {"fps", "duration", "start", "width", "height", "num_frames", "label", "source"}
    assert set(opened.index) == expected
    monkeypatch.undo()
    directory = copy(dataset, tmp_path)
    (directory / "index.npz").unlink()
    scanned = records.open_dataset(directory).index
    for key in expected:
        np.testing.assert_array_equal(scanned[key], dataset.index[key])
        assert scanned[key].dtype == dataset.index[key].dtype


def test_tfds_opens_it_without_tensorflow(dataset):
    code = f"""
import sys
import tensorflow_datasets as tfds
from walt_jax.data import records
source = tfds.builder_from_directory({str(dataset.directory)!r}).as_data_source(split="train")
assert len(source) == 7
example = source[6]
assert example["num_frames"] == 11 and example["caption"].decode() == "ünïcode 6"
dataset = records.open_dataset({str(dataset.directory)!r})
assert (dataset.read(6)["payload"] == example["payload"]).all()
records.decode_frames(dataset.read(6), [3])
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_latents_of_any_shape(tmp_path):
    examples = [latent_example(i) for i in range(4)]
    dataset = writer.write_dataset(tmp_path / "latents", LATENT_FEATURES, examples)
    for i, example in enumerate(examples):
        record = dataset.read(i)
        assert record["latents"].dtype == np.float16 and record["mean"].dtype == np.float32
        np.testing.assert_array_equal(record["latents"], example["latents"])
        np.testing.assert_array_equal(record["mean"], example["mean"])
    with pytest.raises(UserError, match="without duration, height"):
        records.open_dataset(dataset.directory, records.VIDEO_FEATURES)


def test_pickles_small_and_reads_from_threads(dataset):
    dataset.read(0)
    data = pickle.dumps(dataset)
    assert len(data) < 500
    clone = pickle.loads(data)
    seen = {}
    threads = [
        threading.Thread(target=lambda i=i: seen.update({i: clone[i]["num_frames"]}))
        for i in range(7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {i: 5 + i for i in range(7)}


def test_fingerprint_is_of_the_contents(dataset, tmp_path):
    def write(name, count, size):
        examples = (video_example(i, frames=5 + i)[0] for i in range(count))
        return writer.write_dataset(
            tmp_path / name, records.VIDEO_FEATURES, examples, shard_size=size
        )

    assert write("other shards", 7, 5).fingerprint == dataset.fingerprint
    assert write("fewer", 6, 3).fingerprint != dataset.fingerprint


def test_refuses_what_is_there(dataset, tmp_path):
    (tmp_path / "a").mkdir()
    directory = copy(dataset, tmp_path / "a")
    examples = [video_example(0)[0]]

    def write(**kwargs):
        return writer.write_dataset(directory, records.VIDEO_FEATURES, examples, **kwargs)

    with pytest.raises(UserError, match="holds a dataset"):
        write()
    assert len(write(overwrite=True)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (directory / "metadata.json").unlink()
    with pytest.raises(UserError, match="is not a dataset"):
        write(overwrite=True)


def test_interruption_leaves_nothing(tmp_path):
    directory = tmp_path / "dataset"
    (tmp_path / "dataset.partial" / "deep").mkdir(parents=True)
    (tmp_path / "dataset.partial" / "junk").write_text("of an earlier run")

    def failing():
        yield video_example(0)[0]
        assert not (tmp_path / "dataset.partial" / "junk").exists()
        with pytest.raises(UserError, match="being written"):
            writer.DatasetWriter(directory, records.VIDEO_FEATURES)
        with pytest.raises(UserError, match="not a complete dataset"):
            records.open_dataset(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_dataset(directory, records.VIDEO_FEATURES, failing())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no record"):
        writer.write_dataset(directory, records.VIDEO_FEATURES, [])
    assert list(tmp_path.iterdir()) == []


def test_empty_shards_are_dropped(tmp_path):
    with writer.DatasetWriter(tmp_path / "d", records.VIDEO_FEATURES) as out:
        for shard in (5, 2):
            out.write(video_example(shard)[0], shard=shard)
    dataset = records.open_dataset(tmp_path / "d")
    assert [dataset.read(i)["label"] for i in range(2)] == [1, 4]
    assert [s["file"][-14:] for s in dataset.metadata["shards"]] == [
        "00000-of-00002",
        "00001-of-00002",
    ]


def test_damage_is_named(dataset, tmp_path):
    directory = copy(dataset, tmp_path)
    shard = directory / dataset.metadata["shards"][1]["file"]
    whole = shard.read_bytes()

    def damaged(**replace):
        data = bytearray(whole)
        middle = data.index(b"\xff\xd8\xff") + 400
        data[middle] ^= 255
        shard.write_bytes(data)
        records.open_dataset(directory).read(3)

    def truncated():
        shard.write_bytes(whole[: len(whole) // 2])
        records.open_dataset(directory)

    def missing():
        shard.unlink()
        records.open_dataset(directory)

    for breaking in (damaged, truncated, missing):
        with pytest.raises(UserError, match=shard.name):
            breaking()
    shard.write_bytes(whole)
    for name in ("index.npz", "features.json", "metadata.json"):
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=name):
            opened = records.open_dataset(directory)
            print(opened.index["fps"], opened.read(0))
        (directory / name).write_bytes(whole)
    metadata = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps(metadata | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        records.open_dataset(directory)


def test_damaged_frame_is_named(dataset):
    record = dataset.read(1)
    record["payload"] = np.zeros_like(record["payload"])
    with pytest.raises(UserError, match=r"folder/1\.mp4"):
        records.decode_frames(record, [0])
