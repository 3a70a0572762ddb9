"""The published text encoder of a denoiser: found for a run, and the same for all that follows."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from walt_jax.data.records import Dataset
from walt_jax.errors import UserError
from walt_jax.models.text import FrozenText, FrozenTextConfig

FILE = "text_encoder.json"


def find_text(
    config: FrozenTextConfig, workdir: str | Path, datasets: Sequence[Dataset]
) -> tuple[FrozenText | None, str]:
    """The encoder where some dataset has no embeddings of it, else None; and its hash.

    Where all have them and the encoder is not on this machine, it is not needed.

    Raises:
      UserError: it cannot be had, or it is not that of the embeddings or of the workdir's run.
    """
    made_by = {str(d.directory): d.metadata.get("text", {}).get("hash", "") for d in datasets}
    needed = not all(made_by.values()) or not made_by
    encoder = None
    if needed or _is_here(config):
        encoder = FrozenText.open(config)
    hashes = {where: digest for where, digest in made_by.items() if digest}
    found = encoder.hash if encoder is not None else next(iter(hashes.values()))
    for where, digest in hashes.items():
        if digest != found:
            raise UserError(
                f"The text embeddings in {where} were made by text encoder {digest}, but "
                f"{config.path if encoder else next(iter(hashes))} is {found}: encode the videos "
                "again with it."
            )
    _check(config, found, workdir)
    return (encoder if needed else None), found


def keep_text(config: FrozenTextConfig, digest: str, workdir: str | Path) -> None:
    """Notes in `workdir` which encoder its denoiser reads."""
    path = epath.Path(workdir) / FILE
    if jax.process_index() == 0 and not path.exists():
        about = {"hash": digest, "path": config.path, "revision": config.revision}
        path.write_text(json.dumps(about, indent=2) + "\n")


def kept_hash(workdir: str | Path) -> str:
    """The hash of the published encoder that a run's denoiser reads; empty without one."""
    path = epath.Path(workdir) / FILE
    return json.loads(path.read_text())["hash"] if path.exists() else ""


def open_text(config: FrozenTextConfig, digest: str = "") -> FrozenText:
    """The encoder, unless it is another than that of a hash.

    Raises:
      UserError: it cannot be had, or is another one.
    """
    encoder = FrozenText.open(config)
    if digest not in ("", encoder.hash):
        raise UserError(
            f"The text encoder {config.path} is {encoder.hash}, but this denoiser was trained with "
            f"{digest}: put that one there."
        )
    return encoder


def _check(config: FrozenTextConfig, digest: str, workdir: str | Path) -> None:
    if (kept := kept_hash(workdir)) not in ("", digest):
        raise UserError(
            f"The text encoder {config.path} is {digest}, but {workdir} was started with {kept}: "
            "start the denoiser in another --workdir."
        )


def _is_here(config: FrozenTextConfig) -> bool:
    try:
        config.folder(download=False)
    except UserError:
        return False
    return True
