"""Samplers: from noise to x_0, given a function that predicts v."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.diffusion.schedules import Schedule
from walt_jax.diffusion.targets import v_to_eps, v_to_x0
from walt_jax.errors import UserError


def trailing_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """`num_steps` timesteps, falling, that start at the last one (2305.08891, table 2).

    With zero terminal SNR the last step is pure noise; a sampler that skips it starts from an
    input that training never saw.

    Raises:
      UserError: fewer than 1 or more steps than timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise UserError(f"Sampling takes 1 to {num_timesteps} steps, got {num_steps}.")
    steps = np.arange(num_timesteps, 0, -num_timesteps / num_steps)
    return np.round(steps).astype(np.int32)[:num_steps] - 1


def ddim(
    predict_v: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    schedule: Schedule,
    num_steps: int,
) -> jax.Array:
    """Deterministic DDIM (2010.02502, equation 12 with eta = 0).

    Args:
      predict_v: (x_t, t) -> v, with x_t like `noise` and t int32 (B,).
      noise: (B, ...) standard normal, x at the last timestep.
      schedule: the schedule trained with.
      num_steps: calls of `predict_v`.

    Returns:
      x_0, float32, the shape of `noise`.
    """
    steps = trailing_timesteps(schedule.num_timesteps, num_steps)
    # After the last step the signal is whole: no noise is added back.
    signal = np.append(schedule.signal[steps[1:]], 1.0).astype(np.float32)
    level = np.append(schedule.noise[steps[1:]], 0.0).astype(np.float32)

    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, next_signal, next_noise = inputs
        t = jnp.full(x.shape[:1], t)
        v = predict_v(x, t)
        x0, eps = v_to_x0(schedule, x, v, t), v_to_eps(schedule, x, v, t)
        return next_signal * x0 + next_noise * eps, None

    inputs = (jnp.asarray(steps), jnp.asarray(signal), jnp.asarray(level))
    return jax.lax.scan(step, noise, inputs)[0]
