"""The loop's log: metrics read one step late, checked, averaged over a window; work counted."""

import copy
import logging
import time
from typing import Any

import jax
import numpy as np

from walt_jax.data.joint import Joint
from walt_jax.data.pipeline import Pipeline
from walt_jax.errors import UserError
from walt_jax.training import metrics as metrics_lib
from walt_jax.training.experiment import Experiment
from walt_jax.training.goodput import Goodput
from walt_jax.training.guard import Guard, finite
from walt_jax.training.progress import Progress

logger = logging.getLogger(__name__)


class Log:
    """Reads metrics one step late, so that the devices never wait for the host.

    Attributes:
      progress: of the run, as of the newest step given to `add`.
    """

    def __init__(
        self,
        experiment: Experiment,
        progress: Progress,
        guard: Guard,
        goodput: Goodput,
        data: Pipeline | Joint,
        writer: Any,
        *,
        quiet: bool,
    ) -> None:
        self.progress = progress
        self._experiment, self._guard, self._goodput = experiment, guard, goodput
        self._data, self._writer, self._quiet = data, writer, quiet
        self._waited = goodput.spent.get("data", 0.0)
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None
        self._window: list[dict[str, float]] = []
        self._clock = time.monotonic()
        self._mark = copy.copy(progress)
        self._line = metrics_lib.ProgressLine(
            "step", experiment.num_steps, progress.step, enabled=not quiet
        )

    def add(self, batch: int, metrics: dict[str, jax.Array], flops: float) -> None:
        """Takes a step's metrics, still being computed, and handles those of the step before.

        Raises:
          Diverged: the step before is not accepted.
        """
        progress = self.progress
        pending, self._pending = self._pending, (progress.step + 1, batch, metrics)
        self._read(pending)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        progress.step += 1
        progress.next_batch = batch + 1
        progress.clips += self._data.num_clips(batch)
        progress.seconds += seconds
        progress.core_seconds += seconds * jax.device_count()
        progress.flops += flops

    def flush(self) -> None:
        """Waits for the newest step and handles its metrics.

        Raises:
          Diverged: it is not accepted.
        """
        pending, self._pending = self._pending, None
        self._read(pending)

    def record(self) -> Progress:
        """What a checkpoint keeps of now."""
        self._goodput.to("checkpoint")
        progress = copy.deepcopy(self.progress)
        progress.losses = list(self._guard.losses)
        progress.spent, progress.saved_at = dict(self._goodput.spent), time.time()
        return progress

    def _read(self, pending: tuple[int, int, dict[str, jax.Array]] | None) -> None:
        if pending is None:
            return
        step, batch, metrics = pending
        values = {k: float(v) for k, v in sorted(jax.device_get(metrics).items())}
        if (problem := self._guard.check(step, batch, values)) and not self._quiet:
            logger.warning(problem)
        if finite(values):
            self._window.append(values)
        self._goodput.alive(step)
        if step % self._experiment.log_every and step != self._experiment.num_steps:
            return
        if not self._window:
            return
        means = {k: float(np.mean([w[k] for w in self._window])) for k in values}
        self._window = []
        rates = self._rates()
        if self._writer is not None:
            hours = self.progress.core_seconds / 3600
            scalars = {f"train/{k}": v for k, v in means.items()}
            scalars |= {f"speed/{k}": v for k, v in rates.items()}
            scalars |= {"speed/core_hours": hours, "speed/goodput": self._goodput.share}
            scalars["data/broken_records"] = len(self._data.broken)
            self._write(step, scalars)
        del means["learning_rate"]
        self._line(step, rates, {"loss": means["loss"], **means})

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        try:
            self._writer.write_scalars(step, scalars)
        except Exception as e:  # TensorFlow has errors of its own for a full disk
            raise UserError(
                f"The metrics of step {step} could not be written ({e}): make room or check the "
                "storage, then give the same command to go on."
            ) from e

    def _rates(self) -> dict[str, float]:
        now, before = self.progress, self._mark
        self._mark = copy.copy(now)
        seconds = max(now.seconds - before.seconds, 1e-9)
        waited, self._waited = self._waited, self._goodput.spent.get("data", 0.0)
        devices = jax.device_count()
        rates = {
            "steps/s": (now.step - before.step) / seconds,
            "clips/s": (now.clips - before.clips) / seconds,
            "clips/s/chip": (now.clips - before.clips) / seconds / devices,
            "input wait": (self._waited - waited) / seconds,
        }
        if peak := metrics_lib.peak_flops(jax.devices()[0].device_kind):
            rates["MFU"] = (now.flops - before.flops) / seconds / devices / peak
        return rates
