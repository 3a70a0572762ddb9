"""Files wherever they lie: local paths, and URLs of any fsspec store (gs://, s3://, ...)."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec

from walt_jax.errors import UserError

_CHUNK = 1 << 20


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URL of a store."""
    return "://" in str(path)


def open_file(path: str | Path, mode: str = "rb", **options: Any) -> IO:
    """Opens a file. Raises UserError if it cannot be."""
    try:
        return fsspec.open(str(path), mode, **options).open()
    except Exception as error:  # every store has its own kinds
        raise _unreachable(path, error) from error


def read_text(path: str | Path) -> str:
    """A file's text in UTF-8, without a byte order mark. Raises UserError."""
    with open_file(path, "r", encoding="utf-8-sig") as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no UTF-8 text: convert it.") from error


def exists(path: str | Path) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(path):
        return Path(path).exists()
    store, inner = store_of(path)
    return store.exists(inner)


def size(path: str | Path) -> int | None:
    """A file's bytes; None if there is none."""
    if not is_remote(path):
        return Path(path).stat().st_size if Path(path).is_file() else None
    store, inner = store_of(path)
    try:
        return store.size(inner)
    except FileNotFoundError:
        return None


def files(folder: str | Path) -> list[str]:
    """The files below a folder, sorted, relative to it; an empty list if there is none."""
    if not is_remote(folder):
        root = Path(folder)
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    store, inner = store_of(folder)
    try:
        found = store.find(inner)
    except Exception as error:  # every store has its own kinds
        raise _unreachable(folder, error) from error
    inner = inner.rstrip("/") + "/"
    return sorted(f.removeprefix(inner) for f in found if f.startswith(inner))


def join(folder: str | Path, name: str) -> str | Path:
    """`name` in `folder`: a Path where it is local, else a URL."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else Path(folder) / name


def upload(folder: Path, url: str, last: str) -> None:
    """Copies the files of a folder; `last` comes last, so that where it is all is."""
    store, inner = store_of(url)
    names = sorted(path.name for path in folder.iterdir() if path.name != last)
    store.makedirs(inner, exist_ok=True)
    for name in (*names, last):
        store.put_file(str(folder / name), f"{inner}/{name}")


def download(url: str, folder: Path) -> None:
    """Copies the files of a URL to a folder that appears when it is whole. Raises UserError."""
    partial = folder.with_name(folder.name + ".download")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in files(url):
        with open_file(join(url, name)) as source, open(partial / name, "wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def remove(url: str) -> None:
    """Removes a folder of a store, if it is there."""
    store, inner = store_of(url)
    if store.exists(inner):
        store.rm(inner, recursive=True)


def cache_of(url: str, version: str) -> Path:
    """Where local copies of a folder's files are kept: in $WALT_CACHE or ~/.cache/walt_jax."""
    root = Path(os.environ.get("WALT_CACHE") or "~/.cache/walt_jax").expanduser()
    return root / "datasets" / hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:16]


def cached(url: str, name: str, folder: Path) -> Path:
    """The local copy in `folder` of the file `name` of `url`, fetched if it is not there.

    Several processes may ask for it at once. Raises UserError.
    """
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.{uuid.uuid4().hex}"
        try:
            with open_file(join(url, name)) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A local path of a file: its own, or a copy that is gone afterwards. Raises UserError."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="walt_jax-") as folder:
        copy = Path(folder) / PurePosixPath(str(path)).name
        with open_file(path) as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
        yield copy


def store_of(path: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store of a URL and the path in it. Raises UserError where its library is missing."""
    try:
        return fsspec.core.url_to_fs(str(path))
    except Exception as error:  # ImportError, or whatever the store raises without credentials
        raise _unreachable(path, error) from error


def _unreachable(path: str | Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} is not a file: check the path.")
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} cannot be read ({said}): check the path and the access to it.")
