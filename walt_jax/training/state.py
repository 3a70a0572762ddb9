"""The training state: plain dicts, sharded by rules, one pure update."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from walt_jax.parallel import Layout
from walt_jax.tasks import Task
from walt_jax.training.optimizers import OptimizerConfig

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      step: int32 (), updates done.
      params: float32 nested dict.
      ema: moving average of params, the weights that are sampled and evaluated.
      opt_state: the optimizer's state.
      extra: statistics that the task keeps beside the parameters (such as the latents' moments).
    """

    step: jax.Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    extra: PyTree

    @classmethod
    def create(
        cls,
        task: Task,
        optimizer: optax.GradientTransformation,
        key: jax.Array,
        given: PyTree | None = None,
    ) -> "TrainState":
        """A fresh state, with some sub-networks as given; jit it with out_shardings."""
        params = task.init(key) | (given or {})
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            extra=task.init_extra(),
        )


def warm_decay(decay: float, step: jax.Array) -> jax.Array:
    """A decay that starts near 0, so that a moving average forgets its start."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def train_step(
    state: TrainState,
    frozen: PyTree,
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    schedule: optax.Schedule,
    layout: Layout,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Randomness is `fold_in(key, step)`: a resumed run draws what a straight one does.

    Returns:
      The next state, and scalars: `loss`, `grad_norm` (also of each sub-network), `learning_rate`
      and the task's own.
    """
    key = jax.random.fold_in(key, state.step)

    def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        if config.frozen:
            params = jax.tree.map(
                lambda p, frozen: jax.lax.stop_gradient(p) if frozen else p,
                params,
                config.is_frozen(params),
            )
        return task.loss(params, state.extra, frozen, batch, key, state.step, layout)

    (loss, (metrics, extra)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay, ema = warm_decay(config.ema_decay, state.step), params
        if config.ema_decay:
            ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
    metrics |= {
        "loss": loss,
        "grad_norm": optax.global_norm(grads),
        **{f"grad_norm/{name}": optax.global_norm(part) for name, part in grads.items()},
        "learning_rate": schedule(state.step),
    }
    return TrainState(state.step + 1, params, ema, opt_state, extra), metrics
