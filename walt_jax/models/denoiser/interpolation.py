"""Weights of a denoiser on another grid: position tables are interpolated, all else stays."""

from typing import Any

import jax
import jax.numpy as jnp

from walt_jax.errors import UserError
from walt_jax.models.build import Network, Params
from walt_jax.models.denoiser.config import DenoiserConfig
from walt_jax.models.denoiser.denoiser import Denoiser
from walt_jax.parallel.sharding import path_of


def interpolate_positions(params: Params, old: DenoiserConfig, new: DenoiserConfig) -> Params:
    """Weights trained on the grid of `old` for the grid and the windows of `new`.

    W.A.L.T goes to another aspect ratio in this way: from 5x16x16 with windows of 5x8x8 to 5x16x28
    with 5x8x14 (2312.06662, table 6). The absolute tables are interpolated along rows, columns and
    frames, the relative ones along the offsets of their windows (linearly; the paper names no
    method). A table that keeps its size keeps its values.

    Args:
      params: of `Denoiser(old)`, float32.
      old, new: sizes that differ in `grid` and `windows` alone.

    Returns:
      Params of `Denoiser(new)`.

    Raises:
      UserError: another part of the network differs; the sentence names it.
    """
    shapes = Network.of(lambda rngs: Denoiser(new, rngs=rngs)).shapes()
    if jax.tree.structure(shapes) != jax.tree.structure(params):
        raise UserError(
            "The weights and config.task.model have different parts: only grid and windows may "
            "differ where position tables are interpolated."
        )

    def one(path: Any, leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_of(path)
        if leaf.shape == wanted.shape and not name.endswith("spatial_embedding"):
            return leaf
        if name.endswith("spatial_embedding"):
            frame = leaf.reshape(*old.tokens[1:], -1)
            return _resize(frame, (*new.tokens[1:], frame.shape[-1])).reshape(wanted.shape)
        if name.endswith(("temporal_embedding", "/table")):
            return _resize(leaf, wanted.shape)
        raise UserError(
            f"{name} has the shape {leaf.shape}, but config.task.model has {wanted.shape}: only "
            "grid and windows may differ where position tables are interpolated."
        )

    return jax.tree_util.tree_map_with_path(one, params, shapes)


def _resize(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.image.resize(jnp.asarray(x), shape, "linear", antialias=False)
