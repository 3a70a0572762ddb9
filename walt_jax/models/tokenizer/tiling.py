"""Encoding and decoding frames that do not fit on a device, tile by tile, equal to the whole.

Activations lie on the host; a device holds one tile of one layer. Group norms need statistics of
whole frames, so the layers run one after the other over all tiles: the statistics of a layer's
input are gathered over the tiles first, then each tile, with the pixels around it that the
convolution reaches, is normalised and convolved. Tiles that run through the whole network by
themselves (and are blended where they overlap) move less data and leave seams: their statistics
are their own. `benchmarks/tokenizer_tiling.py` compares the two.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, check_pixels
from walt_jax.models.tokenizer.layers import (
    AdaptiveGroupNorm,
    CausalConv,
    GroupNorm,
    Statistics,
    Triple,
    depth_to_space,
    group_statistics,
)
from walt_jax.models.tokenizer.whole import Whole


class Tiled(Whole):
    """Runs layers over arrays on the host, a tile on the device at a time.

    Attributes:
      tiles: tiles along (height, width).
      latent_size: (height, width) of the latents, at whose pixels all layers' tiles are cut.
    """

    def __init__(self, tiles: tuple[int, int], latent_size: tuple[int, int]) -> None:
        super().__init__()
        self.tiles, self.latent_size = tiles, latent_size

    def convolve(
        self,
        conv: CausalConv,
        x: np.ndarray,
        norm: GroupNorm | None = None,
        residual: np.ndarray | None = None,
    ) -> np.ndarray:
        statistics = None if norm is None else self._statistics(norm.groups, x)
        layers, params = nnx.split((conv, norm))
        stride = conv.strides[1]
        reach = [((k - 1) // 2, k // 2) for k in conv.kernel.shape[1:3]]
        out = None
        for rows, columns in self._cuts(x.shape[2] // stride, x.shape[3] // stride):
            # Past the frame's edge its outermost pixels are repeated: indices are clipped.
            around = [
                np.clip(np.arange(s.start * stride - a, s.stop * stride - stride + 1 + b), 0, n - 1)
                for s, (a, b), n in zip((rows, columns), reach, x.shape[2:4])
            ]
            piece = x[:, :, around[0]][:, :, :, around[1]]
            tile = np.asarray(_convolve(layers, params, piece, statistics))
            if out is None:
                size = (x.shape[2] // stride, x.shape[3] // stride)
                out = np.empty((*tile.shape[:2], *size, tile.shape[-1]), tile.dtype)
            out[:, :, rows, columns] = tile
        return out if residual is None else out + residual

    def normalise(self, norm: AdaptiveGroupNorm, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        statistics = self._statistics(norm.groups, x)
        layer, params = nnx.split(norm)
        scale = x.shape[2] // z.shape[2]
        out = np.empty_like(x)
        for rows, columns in self._cuts(*z.shape[2:4]):
            here = [slice(s.start * scale, s.stop * scale) for s in (rows, columns)]
            of_z = z[:, :, rows, columns]
            out[:, :, *here] = _normalise(layer, params, x[:, :, *here], of_z, statistics)
        return out

    def enlarge(self, x: np.ndarray, factors: Triple) -> np.ndarray:
        return depth_to_space(x, factors, self.first)

    def _cuts(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        def cut(size: int, latent: int, parts: int) -> list[slice]:
            edges = [i * latent // parts * (size // latent) for i in range(parts + 1)]
            return [slice(a, b) for a, b in itertools.pairwise(edges)]

        columns = cut(width, self.latent_size[1], self.tiles[1])
        for rows in cut(height, self.latent_size[0], self.tiles[0]):
            yield from ((rows, c) for c in columns)

    def _statistics(self, groups: int, x: np.ndarray) -> Statistics:
        """Of whole frames, from the means and variances of their tiles, in float64."""
        parts, pixels = [], []
        for rows, columns in self._cuts(*x.shape[2:4]):
            piece = x[:, :, rows, columns]
            parts.append(jax.device_get(_group_statistics(piece, groups)))
            pixels.append(piece.shape[2] * piece.shape[3])
        share = (np.asarray(pixels) / sum(pixels))[:, None, None, None]
        means, variances = (
            np.stack([getattr(p, k) for p in parts]).astype(np.float64)
            for k in ("mean", "variance")
        )
        mean = np.sum(share * means, axis=0)
        variance = np.sum(share * (variances + np.square(means - mean)), axis=0)
        return Statistics(mean.astype(np.float32), variance.astype(np.float32))


def encode_tiled(
    tokenizer: FrozenTokenizer, x: np.ndarray, tiles: tuple[int, int] = (2, 2)
) -> np.ndarray:
    """As `tokenizer.encode`, with frames cut into tiles along (height, width); on the host.

    Raises:
      UserError: a number of frames or a size that does not fit, values out of range, or more tiles
        than latents.
    """
    check_pixels(x)
    _, height, width, _ = tokenizer.config.latent_shape(*x.shape[1:4])
    run, model = _tiled(tiles, (height, width)), tokenizer.model()
    features = model.encoder(np.asarray(x, np.float32), run).astype(np.float32)
    return np.asarray(tokenizer.normalise(model.config.quantizer(jnp.asarray(features))))


def decode_tiled(
    tokenizer: FrozenTokenizer, z: np.ndarray, tiles: tuple[int, int] = (2, 2)
) -> np.ndarray:
    """As `tokenizer.decode`, with frames cut into tiles along (height, width); on the host."""
    run = _tiled(tiles, z.shape[2:4])
    latents = np.asarray(tokenizer.denormalise(jnp.asarray(z)))
    return np.clip(tokenizer.model().decoder(latents, run).astype(np.float32), -1.0, 1.0)


def _tiled(tiles: tuple[int, int], latent_size: tuple[int, int]) -> Tiled:
    if any(not 1 <= n <= size for n, size in zip(tiles, latent_size)):
        raise UserError(
            f"Frames of {latent_size[0]}x{latent_size[1]} latents cannot be cut into "
            f"{tiles[0]}x{tiles[1]} tiles: a tile holds at least one latent."
        )
    return Tiled(tiles, latent_size)


@functools.partial(jax.jit, static_argnums=0)
def _convolve(
    layers: nnx.GraphDef, params: nnx.State, x: jax.Array, statistics: Statistics | None
) -> jax.Array:
    conv, norm = nnx.merge(layers, params)
    if norm is not None:
        x = nnx.swish(norm(x, statistics))
    return conv.valid(conv.pad_time(x))


@functools.partial(jax.jit, static_argnums=0)
def _normalise(
    layer: nnx.GraphDef, params: nnx.State, x: jax.Array, z: jax.Array, statistics: Statistics
) -> jax.Array:
    return nnx.merge(layer, params)(x, z, statistics)


@functools.partial(jax.jit, static_argnums=1)
def _group_statistics(x: jax.Array, groups: int) -> Statistics:
    return group_statistics(x, groups)
