"""The training state: plain dicts, sharded by rules, one pure update."""

import dataclasses
from collections.abc import Callable
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
    skips_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Randomness is `fold_in(key, step)`: a resumed run draws what a straight one does.

    With `skips_nonfinite` a step whose loss or gradient is not finite changes nothing but `step`.

    Returns:
      The next state, and scalars: `loss`, `grad_norm` (also of each sub-network), `learning_rate`
      and the task's own.
    """
    key = jax.random.fold_in(key, state.step)

    def loss_fn(
        params: PyTree, extra: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        if config.frozen:
            params = jax.tree.map(
                lambda p, frozen: jax.lax.stop_gradient(p) if frozen else p,
                params,
                config.is_frozen(params),
            )
        return task.loss(params, extra, frozen, batch, key, state.step, layout)

    with jax.named_scope("gradient"):
        loss, metrics, extra, grads = _gradient(
            jax.value_and_grad(loss_fn, has_aux=True), state, batch, key, config
        )
    with jax.named_scope("optimizer"):
        new = _updated(state, grads, extra, optimizer, config)
    metrics |= {
        "loss": loss,
        "grad_norm": optax.global_norm(grads),
        **{f"grad_norm/{name}": optax.global_norm(part) for name, part in grads.items()},
        "learning_rate": schedule(state.step),
    }
    if skips_nonfinite:
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
        old = dataclasses.replace(state, step=state.step + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return new, metrics


def _updated(
    state: TrainState,
    grads: PyTree,
    extra: PyTree,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay, ema = warm_decay(config.ema_decay, state.step), params
    if config.ema_decay:
        ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
    return TrainState(state.step + 1, params, ema, opt_state, extra)


def _gradient(
    value_and_grad: Callable[..., Any],
    state: TrainState,
    batch: PyTree,
    key: jax.Array,
    config: OptimizerConfig,
) -> tuple[jax.Array, dict[str, jax.Array], PyTree, PyTree]:
    """Loss, metrics, the next `extra` and the gradient in float32, of a batch whole or in parts."""

    def one(extra: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        (loss, (metrics, extra)), grads = value_and_grad(state.params, extra, batch, key)
        return extra, (loss, metrics, _cast(grads, config.grad_dtype))

    parts = config.accumulate
    if parts == 1:
        extra, (loss, metrics, grads) = one(state.extra, batch, key)
        return loss, metrics, extra, _cast(grads, "float32")
    # Every parts-th row, so that each device cuts the rows that it has.
    cut = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], cut)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, state.extra, first, key)[1]
    )

    def add(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
        extra, total = carry
        number, rows = part
        extra, values = one(extra, rows, jax.random.fold_in(key, number))
        return (extra, jax.tree.map(lambda a, b: a + b, total, values)), None

    (extra, total), _ = jax.lax.scan(add, (state.extra, zeros), (jnp.arange(parts), cut))
    loss, metrics, grads = jax.tree.map(lambda x: x / parts, total)
    return loss, metrics, extra, _cast(grads, "float32")


def _cast(grads: PyTree, dtype: str) -> PyTree:
    if all(x.dtype == dtype for x in jax.tree.leaves(grads)):
        return grads
    # The compiler would otherwise go on with the digits that the cast is to drop.
    return jax.lax.optimization_barrier(jax.tree.map(lambda g: g.astype(dtype), grads))
