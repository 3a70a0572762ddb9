"""One denoiser for W.A.L.T and its family: attention windows and a way of conditioning."""

from walt_jax.models.denoiser.conditions import Conditions
from walt_jax.models.denoiser.config import CrossAttentionConfig, DenoiserConfig
from walt_jax.models.denoiser.denoiser import Denoiser
from walt_jax.models.denoiser.dit_weights import import_dit
from walt_jax.models.denoiser.packing import Packing
from walt_jax.models.denoiser.transfer import transfer

__all__ = [
    "Conditions",
    "CrossAttentionConfig",
    "Denoiser",
    "DenoiserConfig",
    "Packing",
    "import_dit",
    "transfer",
]
