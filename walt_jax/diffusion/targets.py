"""What the network predicts. Only v is usable where no signal is left (2202.00512, appendix D).

W.A.L.T prints v with signal and noise exchanged; that form equals eps at zero signal, from which
x_0 cannot be had, so the standard form of Salimans & Ho is used.
"""

import jax
import jax.numpy as jnp

from walt_jax.diffusion.schedules import Schedule


def _levels(schedule: Schedule, t: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = t.shape + (1,) * (like.ndim - t.ndim)
    return jnp.asarray(schedule.signal)[t].reshape(shape), jnp.asarray(schedule.noise)[t].reshape(
        shape
    )


def add_noise(schedule: Schedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = signal x_0 + noise eps; x0, eps (B, ...) float32, t (B,) int."""
    signal, noise = _levels(schedule, t, x0)
    return signal * x0 + noise * eps


def v_target(schedule: Schedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """v = signal eps - noise x_0."""
    signal, noise = _levels(schedule, t, x0)
    return signal * eps - noise * x0


def v_to_x0(schedule: Schedule, x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """x_0 = signal x_t - noise v."""
    signal, noise = _levels(schedule, t, x_t)
    return signal * x_t - noise * v


def v_to_eps(schedule: Schedule, x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """eps = noise x_t + signal v."""
    signal, noise = _levels(schedule, t, x_t)
    return noise * x_t + signal * v
