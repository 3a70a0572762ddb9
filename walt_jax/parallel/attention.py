"""Window attention on a mesh: whole windows on each device, or whole frames of some heads."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from walt_jax.errors import UserError
from walt_jax.kernels import ExtraKv, resolve_window, window_attention
from walt_jax.parallel.sharding import TOKENS, divisible


def sharded_attention(
    mesh: Mesh | None,
    q: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    *,
    num_heads: int,
    window: Sequence[int],
    bias: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    extra_kv: ExtraKv | None = None,
    qk_norm: tuple[jax.Array, jax.Array] | None = None,
    **options: Any,
) -> jax.Array:
    """`window_attention` of arrays that lie on a mesh as `Layout.tokens` says.

    Samples are divided over `data` and `fsdp`, heads over `tensor`, rows of the grid over
    `context`. Where the windows do not lie within a device's rows, rows are exchanged for heads
    before the attention and back after it, by one all-to-all each way.

    Raises:
      UserError: the window does not tile the grid; `tensor` does not divide the heads, or `context`
        the rows; or a window has rows on several devices and `context` does not divide the heads
        that `tensor` leaves.
    """
    if mesh is None or mesh.size == 1:
        options |= {"bias": bias, "segment_ids": segment_ids, "extra_kv": extra_kv}
        options |= {"num_heads": num_heads, "window": window, "qk_norm": qk_norm}
        return window_attention(q, k, v, **options)
    entries = tuple(divisible((*TOKENS, None, "tensor"), q.shape, mesh))
    block = resolve_window(q.shape[1:4], window)
    context, height = mesh.shape["context"], q.shape[2]
    if k is not None and height > 1 and height % context:
        raise UserError(
            f"config.mesh.context {context} does not divide the {height} rows of tokens."
        )
    rows = height // (1 if entries[2] is None else context)
    if k is None:  # each token for itself
        block = (1, rows, q.shape[3])
    exchanged = rows % block[1] != 0
    by_head = ("tensor", "context") if exchanged else ("tensor",)
    sizes = [mesh.shape[axis] for axis in by_head]
    if num_heads % math.prod(sizes):
        raise UserError(_misfit(num_heads, window, rows, *sizes))

    tokens, batch = P(*entries), entries[0]
    memory = P(batch, None, by_head)
    grid = P(batch) if exchanged else P(*entries[:4])
    by_token = extra_kv is not None and extra_kv.mask is not None and extra_kv.mask.ndim > 2
    operands = (q, k, v), bias, segment_ids, extra_kv, qk_norm
    specs = (
        tokens,
        P(by_head),
        grid,
        extra_kv and ExtraKv(memory, memory, grid if by_token else P(batch)),
        P(),
    )

    def local(qkv: Any, bias: Any, segment_ids: Any, extra_kv: Any, qk_norm: Any) -> jax.Array:
        out = window_attention(
            *(_to_heads(qkv) if exchanged else qkv),
            num_heads=num_heads // math.prod(sizes),
            window=block,
            bias=bias,
            segment_ids=segment_ids,
            extra_kv=extra_kv,
            qk_norm=qk_norm,
            **options,
        )
        if exchanged:
            out = jax.lax.all_to_all(out, "context", split_axis=2, concat_axis=4, tiled=True)
        return out

    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(
        *operands
    )


def _to_heads(qkv: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Some rows of all heads to all rows of some heads, for the three together."""
    joined = jnp.stack(qkv, axis=4)
    joined = jax.lax.all_to_all(joined, "context", split_axis=5, concat_axis=2, tiled=True)
    return [joined[..., i, :] for i in range(3)]


def _misfit(num_heads: int, window: Sequence[int], rows: int, tensor: int, context: int = 1) -> str:
    if num_heads % tensor:
        return (
            f"config.mesh.tensor {tensor} does not divide the {num_heads} heads of attention in "
            f"windows of {tuple(window)}: set it to a divisor of them."
        )
    left = num_heads // tensor
    fits = ", ".join(str(n) for n in range(1, left + 1) if left % n == 0)
    return (
        f"The window {tuple(window)} has more than the {rows} rows of tokens that a device has "
        f"with config.mesh.context {context}, and this does not divide the {left} heads that "
        f"tensor {tensor} leaves: a context of {fits} would."
    )
