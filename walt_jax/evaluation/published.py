"""Weights of feature networks whose files are known by name only, or by a part of their hash."""

import hashlib
from collections.abc import Collection
from typing import NamedTuple

from walt_jax.errors import UserError
from walt_jax.weights import Take, cache_folder, parse, read_file, taker


class File(NamedTuple):
    """Where a network's weights are published.

    Attributes:
      name: of the file in the cache.
      where: to get it.
      contents: what it holds.
      sha256: how its hash begins, where that is known.
    """

    name: str
    where: str
    contents: str
    sha256: str = ""


class Published(NamedTuple):
    """What was read: a function that gives tensors, their names, the file's hash, and whether they
    are known to be trained."""

    take: Take
    names: Collection[str]
    sha256: str
    trained: bool


def read(file: File, source: str | None, allow: Collection[str]) -> Published:
    """Reads weights.

    Args:
      file: what is expected.
      source: its path, or a URL that ends in #sha256=..., or None for the cache.
      allow: 'trained' vouches for a file whose hash is not known.

    Raises:
      UserError: missing or damaged.
    """
    if source is None:
        source = str(cache_folder() / file.name)
        if not (cache_folder() / file.name).exists():
            raise UserError(
                f"{source} is missing: get {file.where} and put it there, or give its path."
            )
    path, data = read_file(source)
    if path.suffix.lower() not in (".pt", ".pth", ".safetensors", ".npz"):
        raise UserError(f"{path} is no .safetensors, .npz, .pt or .pth file: get {file.where}.")
    tensors, digest = parse(path, data), hashlib.sha256(data).hexdigest()
    known = bool(file.sha256) and digest.startswith(file.sha256)
    take = taker(tensors, source, file.contents)
    return Published(take, tensors.keys(), digest, known or "trained" in allow)
