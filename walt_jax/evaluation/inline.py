"""A run's own evaluators, between two steps of its loop."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from walt_jax import config as config_lib
from walt_jax.evaluation import scores, scoring
from walt_jax.evaluation.evaluators import Evaluator
from walt_jax.evaluation.reconstruct import Reconstructor
from walt_jax.generation import Generator
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, network
from walt_jax.tasks import DenoiserTask
from walt_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class Inline:
    """The evaluators of an experiment that training takes itself."""

    def __init__(
        self,
        experiment: Any,
        workdir: str | Path,
        mesh: Mesh,
        frozen: Any,
        about: Mapping[str, Any],
        *,
        quiet: bool,
        beat: Callable[[], None],
    ) -> None:
        """Nothing is checked yet: that needs the state's weights; see `prepare`.

        Args:
          experiment: an `Experiment`.
          workdir: of the run.
          mesh: of the run; a denoiser samples on it.
          frozen: what the task keeps fixed, on the mesh.
          about: the run's `dataset.json`.
          quiet: show no progress.
          beat: called now and then while it scores, as a sign of life.
        """
        self._experiment, self._workdir, self._mesh = experiment, workdir, mesh
        self._frozen, self._about, self._quiet, self._beat = frozen, about, quiet, beat
        self._evaluators: list[Evaluator] = [e for e in experiment.evaluators if e.inline]
        self._scorings: list[scoring.Scoring] = []

    def prepare(self, state: TrainState) -> None:
        """Finds the real clips, loads feature networks, sums over real clips: before step 1.

        Raises:
          UserError: something is missing, or an evaluator does not fit the run.
        """
        if not self._evaluators:
            return
        with jax.transfer_guard("allow"):
            self._scorings = scoring.make(
                self._evaluators,
                self._subject(state, 0),
                config_lib.to_dict(self._experiment),
                self._workdir,
                progress=not self._quiet,
                beat=self._beat,
            )
            for group in self._scorings:
                group.prepare()

    def due(self, step: int) -> list[scoring.Scoring]:
        """Those that score after `step` updates."""
        last = step == self._experiment.num_steps
        return [group for group in self._scorings if group.due(step, last)]

    def __call__(self, state: TrainState, step: int, writer: Any) -> dict[str, float]:
        """The scores that are due after `step`, as `score/NAME`."""
        due = self.due(step)
        with jax.transfer_guard("allow"):
            subject = self._subject(state, step)
            shared = isinstance(subject, Generator)
            found = [score for group in due for score in group(subject, shared=shared)]
        values = dict(scores.scalars(found))
        if writer is not None:
            writer.write_scalars(step, values)
        if not self._quiet:
            logger.info("step %d: %s", step, "  ".join(map(str, found)))
        return values

    def _subject(self, state: TrainState, step: int) -> scoring.Subject:
        task, data = self._experiment.task, self._experiment.data
        if isinstance(task, DenoiserTask):
            names, fps = tuple(self._about["label_names"]), self._about["fps"]
            return Generator(task, state.ema, self._frozen, names, fps, step, "ema", self._mesh)
        names = network(task.model).shapes()  # no discriminator
        params, extra = _on_host(({n: state.ema[n] for n in names}, state.extra))
        tokenizer = FrozenTokenizer.create(
            task.model, params, extra["latent_mean"], extra["latent_square"]
        )
        return Reconstructor(tokenizer, (data.num_frames, *data.sizes[0]), data.fps, step)


def _on_host(tree: Any) -> Any:
    """Numpy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
