"""Window attention as Pallas TPU kernels, which read windows where they lie in (B, T, H, W, D)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.kernels.attention.tpu_backward import backward
from walt_jax.kernels.attention.tpu_forward import forward
from walt_jax.kernels.attention.tpu_heads import Inputs
from walt_jax.kernels.attention.tpu_plan import BACKWARD, FORWARD, Plan, make_plan
from walt_jax.kernels.rows import LANES, params

_SUBLANES = 16  # extra keys come in such numbers


def fits(
    grid: Sequence[int],
    d: int,
    num_heads: int,
    block: Sequence[int],
    dtype: jnp.dtype,
    *,
    extra: int = 0,
    bias: bool = False,
) -> bool:
    """Whether the kernels take windows of such a shape, forward and backward.

    Args:
      grid: (T, H, W) on one device.
      d: lanes, heads x head width.
      num_heads: heads in D.
      block: the window, no zeros.
      dtype: of q, k and v.
      extra: how many keys there are beside the grid's.
      bias: whether there is one.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float32) or d % LANES or d // num_heads % 8:
        return False
    plan = make_plan((1, *grid, d), num_heads, block, BACKWARD, extra=_padded(extra))
    return plan.vmem(dtype.itemsize, bias) <= params().vmem_limit_bytes * 7 // 8


def attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    bias: jax.Array | None,
    segment_ids: jax.Array | None,
    extra_kv: tuple[jax.Array, jax.Array, jax.Array | None] | None,
    qk_scales: tuple[jax.Array, jax.Array] | None,
    *,
    num_heads: int,
    block: Sequence[int],
    causal: bool | int,
    interpret: Any = False,
) -> jax.Array:
    """Attention within blocks of the grid; `walt_jax.kernels.window_attention` says of what.

    Args:
      q: (B, T, H, W, D), bfloat16 or float32.
      k, v: the same, or None where the extra keys are all.
      bias: (num_heads, L, L) or None.
      segment_ids: int (B, T, H, W) or None.
      extra_kv: k and v (B, M, D) and the mask, bool (B, M) or None.
      qk_scales: (q_scale, k_scale), each (head width,): queries and all keys are normalised over
        the width of their head and multiplied by these; None leaves them.
      num_heads: heads in D.
      block: the window, no zeros.
      causal: True hides later frames, a number n also those before the last n.
      interpret: as of `pallas_call`.

    Returns:
      (B, T, H, W, D) in q's dtype. Gradients are exact for all but integers and masks.
    """
    extra = 0 if extra_kv is None else extra_kv[0].shape[1]
    make = functools.partial(
        make_plan,
        q.shape,
        num_heads,
        block,
        extra=_padded(extra),
        frames=block[0] if causal is True else int(causal),
        has_grid=k is not None,
    )
    plan, plan_backward = make(FORWARD), make(BACKWARD)
    x = Inputs(q, k, v)
    if k is not None and bias is not None:
        x = x._replace(bias=_of_tile(plan, bias))
    if k is not None and segment_ids is not None:
        x = x._replace(ids=_in_tiles(plan, segment_ids.astype(jnp.int32)))
    if extra_kv is not None:
        x = _with_extra(plan, x, *extra_kv)
    if qk_scales is not None:
        scales = (jnp.tile(s.astype(jnp.float32), num_heads)[None] for s in qk_scales)
        x = x._replace(**dict(zip(("q_scale", "k_scale"), scales)))
    return _attention((plan, plan_backward), interpret, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(plans: tuple[Plan, Plan], interpret: Any, x: Inputs) -> jax.Array:
    return forward(plans[0], x, interpret=interpret)


def _save(plans: tuple[Plan, Plan], interpret: Any, x: Inputs) -> tuple[jax.Array, Inputs]:
    return forward(plans[0], x, interpret=interpret), x


def _pull(plans: tuple[Plan, Plan], interpret: Any, x: Inputs, dy: jax.Array) -> tuple[Inputs]:
    return (backward(plans[1], x, dy, interpret=interpret),)


_attention.defvjp(_save, _pull)


def _padded(extra: int) -> int:
    return -(-extra // _SUBLANES) * _SUBLANES


def _of_tile(plan: Plan, bias: jax.Array) -> jax.Array:
    """The bias of all windows of a tile, and 0 of extra keys."""
    if plan.merged:
        places = np.stack(np.indices(plan.tile), -1).reshape(-1, 3) % plan.block
        token = np.ravel_multi_index(places.T, plan.block)
        bias = bias[:, token][:, :, token]
    return jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, 0), (0, plan.extra)))


def _in_tiles(plan: Plan, ids: jax.Array) -> jax.Array:
    (t, h, w), (wt, wh, ww) = plan.grid, plan.tile
    ids = ids.reshape(-1, t // wt, wt, h // wh, wh, w // ww, ww).transpose(0, 1, 3, 5, 2, 4, 6)
    return ids.reshape(*ids.shape[:4], plan.length)


def _with_extra(
    plan: Plan, x: Inputs, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> Inputs:
    missing = plan.extra - k.shape[1]
    if mask is None and not missing:
        return x._replace(extra_k=k, extra_v=v)
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask.astype(bool)
    k, v = (
        jnp.pad(jnp.where(mask[..., None], y, 0), ((0, 0), (0, missing), (0, 0))) for y in (k, v)
    )
    seen = jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, missing)))
    seen = jnp.pad(seen, ((0, 0), (plan.own_keys, 0)), constant_values=1)
    return x._replace(extra_k=k, extra_v=v, extra_seen=seen)
