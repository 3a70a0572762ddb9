"""Scoring checkpoints as they come: a job of its own, on other chips than training."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.evaluation import scores
from walt_jax.evaluation.scores import Score
from walt_jax.training.checkpoints import FOLDER, Checkpoints

logger = logging.getLogger(__name__)
NOTHING = -1


def follow(
    workdir: str | Path,
    score: Callable[[int], list[Score]],
    *,
    poll: float = 30.0,
    patience: float | None = None,
    newest: bool = False,
    publish: bool = True,
) -> list[Score]:
    """Scores every checkpoint of a run, until the run's last step.

    A checkpoint that training removes, or that turns out to be damaged, is told of and passed over.

    Args:
      workdir: of the run, which need not have begun.
      score: makes and writes the scores of a step.
      poll: seconds between two looks.
      patience: seconds without a new checkpoint after which it ends; None waits for ever.
      newest: leave out checkpoints that are older than the newest one by the time they are due.
      publish: put the scores into the run's TensorBoard.

    Returns:
      All scores, in the order in which they were made.

    Raises:
      UserError: the first checkpoint cannot be scored.
    """
    made: list[Score] = []
    for step in arrivals(workdir, poll=poll, patience=patience, newest=newest):
        try:
            found = score(step)
        except UserError as error:
            if step in steps_of(workdir):
                if not made:
                    raise
                logger.warning("step %d is passed over: %s", step, error)
            else:
                logger.warning("step %d was removed while it was scored", step)
            continue
        made += found
        if jax.process_index() == 0:
            if publish:
                scores.to_tensorboard(workdir, found)
            logger.info("step %d: %s", step, "  ".join(map(str, found)))
    return made


def arrivals(
    workdir: str | Path, *, poll: float, patience: float | None, newest: bool
) -> Iterator[int]:
    """Steps of checkpoints, rising, as they appear; ends after the run's last step."""
    seen, since, said = NOTHING, time.monotonic(), False
    while True:
        step = _agreed(_next(steps_of(workdir), seen, newest))
        if step != NOTHING:
            seen = step
            yield step
            since, said = time.monotonic(), False
        elif seen != NOTHING and seen >= config_lib.read_resolved(workdir)["num_steps"]:
            return
        else:
            waited = time.monotonic() - since
            if _agreed(int(patience is not None and waited >= patience)):
                logger.info("no new checkpoint in %s for %.0f s: ends", workdir, waited)
                return
            if not said:
                logger.info("waits for a checkpoint in %s", workdir)
                said = True
            time.sleep(poll)


def steps_of(workdir: str | Path) -> list[int]:
    """Steps of the whole checkpoints of a run that may not have begun."""
    folder = epath.Path(workdir)
    if not (folder / config_lib.RESOLVED).exists() or not (folder / FOLDER).exists():
        return []
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.steps


def _next(steps: list[int], seen: int, newest: bool) -> int:
    new = [step for step in steps if step > seen]
    return (max if newest else min)(new, default=NOTHING)


def _agreed(value: int) -> int:
    """What the first process found, on all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))
