"""Finding the videos: folders, globs, manifests, TFDS, and how labels are read."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer

from walt_jax.data.sources import find_sources
from walt_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    videos = ("b/two.mp4", "a/one.MKV", "a/deep/three.webm")
    for name in (*videos, "a/notes.txt", "a/._one.mkv", "a/._four.jpg"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "videos"


def names(sources):
    return [s.name for s in sources]


def test_folder_and_labels(folder):
    assert names(find_sources(folder)) == ["a/deep/three.webm", "a/one.MKV", "b/two.mp4"]
    assert all(s.label is None for s in find_sources(folder))

    def labels(**kwargs):
        return [s.label for s in find_sources(folder, **kwargs)]

    assert labels(label_from_folder=True) == ["deep", "a", "b"]
    assert labels(label_from_name=True) == ["three", "one", "two"]
    assert labels(label_regex=r"(\w)\w*\.\w+$") == ["t", "o", "t"]
    with pytest.raises(UserError, match="does not match"):
        labels(label_regex=r"deep/(\w+)")
    for pattern in ("(", "deep"):
        with pytest.raises(UserError, match="pattern"):
            labels(label_regex=pattern)
    with pytest.raises(UserError, match="exclude each other"):
        labels(label_from_name=True, label_from_folder=True)


def test_images_are_found_beside_videos(folder):
    for name in ("b/four.JPEG", "c/five.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    found = find_sources(folder, label_from_folder=True)
    assert names(found)[2:] == ["b/four.JPEG", "b/two.mp4", "c/five.png"]
    assert [s.label for s in found[2:]] == ["b", "b", "c"]


def test_glob_and_file(folder):
    assert names(find_sources(f"{folder}/*/*.[mM]*")) == ["a/one.MKV", "b/two.mp4"]
    assert names(find_sources(f"{folder}/**/*.webm")) == ["a/deep/three.webm"]
    assert names(find_sources(folder / "b" / "two.mp4")) == ["two.mp4"]


def test_nothing_there(folder):
    with pytest.raises(UserError, match="does not exist"):
        find_sources(folder / "absent")
    for nothing in (f"{folder}/*.mp4", folder / "empty"):
        (folder / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="holds no video or image"):
            find_sources(nothing)


def test_csv_and_jsonl_agree(folder):
    rows = [
        {"path": "videos/a/one.MKV", "caption": 'says "hi", twice', "label": "x", "start": 1.5},
        {"path": "videos/b/two.mp4", "label": "7", "end": 3},
        {"path": "videos/b/two.mp4", "caption": "again"},
    ]
    csv_file, jsonl_file = folder.parent / "m.csv", folder.parent / "m.jsonl"
    jsonl_file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    csv_file.write_text(
        "path,caption,label,start,end\n"
        'videos/a/one.MKV,"says ""hi"", twice",x,1.5,\n'
        "videos/b/two.mp4,,7,,3\n"
        "videos/b/two.mp4,again,,,\n",
        encoding="utf-8-sig",
    )
    sources = find_sources(csv_file)
    assert sources == find_sources(jsonl_file)
    first, second, third = sources
    assert first.path == folder / "a" / "one.MKV" and first.caption == 'says "hi", twice'
    assert (first.start, first.end, first.label) == (1.5, None, "x")
    assert (second.start, second.end, second.label) == (0.0, 3.0, "7")
    assert (third.label, third.caption) == (None, "again")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("path,lable\na.mp4,x\n", "line 2 has 'lable'"),
        ("label\nx\n", "line 2 has no path"),
        ("path,start\na.mp4,soon\n", "start 'soon' is not seconds"),
        ("path\na.mp4,x\n", "a column without a heading"),
        ("path,label\n", "holds no video"),
    ],
)
def test_bad_manifests(tmp_path, text, reason):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        find_sources(tmp_path / "m.csv")


@pytest.mark.parametrize("times", ["1,", ",2"])
def test_an_image_has_no_times(tmp_path, times):
    (tmp_path / "m.csv").write_text(f"path,start,end\na.png,{times}\n")
    (source,) = find_sources(tmp_path / "m.csv")
    with pytest.raises(UserError, match=r"a\.png is an image, which has no start and end"):
        source.read(None)


@pytest.mark.parametrize("text", ['{"path": ', '["a.mp4"]', "\xff"])
def test_bad_jsonl(tmp_path, text):
    (tmp_path / "m.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"m\.jsonl"):
        find_sources(tmp_path / "m.jsonl")


def write_tfds(directory, features, examples):
    directory.mkdir()
    features = tfds.features.FeaturesDict(features)
    writer = ArrayRecordWriter(
        str(directory / "toy-train.array_record-00000-of-00001"), "group_size:1"
    )
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    for example in examples:
        writer.write(serializer.serialize_example(features.encode_example(example)))
    writer.close()
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(examples)], num_bytes=1, filename_template=None
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=features, split_infos=[split], check_data=False
    )


def test_tfds_directory(tmp_path):
    videos = np.random.default_rng(0).integers(0, 255, (3, 5, 16, 24, 3), dtype=np.uint8)
    write_tfds(
        tmp_path / "toy",
        {
            "video": tfds.features.Video(shape=(None, 16, 24, 3)),
            "label": tfds.features.ClassLabel(names=["walk", "run"]),
            "caption": tfds.features.Text(),
            "fps": tfds.features.Scalar(np.float32),
        },
        [
            {"video": v, "label": label, "caption": f"clip {label}", "fps": 10.0}
            for v, label in zip(videos, (0, 1, -1))
        ],
    )
    sources = find_sources(f"tfds:{tmp_path}/toy")
    assert names(sources) == ["train/000000", "train/000001", "train/000002"]
    assert [s.label for s in sources] == ["walk", "run", None]
    assert names(find_sources(f"tfds:{tmp_path}/toy/train")) == names(sources)
    with pytest.raises(UserError, match="toy/test cannot be opened"):
        find_sources(f"tfds:{tmp_path}/toy/test")
    assert sources[1].caption == "clip 1"
    reading = sources[1].read(None)
    times, frames = zip(*reading.frames)
    np.testing.assert_array_equal(np.stack(frames), videos[1])
    np.testing.assert_allclose(times, np.arange(5) / 10)
    assert reading.duration == 0.5 and len(reading.sha256) == 64
    with pytest.raises(UserError, match="labels by name are for files"):
        find_sources(f"tfds:{tmp_path}/toy", label_from_name=True)


def test_tfds_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 24, 3), dtype=np.uint8)
    features = {
        "image": tfds.features.Image(shape=(16, 24, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    examples = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
    write_tfds(tmp_path / "toy", features, examples)
    sources = find_sources(f"tfds:{tmp_path / 'toy'}")
    assert [(s.name, s.label) for s in sources] == [
        *(("train/000000", "cat"), ("train/000001", "dog"), ("train/000002", "cat"))
    ]
    for source, image in zip(sources, images):
        frames, duration, _ = source.read(None)
        ((time, frame),) = frames
        assert (time, duration) == (0.0, 0.0)
        np.testing.assert_array_equal(frame, image)


def test_tfds_without_video(tmp_path):
    write_tfds(tmp_path / "toy", {"x": tfds.features.Scalar(np.int64)}, [{"x": 1}])
    with pytest.raises(UserError, match="no Video or Image feature, only x"):
        find_sources(f"tfds:{tmp_path}/toy")
    with pytest.raises(UserError, match="cannot be opened"):
        find_sources("tfds:no_such_dataset_anywhere")
