"""A bucket in memory that stands for gs://, for what is read and written by path.

Arrays have no stand-in: tensorstore writes those of checkpoints to Cloud by itself.
"""

import sys
import types

import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Folders are there only where objects are, as in a bucket."""

    protocol = ("gs", "gcs")
    cachable = False
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def cp_file(self, path1, path2, **kwargs):
        if self.isfile(path1):
            super().cp_file(path1, path2, **kwargs)


class Client:
    """Of Cloud's library, which orbax asks what kind of bucket it is: a flat one."""

    def get_bucket(self, name):
        return name


@pytest.fixture
def bucket(monkeypatch):
    """What the bucket holds; TensorFlow's own way to Cloud has no stand-in."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: Bucket())
    monkeypatch.setattr(Bucket, "store", {})
    storage = types.SimpleNamespace(Client=Client)
    monkeypatch.setitem(sys.modules, "google.cloud", types.SimpleNamespace(storage=storage))
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    return Bucket.store


@pytest.fixture(params=["disk", "bucket"])
def any_folder(request, tmp_path):
    """A folder of the test's own, on the disk and in a bucket."""
    if request.param == "disk":
        return epath.Path(tmp_path)
    request.getfixturevalue("bucket")
    return epath.Path("gs://bucket/run")
