"""Weights by path and by URL; a file that is not what was asked for is refused in a sentence."""

import functools
import hashlib
import http.server
import re
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from walt_jax.errors import UserError
from walt_jax.weights import load_weights

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "conv.bias": np.array([0.5, -1.0], np.float16),
    "steps": np.array(7),
}


def says(*parts):
    """Expects one sentence, on one line, that holds the parts in this order."""
    pattern = r"^[^\n]*" + r"[^\n]*".join(map(re.escape, map(str, parts))) + r"[^\n]*\Z"
    return pytest.raises(UserError, match=pattern)


def write(folder, name):
    """One of the two kinds of file; returns its path and hash."""
    path = folder / name
    if name.endswith(".npz"):
        np.savez(path, **ARRAYS)
    else:
        save_file(ARRAYS, path)
    return path, sha256(path)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(arrays):
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "W.NPZ"])
def test_path(tmp_path, name):
    path, digest = write(tmp_path, name.lower())
    path = path.rename(tmp_path / name)
    same(load_weights(str(path)))
    same(load_weights(str(path), digest))
    same(load_weights(str(path), digest.upper()))


def test_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "w.npz")
    same(load_weights("~/w.npz"))


def test_wrong_hash_of_a_path(tmp_path):
    path, digest = write(tmp_path, "w.npz")
    with says(path, digest, "0" * 64, "correct the hash"):
        load_weights(str(path), "0" * 64)


def test_hash_that_is_none(tmp_path):
    path, digest = write(tmp_path, "w.npz")
    with says(f"'{digest[:-1]}'", "64 hex digits"):
        load_weights(str(path), digest[:-1])


def test_missing_file(tmp_path):
    with says(tmp_path / "w.npz", "does not exist"):
        load_weights(str(tmp_path / "w.npz"))


def test_folder(tmp_path):
    (tmp_path / "w.npz").mkdir()
    with says(tmp_path / "w.npz", "cannot be read"):
        load_weights(str(tmp_path / "w.npz"))


@pytest.mark.parametrize("name", ["w.ckpt", "w", "http://host/w.ckpt?x=.npz", ""])
def test_another_kind_of_file(name):
    with says(name, "no .safetensors, .npz, .pt or .pth file", "docs/weights.md"):
        load_weights(name)


@pytest.mark.parametrize("keep", [0, 9, 100, -1])
@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_damaged_file(tmp_path, name, keep):
    path, _ = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[:keep])
    with says(path, "damaged"):
        load_weights(str(path))


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.array([{"code": "here"}], dtype=object))
    with says(path, "damaged"):
        load_weights(str(path))
    path.write_bytes(b"\x80\x04K\x01.")  # a bare pickle
    with says(path, "damaged"):
        load_weights(str(path))


# URLs


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and counts the requests."""

    def do_GET(self):
        self.server.requests.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder, its address, the requests made, and an empty cache."""
    folder, cache = tmp_path / "site", tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("WALT_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests = []
        server.folder, server.cache = folder, cache
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_url_is_downloaded_once(site, name, capsys):
    _, digest = write(site.folder, name)
    same(load_weights(f"{site.url}/{name}?download=true", digest))
    assert name in capsys.readouterr().err  # the progress bar
    same(load_weights(f"{site.url}/{name}?download=true", digest.upper()))
    assert len(site.requests) == 1
    kept = list(site.cache.iterdir())
    assert [sha256(p) for p in kept] == [digest] and kept[0].suffix == f".{name.split('.')[1]}"


def test_url_may_end_in_its_hash(site):
    _, digest = write(site.folder, "w.npz")
    same(load_weights(f"{site.url}/w.npz#sha256={digest}"))
    assert site.requests == ["/w.npz"]
    with says("has the sha256", "correct the hash"):
        load_weights(f"{site.url}/w.npz#sha256={'0' * 64}")


def test_url_needs_a_hash(site):
    write(site.folder, "w.npz")
    for end in ("", "#sha256=", "#part"):
        with says(f"{site.url}/w.npz", "no sha256"):
            load_weights(f"{site.url}/w.npz{end}")
    assert not site.requests


def test_wrong_hash_of_a_url_keeps_nothing(site):
    _, digest = write(site.folder, "w.npz")
    with says(f"{site.url}/w.npz", digest, "0" * 64):
        load_weights(f"{site.url}/w.npz", "0" * 64)
    assert not list(site.cache.iterdir())
    same(load_weights(f"{site.url}/w.npz", digest))


def test_url_without_a_file(site):
    with says(f"{site.url}/w.npz", "cannot be downloaded", "404"):
        load_weights(f"{site.url}/w.npz", "0" * 64)
    assert not list(site.cache.iterdir())


def test_url_without_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("WALT_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    with says("http://127.0.0.1:1/w.npz", "cannot be downloaded"):
        load_weights("http://127.0.0.1:1/w.npz", "0" * 64)


def test_download_that_breaks_off_keeps_nothing(site, monkeypatch):
    _, digest = write(site.folder, "w.npz")

    def broken(handler, source, output):
        output.write(source.read(100))

    monkeypatch.setattr(Handler, "copyfile", broken)
    with says(f"{site.url}/w.npz"):
        load_weights(f"{site.url}/w.npz", digest)
    assert not list(site.cache.iterdir())


def test_damaged_file_in_the_cache(site):
    _, digest = write(site.folder, "w.npz")
    load_weights(f"{site.url}/w.npz", digest)
    (kept,) = site.cache.iterdir()
    kept.write_bytes(b"half")
    with says(kept, "delete it"):
        load_weights(f"{site.url}/w.npz", digest)


def test_cache_that_cannot_be_written(site, monkeypatch):
    _, digest = write(site.folder, "w.npz")
    monkeypatch.setenv("WALT_CACHE", str(site.folder / "w.npz"))
    with says(f"{site.url}/w.npz", "cannot be downloaded to", "w.npz"):
        load_weights(f"{site.url}/w.npz", digest)
