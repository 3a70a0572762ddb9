"""Networks: `Tokenizer` and `Denoiser`, and `Network`, which keeps structure apart from params.

`python -m walt_jax.models` lists the named sizes with their numbers of parameters.
"""

from walt_jax.models.build import Network, Params, count
from walt_jax.models.denoiser import Conditions, Denoiser, DenoiserConfig, Packing
from walt_jax.models.tokenizer import Tokenizer, TokenizerConfig

__all__ = [
    "Conditions",
    "Denoiser",
    "DenoiserConfig",
    "Network",
    "Packing",
    "Params",
    "Tokenizer",
    "TokenizerConfig",
    "count",
]
