"""Encoding and decoding videos of any length, chunk by chunk, in constant memory.

A causal convolution looks back at a few frames of its input and group norms at none, so that those
few frames, kept from one chunk to the next, make the chunks equal the whole.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, check_pixels
from walt_jax.models.tokenizer.layers import CausalConv
from walt_jax.models.tokenizer.whole import Whole
from walt_jax.parallel import Layout

Caches = tuple[jax.Array, ...]


class Chunk(Whole):
    """Runs layers over some frames, given what the frames before left behind.

    Attributes:
      kept: what these frames leave behind; complete when the network has run.
    """

    def __init__(self, layout: Layout, caches: Caches | None) -> None:
        super().__init__(layout, fused=False)
        self.first = caches is None
        self._caches = iter(caches or ())
        self.kept: list[jax.Array] = []

    def extend(self, conv: CausalConv, x: jax.Array) -> jax.Array:
        """Puts the kept frames before x; before the video's first frame, its copies."""
        back = conv.kernel.shape[0] - conv.strides[0]
        if not conv.kernel.shape[0] > 1:
            return x
        x = conv.pad_time(x) if self.first else jnp.concatenate([next(self._caches), x], axis=1)
        self.kept.append(x[:, x.shape[1] - back :])
        return x


def encode_chunks(
    tokenizer: FrozenTokenizer,
    chunks: Iterable[np.ndarray | jax.Array],
    layout: Layout = Layout(),  # noqa: B008
) -> Iterator[jax.Array]:
    """Latents of a video that comes in chunks, equal to those of the whole.

    Args:
      tokenizer: encodes.
      chunks: pixels (B, n, H, W, 3) in [-1, 1]; n is 1 + 4k for the first and 4k for the others
        (with the default strides). Each new size is compiled once.
      layout: where activations lie on the mesh.

    Yields:
      Normalised latents, float32 (B, 1 + k or k, h, w, c).

    Raises:
      UserError: a chunk of another number of frames, frames of a size that does not fit, or values
        out of range.
    """
    factor = tokenizer.config.factors[0]
    caches = None
    for i, chunk in enumerate(chunks):
        extra = 1 if i == 0 else 0
        if chunk.shape[1] < 1 or (chunk.shape[1] - extra) % factor:
            wanted = f"1 + {factor}n" if extra else f"{factor}n"
            raise UserError(f"Chunk {i} has {chunk.shape[1]} frames: it must have {wanted}.")
        check_pixels(chunk)
        tokenizer.config.latent_shape(chunk.shape[1] + 1 - extra, *chunk.shape[2:4])
        latents, caches = _encode(tokenizer, chunk, caches, layout)
        yield latents


def decode_chunks(
    tokenizer: FrozenTokenizer,
    chunks: Iterable[np.ndarray | jax.Array],
    layout: Layout = Layout(),  # noqa: B008
) -> Iterator[jax.Array]:
    """Pixels of normalised latents that come in chunks (B, t, h, w, c) of any t.

    Yields:
      float32 (B, n, H, W, 3) in [-1, 1]: 1 + 4 (t - 1) frames for the first chunk, 4 t for others.
    """
    caches = None
    for chunk in chunks:
        pixels, caches = _decode(tokenizer, chunk, caches, layout)
        yield pixels


def split_frames(video: Sequence, size: int, first: int) -> Iterator[np.ndarray]:
    """Cuts (B, T, ...) into chunks of `first`, then `size` frames; the last may be shorter."""
    yield video[:, :first]
    for start in range(first, video.shape[1], size):
        yield video[:, start : start + size]


@functools.partial(jax.jit, static_argnums=3)
def _encode(
    tokenizer: FrozenTokenizer, x: jax.Array, caches: Caches | None, layout: Layout
) -> tuple[jax.Array, Caches]:
    run = Chunk(layout, caches)
    model = tokenizer.model(layout)
    features = model.encoder(layout.pixels(x), run).astype(jnp.float32)
    return tokenizer.normalise(model.config.quantizer(features)), tuple(run.kept)


@functools.partial(jax.jit, static_argnums=3)
def _decode(
    tokenizer: FrozenTokenizer, z: jax.Array, caches: Caches | None, layout: Layout
) -> tuple[jax.Array, Caches]:
    run = Chunk(layout, caches)
    pixels = tokenizer.model(layout).decoder(layout.pixels(tokenizer.denormalise(z)), run)
    return jnp.clip(pixels.astype(jnp.float32), -1.0, 1.0), tuple(run.kept)
