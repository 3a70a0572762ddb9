"""Profiles of a few steps for xprof and TensorBoard, planned or asked for while the run goes on."""

import dataclasses
import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from etils import epath

from walt_jax.errors import UserError

logger = logging.getLogger(__name__)
REQUEST = "profile"  # the file in the workdir that asks for one


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps that is profiled.

    Attributes:
      first_step: updates before it; 0 plans none.
      num_steps: its length, also of those asked for by SIGUSR1 to a process (which profiles that
        one), or by a file `profile` in the workdir (all processes).
      poll_every: updates between two looks for the file; 0 never looks.
    """

    first_step: int = 0
    num_steps: int = 3
    poll_every: int = 20

    def __post_init__(self) -> None:
        for name, least in {"first_step": 0, "num_steps": 1, "poll_every": 0}.items():
            if getattr(self, name) < least:
                raise UserError(
                    f"config.profile.{name} must be at least {least}, got {getattr(self, name)}."
                )


class Profiler:
    """Starts and stops traces between steps; a context manager that ends one under way."""

    def __init__(self, config: ProfileConfig, workdir: str | Path) -> None:
        self._config, self._workdir = config, epath.Path(workdir)
        self._asked, self._stop = False, 0
        self._before: Any = None

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop:
            self._end()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def step(self, done: int, state: Any) -> None:
        """Called before each step, after `done` updates; a window begins and ends with `state`."""
        if self._stop:
            if done >= self._stop:
                jax.block_until_ready(state)
                self._end()
            return
        planned = self._config.first_step and done == self._config.first_step
        if not (planned or self._asked or self._found(done)):
            return
        self._asked, self._stop = False, done + self._config.num_steps
        jax.block_until_ready(state)
        # xprof and TensorBoard look for `plugins/profile/TIME` below the folder.
        jax.profiler.start_trace(str(self._workdir / "tensorboard"))

    def _found(self, done: int) -> bool:
        every, file = self._config.poll_every, self._workdir / REQUEST
        if not every or done % every or not file.exists():
            return False
        if jax.process_index() == 0:
            # The others look at about the same time: it goes when the window ends.
            logger.info("%s asks for a profile of %d steps", file, self._config.num_steps)
        return True

    def _end(self) -> None:
        self._stop = 0
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            (self._workdir / REQUEST).unlink(missing_ok=True)
        logger.info("a profile is in %s: tensorboard --logdir", self._workdir / "tensorboard")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
