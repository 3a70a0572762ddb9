"""Published weights: named arrays of a safetensors, npz or torch file, by path or URL."""

import hashlib
import http.client
import io
import os
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from walt_jax.errors import UserError
from walt_jax.progress import bar
from walt_jax.torch_archive import read_tensors

Take = Callable[[str, Sequence[int] | None], np.ndarray]

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


def load_weights(source: str, sha256: str = "") -> dict[str, np.ndarray]:
    """Reads the arrays of a `.safetensors`, `.npz` or `.pt` file; no code in it is run.

    Args:
      source: a path (gs:// too) or an http(s) URL.
      sha256: as `read_file`'s digest.

    Returns:
      Name -> array, on the host, shapes and dtypes as in the file.

    Raises:
      UserError: another kind of file, or as `read_file`.
    """
    suffix = _suffix(source)
    if suffix not in _PARSERS:
        raise UserError(
            f"{source} is no .safetensors, .npz, .pt or .pth file: convert it as docs/weights.md "
            "says."
        )
    path, data = read_file(source, sha256)
    return parse(path, data)


def read_file(source: str, digest: str = "") -> tuple[epath.Path, bytes]:
    """Reads a file whose contents are known.

    Args:
      source: a path (gs:// too) or an http(s) URL. What a URL gives is kept in the folder
        $WALT_CACHE, or ~/.cache/walt_jax, under its hash.
      digest: sha256 of the file (64 hex digits), or its git blob id (40); needed for a URL, unless
        it ends in #sha256=..., and checked for a path where given.

    Returns:
      Where it lies, and what it holds.

    Raises:
      UserError: a missing file, a URL without a hash or one that cannot be reached, a wrong hash.
    """
    remote = source.startswith(("http://", "https://"))
    if remote and not digest:
        source, _, digest = source.partition("#sha256=")
    digest = digest.lower()
    if digest and not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", digest):
        raise UserError(
            f"{digest!r} is no sha256 of {source}: give the 64 hex digits that sha256sum prints, "
            "or the 40 of git hash-object."
        )
    path = epath.Path(_download(source, digest) if remote else source).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path or URL of a weights file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): give a file.") from error
    if digest:
        _check(data, digest, path, "delete it and get it again")
    return path, data


def parse(path: epath.Path, data: bytes) -> dict[str, np.ndarray]:
    """The arrays in the bytes of a file, by its name.

    Raises:
      UserError: they are not what the name says.
    """
    suffix = path.suffix.lower()
    try:
        return _PARSERS[suffix](data)
    except Exception as error:  # on damaged bytes the parsers raise whatever they trip over
        raise UserError(
            f"{path} is damaged, no {suffix} file, or holds what NumPy has no plain type for "
            f"({type(error).__name__}): get it again, or convert it as docs/weights.md says."
        ) from error


def taker(tensors: dict[str, np.ndarray], source: str, contents: str) -> Take:
    """A function that gives the tensor of a name as float32 and checks its shape, if given one.

    Args:
      tensors: of a file.
      source: its path or URL.
      contents: what should be in it, for the message of the UserError that the function raises.
    """

    def take(name: str, shape: Sequence[int] | None) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{source} has no tensor {name!r}: give a file of {contents}.")
        if shape is not None and tensors[name].shape != tuple(shape):
            raise UserError(
                f"{source}: {name} has the shape {tensors[name].shape} instead of "
                f"{tuple(shape)}: give a file of {contents}."
            )
        return tensors[name].astype(np.float32)

    return take


def cache_folder() -> Path:
    """$WALT_CACHE, or ~/.cache/walt_jax; it need not exist."""
    return Path(os.environ.get("WALT_CACHE") or "~/.cache/walt_jax").expanduser()


def git_blob_id(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _suffix(source: str) -> str:
    remote = source.startswith(("http://", "https://"))
    name = urllib.parse.urlsplit(source).path if remote else source
    return PurePosixPath(name).suffix.lower()


def _npz(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in file.files}


def _safetensors(data: bytes) -> dict[str, np.ndarray]:
    """With bfloat16, which the library's own reader for NumPy refuses."""
    return {
        name: np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
        for name, view in safetensors.deserialize(data)
    }


_DTYPES = {
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    **{f"{k}{8 * n}": np.dtype(f"<{k.lower()}{n}") for k in "IU" for n in (1, 2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
}
_PARSERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {
    ".safetensors": _safetensors,
    ".npz": _npz,
    ".pt": read_tensors,
    ".pth": read_tensors,
}


def _check(data: bytes, expected: str, where: object, advice: str) -> None:
    blob = len(expected) == 40
    found = git_blob_id(data) if blob else hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(
            f"{where} has the {'git blob id' if blob else 'sha256'} {found}, but {expected} is "
            f"expected: it is damaged or another file, so {advice}, or correct the hash."
        )


def _download(url: str, digest: str) -> Path:
    """The file of a URL in the cache; it gets its name there once its hash is right."""
    if not digest:
        raise UserError(
            f"{url} has no sha256: give one with a URL (URL#sha256=... where there is no place of "
            "its own), so that what arrives is what was published."
        )
    cache = cache_folder()
    path = cache / f"{digest}{_suffix(url)}"
    if path.exists():
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that it moves there at once; gone on any failure.
        with tempfile.TemporaryDirectory(prefix="part-", dir=cache) as folder:
            part = Path(folder) / path.name
            _fetch(url, part)
            _check(part.read_bytes(), digest, url, "correct the address")
            part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} cannot be downloaded to {cache} ({error}): check both, or fetch the file "
            f"yourself and give its path, or put it there as {path.name}."
        ) from error
    return path


def _fetch(url: str, path: Path) -> None:
    """Writes what a URL gives to a file, with a progress bar."""
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(path, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or None
        name = PurePosixPath(urllib.parse.urlsplit(url).path).name
        with bar(what=name, unit="B", unit_scale=True, total=total) as progress:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
