"""Attention within blocks of a (T, H, W) grid: the arguments, their checks, the implementations."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from walt_jax.errors import UserError
from walt_jax.kernels.attention import reference, xla
from walt_jax.kernels.attention.windows import Window, resolve_window

__all__ = ["IMPLEMENTATIONS", "ExtraKv", "Window", "resolve_window", "window_attention"]

_PLAIN = {"reference": reference.attention, "xla": xla.attention}
IMPLEMENTATIONS = (*_PLAIN, "pallas_tpu", "pallas_gpu")


class ExtraKv(NamedTuple):
    """Keys and values outside of the grid, such as text, which every window of a sample sees.

    Attributes:
      k, v: (B, M, D).
      mask: bool (B, M), False where a token is padding, or (B, T, H, W, M), which tokens of the
        grid see it; None where all do. No kernel takes the second.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array | None = None


def window_attention(
    q: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    *,
    num_heads: int,
    window: Sequence[int],
    bias: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool | int = False,
    extra_kv: ExtraKv | None = None,
    qk_norm: tuple[jax.Array, jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multi-head attention in which a token sees the tokens of its own block of the grid.

    `(1, 0, 0)` is spatial attention, `(0, 1, 1)` temporal, `(0, 0, 0)` full and `(0, 8, 8)` the
    spatiotemporal window of W.A.L.T (2312.06662, section 3.2).

    Args:
      q, k, v: (B, T, H, W, D), D = num_heads x head width; any float dtype, all keys and values
        are cast to q's. Without k and v the keys are those of `extra_kv` alone: plain
        cross-attention.
      num_heads: heads; each attends by softmax(q k^T / sqrt(head width)).
      window: (wt, wh, ww), the block; 0 means the whole axis.
      bias: (num_heads, L, L) added to the logits, L = tokens in a window in (t, h, w) order; extra
        keys have none.
      segment_ids: int (B, T, H, W); tokens see those with their own number only, and all extra
        keys.
      causal: True hides the frames after a token's own; a number n also those before the last n,
        its own being the last. Extra keys are seen by all frames.
      extra_kv: keys and values beside the grid's.
      qk_norm: scales (head width,) of queries and keys: layer norm of each head's queries and keys,
        extra ones too, without bias, eps 1e-6, then times the scale (2302.05442).
      implementation: one of IMPLEMENTATIONS; None takes the Pallas kernel on TPUs for shapes that
        it fits, plain XLA elsewhere. "reference" computes in float32. "pallas_gpu" has not been run
        on a GPU yet, so that it must be asked for.

    Returns:
      (B, T, H, W, D) in q's dtype, 0 for a token that sees no key. Softmax and norms run in
      float32. What is hidden gets a gradient of exactly 0.

    Raises:
      UserError: the window does not tile the grid, nothing to attend to, arrays of other shapes,
        no such implementation, or one that does not fit.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        names = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise UserError(f"No implementation {implementation!r} of window attention: {names}.")
    _check(q, k, v, num_heads, causal, extra_kv)
    block = resolve_window(q.shape[1:4], window)
    if extra_kv is not None and k is not None and extra_kv[0].shape[1] == 0:
        extra_kv = None
    _check_options(q, num_heads, math.prod(block), k is not None, bias, segment_ids, qk_norm)
    k, v = (x if x is None else x.astype(q.dtype) for x in (k, v))
    if extra_kv is not None:
        extra_k, extra_v, mask = extra_kv
        mask = mask if mask is None else mask.astype(bool)
        extra_kv = (extra_k.astype(q.dtype), extra_v.astype(q.dtype), mask)
    elif math.prod(block) == 1 and implementation is None:
        return v  # a token that sees itself alone: an image in time
    inputs = (q, k, v, bias, segment_ids, extra_kv, qk_norm)
    options = {"num_heads": num_heads, "block": block, "causal": causal}
    if implementation in _PLAIN:
        return _PLAIN[implementation](*inputs, **options)
    return _by_kernel(implementation, inputs, options)


def _by_kernel(
    implementation: str | None, inputs: tuple[jax.Array | tuple | None, ...], options: dict
) -> jax.Array:
    """The kernel that was asked for, or the platform's where there is one that fits."""
    if implementation == "pallas_gpu":
        from walt_jax.kernels.attention import gpu as kernel
    else:
        from walt_jax.kernels.attention import tpu as kernel
    q, bias, extra_kv = inputs[0], inputs[3], inputs[5]
    grid, d, block, heads = q.shape[1:4], q.shape[4], options["block"], options["num_heads"]
    extra = 0 if extra_kv is None else extra_kv[0].shape[1]
    by_token = extra_kv is not None and extra_kv[2] is not None and extra_kv[2].ndim > 2
    fits = not by_token and kernel.fits(
        grid, d, heads, block, q.dtype, extra=extra, bias=bias is not None
    )
    run = functools.partial(kernel.attention, **options)
    if implementation is None:
        plain = functools.partial(xla.attention, **options)
        return (
            jax.lax.platform_dependent(*inputs, tpu=run, default=plain) if fits else plain(*inputs)
        )
    if not fits:
        raise UserError(
            f"The implementation {implementation!r} of window attention does not fit windows of "
            f"{block} tokens on a grid of {grid} with {heads} heads of {d // heads} features in "
            f"{q.dtype} and {extra} extra keys"
            f"{' with a mask for each token' if by_token else ''}: 'xla' does, and None chooses by "
            "itself."
        )
    return run(*inputs)


def _check(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    num_heads: int,
    causal: bool | int,
    extra_kv: ExtraKv | None,
) -> None:
    """Queries, keys and values fit together."""
    if q.ndim != 5 or num_heads < 1 or q.shape[-1] % num_heads:
        raise UserError(
            f"Window attention takes q as (B, T, H, W, D), D a multiple of {num_heads} heads; "
            f"it is {q.shape}."
        )
    if k is None and extra_kv is None:
        raise UserError("Window attention has no keys: give k and v, or extra_kv.")
    if (k is None) != (v is None):
        raise UserError("Window attention takes k and v together, or neither.")
    if causal < 0:
        raise UserError(f"causal is True, False or a number of frames, not {causal}.")
    _shaped("k", k, q.shape)
    _shaped("v", v, q.shape)
    if extra_kv is not None:
        shape = (q.shape[0], *extra_kv[0].shape[1:2], q.shape[-1])
        _shaped("extra_kv.k", extra_kv[0], shape)
        _shaped("extra_kv.v", extra_kv[1], shape)
        by_token = extra_kv[2] is not None and extra_kv[2].ndim > 2
        mask = (*q.shape[:4], shape[1]) if by_token else shape[:2]
        _shaped("extra_kv.mask", extra_kv[2], mask)


def _check_options(
    q: jax.Array,
    num_heads: int,
    length: int,
    has_grid_keys: bool,
    bias: jax.Array | None,
    segment_ids: jax.Array | None,
    qk_norm: tuple[jax.Array, jax.Array] | None,
) -> None:
    """What is optional fits q and windows of `length` tokens."""
    if bias is not None and not has_grid_keys:
        raise UserError("Window attention adds a bias to keys of the grid: give k and v too.")
    _shaped("bias", bias, (num_heads, length, length))
    _shaped("segment_ids", segment_ids, q.shape[:4])
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise UserError(f"segment_ids of window attention are integers, not {segment_ids.dtype}.")
    for scale in qk_norm or ():
        _shaped("a scale of qk_norm", scale, (q.shape[-1] // num_heads,))


def _shaped(name: str, x: jax.Array | None, shape: Sequence[int]) -> None:
    if x is not None and x.shape != tuple(shape):
        raise UserError(f"In window attention {name} is {tuple(shape)}, not {x.shape}.")
