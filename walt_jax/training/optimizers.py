"""Optimizers and learning-rate schedules."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from walt_jax.parallel.sharding import path_of


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to 0.

    Attributes:
      learning_rate: the peak.
      warmup_steps: steps of the linear rise to the peak.
      b1, b2: moment decays.
      weight_decay: decoupled, on matrices and convolutions only.
      grad_clip: largest global norm of a gradient; 0 turns clipping off.
      ema_decay: decay of the parameters' moving average.
    """

    learning_rate: float = 5e-4
    warmup_steps: int = 1000
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """step -> learning rate."""
    warmup = min(config.warmup_steps, num_steps)
    start = config.learning_rate / max(warmup, 1)  # from 0 the first update would do nothing
    return optax.warmup_cosine_decay_schedule(
        start, config.learning_rate, warmup, max(num_steps, warmup + 1)
    )


def make_optimizer(
    config: OptimizerConfig, num_steps: int, starts: Mapping[str, int] | None = None
) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` updates.

    Args:
      config: the optimizer.
      num_steps: length of the schedule.
      starts: sub-network -> the step of its first gradient, as `Task.starts` says. Until then its
        moments wait: counted steps without a gradient would make its first updates too large.
    """

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path_of(path).endswith("kernel"), params
        )

    direction = [
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, decayed),
    ]
    if starts:
        early = optax.chain(*direction)
        late = {
            name: optax.conditionally_transform(early, lambda step, start=start: step >= start)
            for name, start in starts.items()
        }

        def labels(params: Any) -> dict[str, str]:
            return {name: name if name in late else "others" for name in params}

        direction = [optax.partition({"others": early, **late}, labels)]
    adamw = optax.chain(*direction, optax.scale_by_learning_rate(make_schedule(config, num_steps)))
    if not config.grad_clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)
