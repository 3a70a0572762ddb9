"""What a run does when a loss is not finite or jumps: stop, leave the update out, or go back."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Literal

import numpy as np

from walt_jax.data.joint import Joint
from walt_jax.data.pipeline import Pipeline
from walt_jax.errors import UserError

_LEAST = 8  # losses before a spike can be told
_SHOWN = 8  # records named in a sentence


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Divergence and hangs.

    Attributes:
      nonfinite: where the loss or a gradient is NaN or infinite, "stop" the run; "skip" the update
        (the state stays as it was, but for its step); or "rollback" to the newest checkpoint and
        train on without the batch.
      spikes: where the loss jumps, "ignore" it, "stop", or "rollback".
      spike_deviations: a spike is a loss that lies so many standard deviations (estimated by
        quartiles) above the median of the latest losses, and above twice that median.
      spike_window: how many latest losses those are.
      left_out: batches left out by a roll-back, from the one that diverged on.
      max_rollbacks: after so many the run stops.
      hang_seconds: a process that gets no step, batch or file done for so long ends the job; 0
        waits for ever. It must be longer than compiling an evaluation takes.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    spikes: Literal["ignore", "stop", "rollback"] = "ignore"
    spike_deviations: float = 10.0
    spike_window: int = 100
    left_out: int = 1
    max_rollbacks: int = 10
    hang_seconds: float = 1800.0

    def __post_init__(self) -> None:
        least = {"spike_deviations": 0, "spike_window": _LEAST, "left_out": 1, "max_rollbacks": 0}
        for name, value in (least | {"hang_seconds": 0}).items():
            if getattr(self, name) < value:
                raise UserError(
                    f"config.guard.{name} must be at least {value}, got {getattr(self, name)}."
                )


class Diverged(UserError):
    """A step that the policy does not accept.

    Attributes:
      batch: the index of its batch.
      rolls_back: whether the policy is to go back; otherwise the run ends with the sentence.
    """

    def __init__(self, sentence: str, batch: int, *, rolls_back: bool) -> None:
        super().__init__(sentence)
        self.batch, self.rolls_back = batch, rolls_back


class Guard:
    """Looks at every step's metrics."""

    def __init__(self, config: GuardConfig, data: Pipeline | Joint, losses: list[float]) -> None:
        """`losses`: of the latest steps, in place: they belong to the run's progress."""
        self._config, self._data, self.losses = config, data, losses

    def check(self, step: int, batch: int, metrics: Mapping[str, float]) -> str:
        """Accepts a step, or not.

        Args:
          step: updates done with it; batch: the index of its batch.
          metrics: its scalars.

        Returns:
          A sentence about an update that was left out; empty otherwise.

        Raises:
          Diverged: the policy is to stop or to go back.
        """
        config, loss = self._config, metrics["loss"]
        if not finite(metrics):
            sentence = (
                f"The loss is {loss} at step {step} ({_groups(metrics)}), of "
                f"{describe_batch(self._data, batch)}"
            )
            if config.nonfinite == "skip":
                return f"{sentence}: its update was left out."
            self._refuse(sentence, batch, config.nonfinite)
        if (normal := self._spike(loss)) is not None:
            sentence = (
                f"The loss jumped to {loss:.4g} at step {step} (the median of the latest is "
                f"{normal:.4g}; {_groups(metrics)}), of {describe_batch(self._data, batch)}"
            )
            self._refuse(sentence, batch, config.spikes)
        self.losses.append(loss)
        del self.losses[: -config.spike_window]
        return ""

    def _refuse(self, sentence: str, batch: int, policy: str) -> None:
        advice = (
            ": lower config.optimizer.learning_rate, look at the batch, or see config.guard; "
            "checkpoints before it are kept."
        )
        rolls_back = policy == "rollback"
        raise Diverged(sentence + ("" if rolls_back else advice), batch, rolls_back=rolls_back)

    def _spike(self, loss: float) -> float | None:
        """The median of the latest losses, if this one is far above it."""
        if self._config.spikes == "ignore" or len(self.losses) < _LEAST:
            return None
        low, median, high = statistics.quantiles(self.losses, n=4)
        deviation = (high - low) / 1.349  # of a normal distribution with these quartiles
        limit = max(median + self._config.spike_deviations * deviation, 2 * median)
        return median if loss > limit else None


def finite(metrics: Mapping[str, float]) -> bool:
    """Whether a step's loss and gradients are; other metrics, such as a PSNR, need not be."""
    return all(
        math.isfinite(value)
        for name, value in metrics.items()
        if name == "loss" or name.partition("/")[0] == "grad_norm"
    )


def _groups(metrics: Mapping[str, float]) -> str:
    """The parameter groups whose gradients are not finite, or else those with the largest."""
    norms = {k.removeprefix("grad_norm/"): v for k, v in metrics.items() if "grad_norm/" in k}
    if bad := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        return f"gradients not finite: {', '.join(bad)}"
    largest = sorted(norms, key=lambda name: -norms[name])[:3]
    return "largest gradients: " + ", ".join(f"{name} {norms[name]:.3g}" for name in largest)


def describe_batch(data: Pipeline | Joint, number: int) -> str:
    """`batch 6: keys a.mp4@0.0, b.mp4@1.5`, and which of its arrays are not finite, by row."""
    pipelines = data.pipelines if isinstance(data, Joint) else [data]
    parts = []
    for pipeline in pipelines:
        keys = pipeline.keys(number)
        bad = []
        try:
            for name, x in next(pipeline.batches(number)).items():
                if x.dtype.kind == "f":
                    finite = np.isfinite(x.astype(np.float32)).reshape(len(x), -1).all(1)
                    bad += [f"{name} of {keys[row]}" for row in np.flatnonzero(~finite)]
        except Exception as e:  # what is told must not fail for what it tells of
            bad = [f"it cannot be read again: {e}"]
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        wrong = f"; not finite: {', '.join(bad[:_SHOWN])}" if bad else ""
        parts.append(f"keys {', '.join(keys[:_SHOWN])}{more}{wrong}")
    return f"batch {number}: " + "; images: ".join(parts)
