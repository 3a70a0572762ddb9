"""Optimizers and learning-rate schedules."""

import dataclasses
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


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` updates."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path_of(path).endswith("kernel"), params
        )

    adamw = optax.adamw(
        make_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if not config.grad_clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)
