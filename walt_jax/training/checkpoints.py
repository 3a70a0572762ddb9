"""Checkpoints by orbax: state, data position, rng and accounting of a run (docs/checkpoints.md).

`workdir/checkpoints/STEP/` holds the items `params`, `ema`, `opt_state` and `rest` (arrays), and
`progress` and `contents` (JSON). A checkpoint appears under its name only when it is whole, and the
one before it goes only after that. `contents` lists every array with its shape, dtype and checksum,
so that what was damaged later is found, and told from a checkpoint of another model.
"""

import dataclasses
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from walt_jax.data.stores import is_remote
from walt_jax.errors import UserError
from walt_jax.parallel import distributed
from walt_jax.training.checksums import checksums, describe_arrays
from walt_jax.training.progress import Progress

PyTree = Any
T = TypeVar("T")
FOLDER, DAMAGED = "checkpoints", "damaged"
FORMAT = 2
_REST = ("step", "extra")
_ABOUT_DAMAGED = "Checkpoints that could not be read. Nothing needs them: delete them.\n"
_SAVE_TIMEOUT = 900  # seconds that a process waits for the others' parts of a checkpoint
# Of errors that say nothing about a checkpoint: it is not set aside, and a restart may read it.
_ELSEWHERE = (
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)
logger = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every file it writes


class Checkpoints:
    """Saves and restores states (dataclasses); a context manager that waits for the last save.

    Attributes:
      directory: `workdir/checkpoints`.
      restored: the step of the checkpoint that was read last, None before.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        """Opens, and for writing makes, the folder; what a cut-off save left is removed.

        Args:
          workdir: of the run, local or gs://.
          keep: how many of the newest stay.
          keep_every: those of steps that it divides stay too; 0 is none.
          read_only: nothing is made, moved or removed.

        Raises:
          UserError: there is nothing to read, or gs:// needs a library.
        """
        self.directory = epath.Path(workdir) / FOLDER
        self.restored: int | None = None
        self._read_only = read_only
        if read_only and not self.directory.exists():
            raise UserError(f"{workdir} has no checkpoint: train it first, or wait for one.")
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(timeout_secs=_SAVE_TIMEOUT),
            )
        if str(workdir).startswith("gs://"):
            _check_library(workdir)
        self._manager = ocp.CheckpointManager(absolute(self.directory), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if kind is None:
            self.finish()
            self._manager.close()
        elif jax.process_count() == 1:
            try:
                self._manager.close()
            except Exception as e:  # the exception that is under way tells more
                logger.warning("the checkpoint being written is lost: %s", _first_line(e))

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, None without any."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, progress: Progress) -> None:
        """Starts to save; the arrays are copied before it returns, written in the background.

        Raises:
          UserError: the save before this one failed (a full disk, say).
        """
        items = _items(_as_dict(state))
        sums = checksums(items)
        arrays = {name: [*about, sums[name]] for name, about in describe_arrays(items).items()}
        told = dataclasses.asdict(progress)
        contents = {"format": FORMAT, "arrays": arrays, "sha256": _digest(arrays, told)}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args |= {"progress": ocp.args.JsonSave(told), "contents": ocp.args.JsonSave(contents)}
        self._guarded(
            lambda: self._manager.save(progress.step, args=ocp.args.Composite(**args), force=True)
        )

    def finish(self) -> None:
        """Waits for the save under way.

        Raises:
          UserError: it failed.
        """
        self._guarded(self._manager.wait_until_finished)

    def restore(self, abstract: T, step: int | None = None) -> tuple[T, Progress]:
        """Restores onto the shardings of `abstract`, a state of ShapeDtypeStructs.

        The mesh and the number of processes may be others than those that saved. Without `step`, a
        damaged checkpoint is passed over for the one before it, and moved to `workdir/damaged`.

        Raises:
          UserError: no such checkpoint, none that is whole, or one of another architecture.
        """
        items = _items(_as_dict(abstract))

        def read(path: epath.Path) -> tuple[T, Progress]:
            contents, progress = _contents(path)
            _check_architecture(path, contents["arrays"], describe_arrays(items))
            handler = ocp.StandardCheckpointHandler()
            restored = {
                name: handler.restore(path / name, args=ocp.args.StandardRestore(tree))
                for name, tree in items.items()
            }
            _check_sums(contents["arrays"], checksums(restored))
            fields = _as_dict(abstract) | {k: v for k, v in restored.items() if k != "rest"}
            return type(abstract)(**fields | restored["rest"]), progress

        return self._newest(read, step)

    def restore_part(self, names: tuple[str, ...], step: int | None = None) -> dict[str, PyTree]:
        """Parts of a state (`ema`, `extra`, ...) as numpy arrays, read on their own.

        Damaged checkpoints are passed over as `restore` does.

        Raises:
          UserError: no such checkpoint, or none whose parts are whole.
        """

        def read(path: epath.Path) -> dict[str, PyTree]:
            contents, _ = _contents(path)
            wanted = {"rest" if name in _REST else name for name in names}
            items = {name: _read_arrays(path / name) for name in sorted(wanted)}
            _check_sums(contents["arrays"], checksums(items))
            return {n: items["rest"].get(n, {}) if n in _REST else items[n] for n in names}

        return self._newest(read, step)

    def _newest(self, read: Callable[[epath.Path], T], step: int | None) -> T:
        """What `read` makes of the checkpoint of `step`, or of the newest that is whole."""
        steps = self.steps[::-1]
        if step is not None or not steps:
            if step not in steps:
                have = ", ".join(map(str, steps)) or "none"
                raise UserError(
                    f"No checkpoint of step {step} in {self.directory} (it has: {have})."
                )
            steps = [step]
        damaged = []
        for candidate in steps:
            path, value, problem = absolute(self.directory) / str(candidate), None, ""
            try:
                value = read(path)
            except UserError:
                raise
            except Exception as e:  # orbax and tensorstore each raise their own kinds
                if isinstance(e, MemoryError) or any(word in str(e) for word in _ELSEWHERE):
                    raise
                problem = _first_line(e)
            if not (problem := distributed.agree(problem)):
                self._set_aside(damaged)
                self.restored = candidate
                return value
            damaged.append(candidate)
            logger.warning(
                "%s is damaged (%s): passed over", self.directory / str(candidate), problem
            )
        raise UserError(
            f"{self.directory / str(steps[0])} is damaged ({problem}), and there is no other "
            "checkpoint that is whole: put it back from a copy, or delete it to begin anew."
            if len(steps) == 1
            else f"All checkpoints in {self.directory} are damaged (steps "
            f"{', '.join(map(str, damaged))}): put one back, or delete them to begin anew."
        )

    def _set_aside(self, damaged: list[int]) -> None:
        """Moves checkpoints out of the way of new ones of the same steps."""
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            folder = self.directory.parent / DAMAGED
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README").write_text(_ABOUT_DAMAGED)  # on gs:// it makes the folder
            for step in damaged:
                number = sum(p.name.split("-")[0] == str(step) for p in folder.iterdir())
                (self.directory / str(step)).rename(
                    folder / (f"{step}-{number}" if number else str(step))
                )
            logger.warning("damaged checkpoints were moved to %s", folder)
        distributed.agree("")  # all look again after the first has moved them
        self._manager.reload()

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as e:  # orbax and tensorstore each raise their own kinds
            # Not by the manager, which has forgotten what it was to delete after this save.
            there = [p for p in absolute(self.directory).iterdir() if p.name.isdigit()]
            whole = filter(ocp.utils.is_checkpoint_finalized, there)  # on gs:// a half has the name
            last = max((int(p.name) for p in whole), default=None)
            kept = "there is none yet" if last is None else f"the last good one is of step {last}"
            raise UserError(
                f"A checkpoint in {self.directory} could not be written ({_first_line(e)}); "
                f"{kept}: make room or check the storage, then give the same command to go on."
            ) from e


def absolute(path: epath.Path) -> epath.Path:
    """As orbax asks for it; epath's own `resolve` makes gs:// a folder beside this process."""
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def numbered(tree: PyTree) -> PyTree:
    """A restored tree with the numbers of lists as they were: orbax gives them as strings.

    Sorted as strings, "10" comes before "2", and a module would take the one's weights for the
    other's.
    """
    if not isinstance(tree, dict):
        return tree
    named = {int(k) if str(k).isdigit() else k: numbered(v) for k, v in tree.items()}
    return dict(sorted(named.items()))


