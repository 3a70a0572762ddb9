"""Folders of published models: on this machine, or of Hugging Face's hub at a fixed commit."""

import functools
import re
from pathlib import Path

from walt_jax.errors import UserError

_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "*.model")


def folder_of(path: str, revision: str = "", *, download: bool = True) -> Path:
    """Where the files of a model lie.

    Args:
      path: a folder, or a hub id `owner/name`, or `owner/name/folder`.
      revision: with a hub id the commit, 40 hex digits.
      download: get what is not in the hub's cache on this machine.

    Raises:
      UserError: no such folder, a hub id without a commit, or it cannot be had.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", path):
        raise UserError(
            f"{path!r} is no folder and no hub id owner/name: give the folder of the text encoder."
        )
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UserError(
            f"The hub id {path} has no commit: give the 40 hex digits that the model's page "
            "shows under 'Files' as config.task.text.revision (encode: --text_revision), so that "
            "it stays what it is; or a folder on this machine."
        )
    return _from_hub(path, revision, download)


@functools.lru_cache(maxsize=16)
def _from_hub(path: str, revision: str, download: bool) -> Path:
    """Once a process: the hub is asked whenever it can be reached."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is no folder here, and a hub id needs the package huggingface_hub: "
            'pip install -e ".[text]", or give a folder.'
        ) from error
    owner, name, *inner = path.split("/")
    within = "/".join(inner)
    try:
        snapshot = huggingface_hub.snapshot_download(
            f"{owner}/{name}",
            revision=revision,
            allow_patterns=[f"{within}/{file}" if within else file for file in _FILES],
            local_files_only=not download,
        )
    except (OSError, ValueError) as error:  # the hub's own kinds are of these, offline too
        raise UserError(
            f"{path} at {revision[:8]} is neither on this machine nor to be had from the hub "
            f"({type(error).__name__}): check the id and the commit, or fetch the folder where "
            "there is a network and give its path as config.task.text.path."
        ) from error
    found = Path(snapshot, *inner)
    if not found.is_dir():
        raise UserError(f"The hub's {owner}/{name} has no folder {within!r}: correct the path.")
    return found
