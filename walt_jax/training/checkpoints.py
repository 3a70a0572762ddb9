"""Checkpoints by orbax: the training state, the data position and the accounting of a run.

Layout: `workdir/checkpoints/STEP/state` holds the arrays of the state, `.../progress` JSON. A
checkpoint appears under its name only when it is whole.
"""

import dataclasses
import logging
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from walt_jax.errors import UserError

PyTree = Any
T = TypeVar("T")
FOLDER = "checkpoints"
logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every file it writes


@dataclasses.dataclass
class Progress:
    """What a run has done so far, kept beside the state.

    Attributes:
      next_batch: index of the next batch; with the seed, the whole position in the data.
      clips: clips trained on.
      seconds: wall time in the loop; core_seconds: that times the number of devices.
      flops: model FLOPs over all devices; with `core_seconds` and the chip's peak, the MFU.
    """

    next_batch: int = 0
    clips: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    flops: float = 0.0


class Checkpoints:
    """Saves and restores states (dataclasses); a context manager that waits for the last save."""

    def __init__(
        self, workdir: str | epath.Path, *, keep: int = 2, read_only: bool = False
    ) -> None:
        self.directory = epath.Path(workdir) / FOLDER
        if read_only and not self.directory.exists():
            raise UserError(f"{workdir} has no checkpoint: train it first, or wait for one.")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(self.directory.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, None without any."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def save(self, state: Any, progress: Progress) -> None:
        """Starts to save; the arrays are copied before it returns, written in the background."""
        self._manager.save(
            progress.next_batch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
            force=True,
        )

    def restore(self, abstract: T, step: int | None = None) -> tuple[T, Progress]:
        """Restores onto the shardings of `abstract`, a state of ShapeDtypeStructs.

        Raises:
          UserError: no such checkpoint, or one of another architecture.
        """
        step = self._step(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_as_dict(abstract)), progress=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as e:  # orbax and tensorstore each raise their own kinds
            raise self._unreadable(step, e) from e
        return type(abstract)(**restored["state"]), Progress(**restored["progress"])

    def restore_part(self, names: tuple[str, ...], step: int | None = None) -> dict[str, PyTree]:
        """Parts of a state (`ema`, `extra`, ...) as numpy arrays, read on their own.

        Raises:
          UserError: no such checkpoint.
        """
        step = self._step(step)
        path = self.directory.resolve() / str(step) / "state"
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(path).item_metadata.tree
                item = {n: jax.tree.map(lambda _: 0, tree[n]) for n in names}
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
                args = ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
                return numbered(checkpointer.restore(path, args=args))
        except Exception as e:  # orbax and tensorstore each raise their own kinds
            raise self._unreadable(step, e) from e

    def _unreadable(self, step: int, error: Exception) -> UserError:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return UserError(
            f"{self.directory / str(step)} is damaged, or of another model than the config's "
            f"({first}): delete it to go on from the one before, or give its own config."
        )

    def _step(self, step: int | None) -> int:
        step = self.latest if step is None else step
        if step is None or step not in self._manager.all_steps():
            have = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise UserError(f"No checkpoint of step {step} in {self.directory} (it has: {have}).")
        return step


def numbered(tree: PyTree) -> PyTree:
    """A restored tree with the numbers of lists as they were: orbax gives them as strings.

    Sorted as strings, "10" comes before "2", and a module would take the one's weights for the
    other's.
    """
    if not isinstance(tree, dict):
        return tree
    named = {int(k) if str(k).isdigit() else k: numbered(v) for k, v in tree.items()}
    return dict(sorted(named.items()))


def _as_dict(state: Any) -> dict[str, PyTree]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