def _check_library(workdir: str | epath.Path) -> None:
    """Before the first checkpoint is due: orbax does not declare what it lists gs:// by."""
    try:
        importlib.import_module("google.cloud.storage")
    except ImportError as e:
        raise UserError(
            f"Checkpoints in {workdir} need a library ({e}): pip install google-cloud-storage."
        ) from e


def _as_dict(state: Any) -> dict[str, PyTree]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _items(fields: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """A state's fields as a checkpoint's items; orbax takes none without arrays."""
    items = {name: tree for name, tree in fields.items() if name not in _REST}
    items["rest"] = {name: fields[name] for name in _REST}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _contents(path: epath.Path) -> tuple[dict[str, Any], Progress]:
    """A checkpoint's list of arrays and its progress.

    Raises:
      UserError: a checkpoint of another format.
      Exception: anything else, where it is damaged.
    """
    if (path / "state").exists():
        raise UserError(
            f"{path} was written by an older walt_jax (its arrays lie in one folder 'state'): go "
            "on with that version, or choose another --workdir."
        )
    contents = json.loads((path / "contents" / "metadata").read_text())
    progress = json.loads((path / "progress" / "metadata").read_text())
    if contents["sha256"] != _digest(contents["arrays"], progress):
        raise ValueError("its contents or progress were changed")
    fields = {field.name for field in dataclasses.fields(Progress)}
    if contents["format"] != FORMAT or progress.keys() - fields:
        raise UserError(
            f"{path} has format {contents['format']} and keeps {', '.join(sorted(progress))}; this "
            f"walt_jax reads format {FORMAT} with {', '.join(sorted(fields))}: use the version "
            "that wrote it."
        )
    return contents, Progress(**progress)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check_architecture(path: epath.Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    theirs = {name: about[:2] for name, about in theirs.items()}
    if theirs == ours:
        return
    name = min(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
    held, wanted = (_told(arrays.get(name)) for arrays in (theirs, ours))
    raise UserError(
        f"{path} is of another model or optimizer than the config's ({name}: the checkpoint has "
        f"{held}, the config {wanted}): give its own config, or another --workdir."
    )


def _told(about: list[Any] | None) -> str:
    return f"{about[1]} {tuple(about[0])}" if about else "no such array"


def _check_sums(arrays: dict[str, Any], sums: dict[str, int]) -> None:
    parts = {name.split("/")[0] for name in sums}
    expected = {name: about[2] for name, about in arrays.items() if name.split("/")[0] in parts}
    wrong = sorted(n for n in expected.keys() | sums.keys() if expected.get(n) != sums.get(n))
    if wrong:
        raise ValueError(f"{wrong[0]} is not what was saved")


def _read_arrays(path: epath.Path) -> PyTree:
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return numbered(handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return line if len(line) <= 200 else f"{line[:60]} ... {line[-130:]}"
