"""Networks: `Tokenizer` and `Denoiser`, and `Network`, which keeps structure apart from params."""

from walt_jax.models.build import Network, Params, count
from walt_jax.models.denoiser import Denoiser, DenoiserConfig
from walt_jax.models.tokenizer import Tokenizer, TokenizerConfig

__all__ = [
    "Denoiser",
    "DenoiserConfig",
    "Network",
    "Params",
    "Tokenizer",
    "TokenizerConfig",
    "count",
]
