"""Published weights: named arrays of a safetensors, npz or torch file, by path or URL."""

import hashlib
import http.client
import io
import os
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import safetensors.numpy
from etils import epath

from walt_jax.errors import UserError
from walt_jax.progress import bar
from walt_jax.torch_archive import read_tensors

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


def load_weights(source: str, sha256: str = "") -> dict[str, np.ndarray]:
    """Reads the arrays of a `.safetensors`, `.npz` or `.pt` file; no code in it is run.

    Args:
      source: a path (gs:// too) or an http(s) URL. What a URL gives is kept in the folder
        $WALT_CACHE, or ~/.cache/walt_jax, under its hash.
      sha256: hex digest of the file; needed for a URL, checked for a path where given.

    Returns:
      Name -> array, on the host, shapes and dtypes as in the file.

    Raises:
      UserError: another kind of file, a missing or damaged one, a URL without a hash or one that
        cannot be reached, a wrong hash.
    """
    remote = source.startswith(("http://", "https://"))
    name = urllib.parse.urlsplit(source).path if remote else source
    suffix, sha256 = PurePosixPath(name).suffix.lower(), sha256.lower()
    if suffix not in _PARSERS:
        raise UserError(
            f"{source} is no .safetensors, .npz, .pt or .pth file: convert it as docs/weights.md "
            "says."
        )
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(
            f"{sha256!r} is no sha256 of {source}: give the 64 hex digits that sha256sum prints."
        )
    path = epath.Path(_download(source, sha256, suffix) if remote else source).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path or URL of a weights file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): give a file.") from error
    if sha256:
        _check(hashlib.sha256(data).hexdigest(), sha256, path, "delete it and get it again")
    try:
        return _PARSERS[suffix](data)
    except Exception as error:  # on damaged bytes the parsers raise whatever they trip over
        raise UserError(
            f"{path} is damaged, no {suffix} file, or holds what NumPy has no plain type for "
            f"({type(error).__name__}): get it again, or convert it as docs/weights.md says."
        ) from error


def weights_file(source: str, sha256: str = "") -> Path:
    """The local path of a file of weights of any kind, its hash checked where one is given.

    Args:
      source: a path or an http(s) URL, which is kept as `load_weights` keeps it.
      sha256: hex digest; needed for a URL.

    Raises:
      UserError: a missing file, a URL without a hash or one that cannot be reached, a wrong hash.
    """
    sha256 = sha256.lower()
    if source.startswith(("http://", "https://")):
        suffix = PurePosixPath(urllib.parse.urlsplit(source).path).suffix
        return _download(source, sha256, suffix)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path or URL of a weights file.")
    if sha256:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _check(found, sha256, path, "delete it and get it again")
    return path


def _npz(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in file.files}


_PARSERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {
    ".safetensors": safetensors.numpy.load,
    ".npz": _npz,
    ".pt": read_tensors,
    ".pth": read_tensors,
}


def _check(found: str, expected: str, where: object, advice: str) -> None:
    if found != expected:
        raise UserError(
            f"{where} has the sha256 {found}, but {expected} is expected: it is damaged or another "
            f"file, so {advice}, or correct the hash."
        )


def cache_folder() -> Path:
    """Where downloads and the like are kept: $WALT_CACHE, or ~/.cache/walt_jax."""
    return Path(os.environ.get("WALT_CACHE") or "~/.cache/walt_jax").expanduser()


def _download(url: str, sha256: str, suffix: str) -> Path:
    """The file of a URL in the cache; it gets its name there once its hash is right."""
    if not sha256:
        raise UserError(
            f"{url} has no sha256: give one with a URL, so that what arrives is what was published."
        )
    cache = cache_folder()
    path = cache / f"{sha256}{suffix}"
    if path.exists():
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that it moves there at once; gone on any failure.
        with tempfile.TemporaryDirectory(prefix="part-", dir=cache) as folder:
            part = Path(folder) / path.name
            _check(_fetch(url, part), sha256, url, "correct the address")
            part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} cannot be downloaded to {cache} ({error}): check both, or fetch the file "
            "yourself and give its path."
        ) from error
    return path


def _fetch(url: str, path: Path) -> str:
    """Writes what a URL gives to a file, with a progress bar; returns its sha256."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(path, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or None
        name = PurePosixPath(urllib.parse.urlsplit(url).path).name
        with bar(what=name, unit="B", unit_scale=True, total=total) as progress:
            while chunk := response.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                progress.update(len(chunk))
    return digest.hexdigest()
