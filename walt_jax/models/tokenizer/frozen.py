"""A trained tokenizer as others use it: weights, latent statistics and a hash that names it."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.models.build import Network
from walt_jax.models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from walt_jax.parallel import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenTokenizer:
    """Encodes to latents of zero mean and unit variance a channel, and decodes those.

    W.A.L.T normalises the latents before the transformer (2312.06662, section 3.1); by channel is
    our reading, the paper does not say.

    Attributes:
      params: weights (the moving average of a run).
      mean, std: float32 (latent_channels,), of raw latents on the training data.
      config: sizes.
      hash: hex digest of all of the above; latents carry it.
    """

    params: Any
    mean: jax.Array
    std: jax.Array
    config: TokenizerConfig = dataclasses.field(metadata={"static": True})
    hash: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls, config: TokenizerConfig, params: Any, mean: np.ndarray, square: np.ndarray
    ) -> "FrozenTokenizer":
        """From weights and the first two moments of the latents, all numpy."""
        std = np.sqrt(np.maximum(square - mean**2, 1e-6)).astype(np.float32)
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(config)).encode())
        for leaf in [*jax.tree.leaves(params), mean, std]:
            digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
        return cls(params, mean, std, config, digest.hexdigest()[:16])

    def encode(self, x: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Pixels (B, 1 + 4n, H, W, 3) in [-1, 1] to normalised latents, float32."""
        return (self._model().encode(x, layout) - self.mean) / self.std

    def decode(self, z: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Normalised latents to pixels in [-1, 1], float32, clipped."""
        return jnp.clip(self._model().decode(z * self.std + self.mean, layout), -1.0, 1.0)

    def _model(self) -> Tokenizer:
        return Network.of(lambda rngs: Tokenizer(self.config, rngs=rngs)).bind(self.params)
