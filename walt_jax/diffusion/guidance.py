"""Classifier-free guidance (2207.12598)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def guide(denoise: Denoise, null_label: int, scale: float) -> Denoise:
    """Wraps `denoise(x, t, label)` so that its prediction is pushed away from the unconditional.

    uncond + scale (cond - uncond), both halves in one call of twice the batch; a scale of 1 is the
    conditional prediction alone, at half the cost.
    """
    if scale == 1.0:
        return denoise

    def guided(x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        null = jnp.full_like(label, null_label)
        twice = (jnp.concatenate([a, b]) for a, b in ((x, x), (t, t), (label, null)))
        cond, uncond = jnp.split(denoise(*twice), 2)
        return uncond + scale * (cond - uncond)

    return guided
