"""Optimizers and learning-rate schedules."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax
from optax import contrib

from walt_jax.errors import UserError
from walt_jax.parallel.sharding import path_of

_FROZEN, _OTHERS = "frozen", "others"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with linear warm-up.

    Attributes:
      name: "adamw"; "adafactor", which keeps second moments by rows and columns: a fraction of
        the memory (1804.04235, without its scaling by the parameters' size); or "muon", which
        orthogonalises the momentum of kernels and leaves the rest to Adam, at AdamW's learning
        rates (its updates have an RMS of 0.2, 2502.16982 section 2.2).
      learning_rate: the peak.
      warmup_steps: steps of the linear rise to the peak.
      schedule: after that, "cosine" decay to 0 or "constant".
      b1, b2: moment decays; with b1 = 0 adafactor keeps no first moment, and it has its own b2;
        muon's momentum decays by 0.95.
      weight_decay: decoupled, on matrices and convolutions only.
      grad_clip: largest global norm of a gradient; 0 turns clipping off.
      ema_decay: decay of the parameters' moving average; 0 is none.
      accumulate: parts that a batch is cut into, one after the other: the activations of one are
        in memory at a time, the update is of their mean gradient. Noise is drawn for each part.
      grad_dtype: of gradients between the backward pass and the optimizer, and of their sum where
        they are accumulated. The optimizer computes in float32.
      offload: the optimizer's state rests in the memory of the hosts and comes to the chips for the
        update only. It costs transfers in every step: for models that do not fit otherwise.
      frozen: regular expressions; parameters in whose paths one is found stay as they are
        (a run's `shardings.txt` lists the paths).
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 5e-4
    warmup_steps: int = 1000
    schedule: Literal["cosine", "constant"] = "cosine"
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    accumulate: int = 1
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UserError(
                f"config.optimizer.accumulate must be at least 1, got {self.accumulate}."
            )
        for pattern in self.frozen:
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(
                    f"config.optimizer.frozen has {pattern!r}, which is no regular expression: {e}."
                ) from e

    def is_frozen(self, params: Any) -> Any:
        """Which leaves stay as they are: a tree of bool.

        Raises:
          UserError: an expression that is found in no path, or nothing is left to train.
        """
        found = jax.tree_util.tree_map_with_path(
            lambda path, _: tuple(bool(re.search(p, path_of(path))) for p in self.frozen), params
        )
        rows = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple))
        for i, pattern in enumerate(self.frozen):
            if not any(row[i] for row in rows):
                paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
                raise UserError(
                    f"config.optimizer.frozen has {pattern!r}, which is found in the path of no "
                    f"parameter; paths are {', '.join(paths[:: max(1, len(paths) // 5)])} ..."
                )
        if rows and all(map(any, rows)):
            raise UserError("config.optimizer.frozen leaves no parameter to train.")
        return jax.tree.map(any, found, is_leaf=lambda x: isinstance(x, tuple))


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """step -> learning rate."""
    warmup = min(config.warmup_steps, num_steps)
    start = config.learning_rate / max(warmup, 1)  # from 0 the first update would do nothing
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(start, config.learning_rate, warmup)
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

    early = optax.chain(
        *_direction(config), optax.add_decayed_weights(config.weight_decay, decayed)
    )
    late = {
        name: optax.conditionally_transform(early, lambda step, start=start: step >= start)
        for name, start in (starts or {}).items()
    }

    def labels(params: Any) -> Any:
        def one(path: Any, frozen: bool) -> str:
            network = path_of(path[:1])
            return _FROZEN if frozen else network if network in late else _OTHERS

        return jax.tree_util.tree_map_with_path(one, config.is_frozen(params))

    direction = early
    if late or config.frozen:
        direction = optax.partition({_OTHERS: early, _FROZEN: optax.set_to_zero(), **late}, labels)
    steps = [direction, optax.scale_by_learning_rate(make_schedule(config, num_steps))]
    if config.grad_clip:
        steps.insert(0, optax.clip_by_global_norm(config.grad_clip))
    return optax.chain(*steps)


def _direction(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    adam = optax.scale_by_adam(config.b1, config.b2)
    if config.name == "adamw":
        return [adam]
    if config.name == "muon":
        muon = optax.chain(
            contrib.scale_by_muon(weight_dimension_numbers=_matrices),
            optax.stateless(lambda updates, _: jax.tree.map(_like_adam, updates)),
        )
        return [optax.partition({"muon": muon, "adam": adam}, _by_muon)]
    momentum = [optax.ema(config.b1, debias=True)] if config.b1 else []
    return [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *momentum]


def _by_muon(params: Any) -> Any:
    """Which transformation takes each leaf: kernels have rows and columns."""

    def one(path: Any, x: Any) -> str:
        return "muon" if path_of(path).endswith("kernel") and x.ndim >= 2 else "adam"

    return jax.tree_util.tree_map_with_path(one, params)


def _rows(x: Any) -> tuple[int, ...]:
    """Input axes of a kernel (in, out), (layer, in, out), or a convolution's (taps..., in, out)."""
    return tuple(range(x.ndim - 1)) if x.ndim > 3 else (x.ndim - 2,)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(_rows(x), (x.ndim - 1,)), params)


def _like_adam(update: jax.Array) -> jax.Array:
    """An orthogonal matrix, or several, with Adam's usual RMS."""
    inputs = math.prod(update.shape[axis] for axis in _rows(update))
    return update * (0.2 * max(inputs, update.shape[-1]) ** 0.5)
