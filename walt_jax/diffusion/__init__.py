"""Diffusion as pure functions of arrays: processes, targets, losses, guidance, samplers.

`Diffusion` says what is trained, a `Sampler` turns noise into data by it; both are built from a
config, with the parts chosen by name:

    process  linear, cosine, continuous_cosine, rectified_flow
    target   v, eps, x0, velocity, eps_sigma
    weight   uniform, min_snr, p2
    sampler  ddpm, ddim, euler, heun, dpmpp_2m
    scale    constant, power_cosine, interval
"""

from walt_jax.diffusion.flow import RectifiedFlow
from walt_jax.diffusion.guidance import (
    Constant,
    DynamicThreshold,
    Interval,
    PowerCosine,
    Predict,
    PredictGiven,
    Scale,
    guide,
)
from walt_jax.diffusion.losses import (
    P2,
    Diffusion,
    MinSnr,
    Prediction,
    Uniform,
    Weight,
    variational_bound,
)
from walt_jax.diffusion.samplers import Ddim, Ddpm, DpmSolver, Euler, Heun, Sampler
from walt_jax.diffusion.schedules import (
    ContinuousCosine,
    Cosine,
    Grid,
    Linear,
    Posterior,
    Process,
    posterior,
    standard_normal,
)
from walt_jax.diffusion.targets import X0, Eps, EpsSigma, Target, V, Velocity

__all__ = [
    "P2",
    "X0",
    "Constant",
    "ContinuousCosine",
    "Cosine",
    "Ddim",
    "Ddpm",
    "Diffusion",
    "DpmSolver",
    "DynamicThreshold",
    "Eps",
    "EpsSigma",
    "Euler",
    "Grid",
    "Heun",
    "Interval",
    "Linear",
    "MinSnr",
    "Posterior",
    "PowerCosine",
    "Predict",
    "PredictGiven",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Sampler",
    "Scale",
    "Target",
    "Uniform",
    "V",
    "Velocity",
    "Weight",
    "guide",
    "posterior",
    "standard_normal",
    "variational_bound",
]
