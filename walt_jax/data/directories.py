"""Directories that a writer claims: whether one may be taken, a lock on it, emptying it."""

import fcntl
import os
import shutil
from pathlib import Path

from walt_jax.errors import UserError


def check_free(directory: Path, overwrite: bool) -> None:
    """Raises UserError if `directory` holds anything, or a dataset that is not to be replaced."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / "metadata.json").is_file():
        raise UserError(f"{directory} exists and is not a dataset: give another --output.")
    if not overwrite:
        raise UserError(f"{directory} holds a dataset: give --overwrite or another --output.")


def lock_directory(directory: Path) -> int:
    """Makes and locks a directory until the descriptor returned is closed, or the process ends."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{directory} is being written by another process: wait for it.") from None
    except OSError:
        pass  # file systems without locks
    return lock


def empty_directory(directory: Path) -> None:
    """Removes everything in a directory."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
