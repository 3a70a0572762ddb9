"""The W.A.L.T denoiser."""

from walt_jax.models.denoiser.denoiser import Denoiser, DenoiserConfig

__all__ = ["Denoiser", "DenoiserConfig"]
