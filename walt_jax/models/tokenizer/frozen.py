"""A trained tokenizer as others use it: weights, latent statistics and a hash that names it."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.config import to_dict
from walt_jax.errors import UserError
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
        return cls.of(config, params, mean, std)

    @classmethod
    def of(
        cls, config: TokenizerConfig, params: Any, mean: np.ndarray, std: np.ndarray
    ) -> "FrozenTokenizer":
        """From its parts, all numpy; the hash is made of them."""
        config = dataclasses.replace(config, remat=False)  # how it was trained, not what it is
        digest = hashlib.sha256(json.dumps(to_dict(config)).encode())
        for leaf in [*jax.tree.leaves(params), mean, std]:
            digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
        return cls(params, mean, std, config, digest.hexdigest()[:16])

    @classmethod
    def abstract(cls, config: TokenizerConfig) -> "FrozenTokenizer":
        """Shapes alone, to compile with."""
        channels = jax.ShapeDtypeStruct((config.latent_channels,), jnp.float32)
        return cls(network(config).shapes(), channels, channels, config, "none")

    def encode(self, x: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Pixels (B, 1 + 4n, H, W, 3) in [-1, 1] to normalised latents, float32.

        Raises:
          UserError: a number of frames or a size that does not fit, or values out of range.
        """
        check_pixels(x)
        return self.normalise(self.model(layout).encode(x, layout))

    def decode(self, z: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Normalised latents to pixels in [-1, 1], float32, clipped."""
        return jnp.clip(self.model(layout).decode(self.denormalise(z), layout), -1.0, 1.0)

    def codes(self, x: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Pixels to codes, int32 (B, t, h, w).

        Raises:
          UserError: as `encode`, or the tokenizer's latents are continuous.
        """
        check_pixels(x)
        if self.config.quantizer.num_codes(self.config.latent_channels) is None:
            raise UserError("This tokenizer has no codes: its latents are continuous; use encode.")
        return self.config.quantizer.codes(self.model(layout).encode(x, layout))

    def from_codes(self, codes: jax.Array) -> jax.Array:
        """Codes, int32 (B, t, h, w), to normalised latents, float32 (B, t, h, w, c)."""
        z = self.config.quantizer.from_codes(codes, self.config.latent_channels)
        return self.normalise(z)

    def normalise(self, z: jax.Array) -> jax.Array:
        """Raw latents to zero mean and unit variance."""
        return (z - self.mean) / self.std

    def denormalise(self, z: jax.Array) -> jax.Array:
        """The way back."""
        return z * self.std + self.mean

    def model(self, layout: Layout = Layout()) -> Tokenizer:  # noqa: B008
        """The network with its weights, gathered from wherever they lie."""
        params = layout.gather(self.params, jnp.dtype(self.config.dtype))
        return network(self.config).bind(params)


def check_pixels(x: np.ndarray | jax.Array) -> None:
    """Refuses pixels outside [-1, 1]; inside a jitted function, where there are none, does nothing.

    Raises:
      UserError: some pixel is out of range or not a number.
    """
    if isinstance(x, jax.core.Tracer):
        return
    low, high = float(x.min()), float(x.max())
    if not -1.001 <= low <= high <= 1.001:  # a not-a-number fails too
        raise UserError(
            f"Pixels lie in [{low:g}, {high:g}]: the tokenizer takes floats in [-1, 1]; uint8 "
            "pixels become those by x / 127.5 - 1."
        )


@functools.cache
def network(config: TokenizerConfig) -> Network[Tokenizer]:
    """The structure of a tokenizer of these sizes."""
    return Network.of(lambda rngs: Tokenizer(config, rngs=rngs))
