"""Diffusion as pure functions of arrays: schedules, targets, guidance, samplers."""

from walt_jax.diffusion.guidance import guide
from walt_jax.diffusion.samplers import ddim, trailing_timesteps
from walt_jax.diffusion.schedules import Schedule, linear_schedule
from walt_jax.diffusion.targets import add_noise, v_target, v_to_eps, v_to_x0

__all__ = [
    "Schedule",
    "add_noise",
    "ddim",
    "guide",
    "linear_schedule",
    "trailing_timesteps",
    "v_target",
    "v_to_eps",
    "v_to_x0",
]
