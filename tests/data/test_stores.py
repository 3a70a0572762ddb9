"""Inputs that lie in a store: every kind of input from fsspec's memory:// as from a folder."""

import io
import pickle
import tarfile

import cv2
import fsspec
import numpy as np
import pytest

from walt_jax import media
from walt_jax.data import stores
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import open_dataset
from walt_jax.data.sources import find_sources
from walt_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(("a/one.mp4", "a/two.mp4", "b/three.mp4")):
        (folder / name).parent.mkdir(exist_ok=True)
        media.write_mp4(folder / name, np.full((8, 32, 48, 3), 40 * i + 20, np.uint8), 10)
    cv2.imwrite(str(folder / "b" / "still.png"), np.full((32, 48, 3), 200, np.uint8))
    (folder / "a" / "notes.md").write_text("no video")
    (folder / "list.csv").write_text("path,caption\na/one.mp4,first\nb/still.png,a still\n")
    return folder


@pytest.fixture(scope="module")
def url(folder):
    store = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            store.pipe(f"/bucket/in/{name}", path.read_bytes())
    return "memory://bucket/in"


def frames(directory):
    dataset = open_dataset(directory)
    return [
        (r["source"], r["caption"], r["sha256"], r["num_frames"])
        for r in map(dataset.read, range(len(dataset)))
    ]


@pytest.mark.parametrize("what", ["", "/list.csv", "/a/*.mp4", "/a/one.mp4"])
def test_a_store_is_read_as_a_folder(folder, url, what, tmp_path):
    prepare_dataset(f"{folder}{what}", tmp_path / "local")
    prepare_dataset(f"{url}{what}", tmp_path / "remote")
    assert frames(tmp_path / "local") == frames(tmp_path / "remote")


def test_sidecars_and_labels(folder, url):
    labels = [s.label for s in find_sources(url, label_from_folder=True)]
    assert labels == [s.label for s in find_sources(folder, label_from_folder=True)]
    assert labels == ["a", "a", "b", "b"]


def test_errors_name_the_url(url, tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/bad/x.mp4", b"no video")
    store.pipe("/bucket/bad/y.mp4", store.cat("/bucket/in/a/one.mp4"))
    report = prepare_dataset("memory://bucket/bad", tmp_path / "out")
    (skipped,) = report.skipped
    assert skipped["source"] == "x.mp4"
    assert skipped["reason"].startswith("memory://bucket/bad/x.mp4 cannot be decoded")
    with pytest.raises(UserError, match="memory://bucket/none does not exist"):
        find_sources("memory://bucket/none")
    with pytest.raises(UserError, match=r"unknown-store://x cannot be read"):
        find_sources("unknown-store://x")


def test_copies_are_temporary(url):
    with stores.local_copy(f"{url}/a/one.mp4") as path:
        assert path.read_bytes() == fsspec.filesystem("memory").cat("/bucket/in/a/one.mp4")
    assert not path.exists()


def test_a_dataset_in_a_store_is_fetched_as_it_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WALT_CACHE", str(tmp_path / "cache"))
    prepare_dataset(folder, tmp_path / "out", shards=2)
    store, url = fsspec.filesystem("memory"), "memory://bucket/out"
    stores.upload(tmp_path / "out" / "report", f"{url}/report", last="histograms.png")
    for path in (tmp_path / "out").iterdir():
        if path.is_file():
            store.pipe(f"/bucket/out/{path.name}", path.read_bytes())
    local, remote = open_dataset(tmp_path / "out"), open_dataset(url)
    assert remote.fingerprint == local.fingerprint and len(remote) == 4
    np.testing.assert_array_equal(remote.index["source"], local.index["source"])

    def fetched():
        return len(list((tmp_path / "cache").rglob("*.array_record-*")))

    assert fetched() == 0
    for i, count in ((3, 1), (0, 2), (1, 2)):
        np.testing.assert_array_equal(remote.read(i)["payload"], local.read(i)["payload"])
        assert fetched() == count
    assert pickle.loads(pickle.dumps(remote)).read(2)["sha256"] == local.read(2)["sha256"]
    (shard,) = [n for n in store.find("/bucket/out") if "00001-of" in n]
    whole = store.cat(shard)
    store.pipe(shard, whole[:-9])
    with pytest.raises(UserError, match=r"memory://bucket/out/.*00001-of-00002 has \d+ of"):
        open_dataset(url)
    store.rm(shard)
    with pytest.raises(UserError, match=r"00001-of-00002 is missing"):
        open_dataset(url)
    with pytest.raises(UserError, match="memory://bucket/in is not a complete dataset"):
        open_dataset("memory://bucket/in")


# WebDataset


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory):
    where = tmp_path_factory.mktemp("tars")
    videos = [folder / name for name in ("a/one.mp4", "a/two.mp4", "b/three.mp4")]
    with tarfile.open(where / "set-000.tar", "w") as tar:
        add(tar, "x/000.mp4", videos[0].read_bytes())
        add(tar, "x/000.txt", b"the first\n")
        add(tar, "x/000.cls", b"7")
        add(tar, "x/001.json", b'{"caption": "the second", "label": 3, "other": [1]}')
        add(tar, "x/001.mp4", videos[1].read_bytes())
    with tarfile.open(where / "set-001.tar", "w") as tar:
        add(tar, "002.mp4", videos[2].read_bytes())
        add(tar, "003.png", (folder / "b" / "still.png").read_bytes())
        add(tar, "003.txt", b"a still")
    return where


def test_webdataset(tars, folder, tmp_path):
    sources = find_sources(tars)
    assert sources == find_sources(f"{tars}/set-{{000..001}}.tar")
    assert sources == find_sources(f"{tars}/set-*.tar")
    assert len(find_sources(tars / "set-001.tar")) == 2
    assert [(s.name, s.caption, s.label) for s in sources] == [
        ("set-000.tar/x/000.mp4", "the first", "7"),
        ("set-000.tar/x/001.mp4", "the second", "3"),
        ("set-001.tar/002.mp4", "", None),
        ("set-001.tar/003.png", "a still", None),
    ]
    prepare_dataset(tars, tmp_path / "tars")
    prepare_dataset(folder, tmp_path / "files")
    tarred, plain = (open_dataset(tmp_path / name) for name in ("tars", "files"))
    assert tarred.label_names == ("3", "7")
    for i, same in enumerate((0, 1, 3, 2)):  # b/still.png comes before b/three.mp4
        for name in ("payload", "sha256", "timestamps"):
            np.testing.assert_array_equal(tarred.read(i)[name], plain.read(same)[name])


def test_damaged_tars(tars, tmp_path):
    whole = (tars / "set-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.tar (cannot be read as a tar|is truncated)"):
        prepare_dataset(tmp_path / "cut.tar", tmp_path / "out")
    with pytest.raises(UserError, match=r"absent\.tar is not a file"):
        find_sources(tmp_path / "absent.tar")
