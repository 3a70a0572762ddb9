"""A 2D tokenizer's weights as the start of a 3D one (2310.05737, section 3.2)."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from walt_jax.errors import UserError
from walt_jax.models.build import Params
from walt_jax.parallel.sharding import path_of

How = Literal["last", "central", "average"]


def inflate(params_2d: Params, shapes_3d: Params, how: How = "last") -> Params:
    """Parameters of a 3D tokenizer that does to a still video what the 2D one does to the frame.

    Kernels (1, kh, kw, C, F) become (kt, kh, kw, C, F), zero but for one tap, or a kt-th of the
    kernel at every tap. Where features grow, as in an upsampling that now also makes frames, they
    are repeated for each frame, as are biases (channels are (ft, fh, fw, C), see
    `depth_to_space`). The rest is copied.

    Why a still video is no different: edge padding repeats the first frame before the video, so
    that every tap of every convolution sees the same frame and only the sum of the taps counts,
    which is the 2D kernel; strides then skip equal frames, and upsampling repeats them. With
    `last` more is true: the last tap sees the newest frame, so that a moving video, too, is
    encoded and decoded frame by frame, a latent being that of the last frame it stands for.

    Args:
      params_2d: nested dicts of float32 arrays, of a Tokenizer with `dimensions=2`.
      shapes_3d: nested dicts of what has a shape, of the same Tokenizer with `dimensions=3`.
      how: the tap that gets the 2D kernel: `last` (MAGVIT-v2), `central` (kt // 2), or `average`
        for all of them alike.

    Raises:
      UserError: a parameter that only one of them has, or whose shapes do not fit.
    """
    given, wanted = _names(params_2d), _names(shapes_3d)
    if odd := [*(n for n in wanted if n not in given), *(n for n in given if n not in wanted)]:
        raise UserError(
            f"Only one of the 2D and the 3D tokenizer has the parameter {odd[0]}: give both the "
            "same multipliers, num_res_blocks and quantizer."
        )

    def one(path: Sequence[Any], target: Any, leaf: jax.Array) -> jax.Array:
        inflated = _inflate(jnp.asarray(leaf), tuple(target.shape), how)
        if inflated is None:
            raise UserError(
                f"The 2D tokenizer's parameter {path_of(path)} of shape {tuple(leaf.shape)} does "
                f"not inflate to {tuple(target.shape)}: give both the same channels, "
                "latent_channels and quantizer."
            )
        return inflated

    return jax.tree_util.tree_map_with_path(one, shapes_3d, params_2d)


def _names(tree: Params) -> list[str]:
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _inflate(leaf: jax.Array, shape: tuple[int, ...], how: How) -> jax.Array | None:
    """The parameter in its new shape; None where it does not fit."""
    if leaf.shape == shape:
        return leaf
    copies, rest = divmod(shape[-1], leaf.shape[-1])
    if rest or leaf.ndim != len(shape):
        return None
    if leaf.ndim == 1:
        return jnp.tile(leaf, copies)
    taps, *others = shape[:-1]
    # Only with taps in time may features grow: the encoder's last kernel has a single tap.
    if taps == 1 or leaf.shape[:-1] != (1, *others):
        return None
    kernel = jnp.tile(leaf, copies)
    if how == "average":
        return jnp.broadcast_to(kernel / taps, shape)
    tap = {"last": taps - 1, "central": taps // 2}[how]
    return jnp.zeros(shape, leaf.dtype).at[tap].set(kernel[0])
