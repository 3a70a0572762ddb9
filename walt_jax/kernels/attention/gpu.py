"""Window attention for NVIDIA GPUs: Pallas kernels through Triton, forward and backward.

They have been interpreted on a CPU and lowered for CUDA, but not yet run on a GPU.

A program works on some queries of one head in one window and walks over the window's keys, then the
extra ones, with a running softmax; tokens are found in (B, T, H, W, D) by their index, so that
nothing is moved into windows or out of them. The backward pass recomputes the weights from the
log of their sum: one kernel for the queries, which walks over keys, one for the keys, which walks
over queries, one for the bias, which walks over windows. No program adds to what another one
writes, so that results are deterministic.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from walt_jax.kernels.attention.gpu_tiles import LANES, MASKED, Errors, Inputs, Plan, Ref, dot
from walt_jax.kernels.attention.windows import Extra, Scales, Window, without_padding
from walt_jax.kernels.attention.xla import normed

TILE = 64  # queries, and keys, at a time


def fits(
    grid: Sequence[int],
    d: int,
    num_heads: int,
    block: Window,
    dtype: jnp.dtype,
    *,
    extra: int = 0,
    bias: bool = False,
) -> bool:
    """Whether the kernels take it: heads of up to 128 features of 16 or 32 bits, all windows."""
    del grid, block, extra, bias
    return d // num_heads <= LANES[1] and jnp.dtype(dtype).itemsize in (2, 4)


def attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    bias: jax.Array | None,
    segment_ids: jax.Array | None,
    extra_kv: Extra | None,
    qk_scales: Scales | None,
    *,
    num_heads: int,
    block: Window,
    causal: bool | int,
    interpret: bool = False,
) -> jax.Array:
    """`window_attention` of checked arguments; `block` has no zeros."""
    if extra_kv is not None:
        extra_kv = without_padding(extra_kv)
    if qk_scales is not None:
        q, k, extra_kv = normed(q, k, extra_kv, qk_scales, num_heads)
    extra_k, extra_v, mask = extra_kv or (None, None, None)
    b, *grid, d = q.shape
    if k is None:
        block = tuple(grid)  # no token sees another: there is nothing to cut out
    plan = Plan(
        batch=b,
        grid=tuple(grid),
        block=block,
        num_heads=num_heads,
        width=d // num_heads,
        extra=0 if extra_k is None else extra_k.shape[1],
        frames=block[0] if causal is True else int(causal),
        size=max(LANES[0], min(TILE, pl.next_power_of_2(math.prod(block)))),
    )
    rows = functools.partial(jax.tree.map, lambda x: x.reshape(-1, d))
    inputs = Inputs(
        *rows((q, k, v, extra_k, extra_v)),
        bias=None if bias is None else bias.reshape(-1, plan.length),
        ids=None if segment_ids is None else segment_ids.reshape(-1),
        mask=None if mask is None else mask.astype(jnp.int32).reshape(-1),
    )
    return _attend(plan, interpret, inputs).reshape(q.shape)


def _attention_forward(plan: Plan, inputs: Inputs, out: Ref, log_sum: Ref) -> None:
    window, head, queries = pl.program_id(0), pl.program_id(1), plan.tile(pl.program_id(2))
    rows = plan.rows(window, queries)
    q = plan.head(inputs.q, rows, head)

    def step(state: Any, k: jax.Array, v: jax.Array, bias: Any, mask: jax.Array) -> Any:
        total, top, result = state
        logits = plan.logits(q, k, bias, mask)
        higher = jnp.maximum(top, logits.max(1))
        weights = jnp.where(mask, jnp.exp(logits - higher[:, None]), 0.0)
        shrink = jnp.exp(top - higher)
        result = result * shrink[:, None] + dot(weights.astype(v.dtype), v)
        return total * shrink + weights.sum(1), higher, result

    zero = jnp.zeros((plan.size,), jnp.float32)
    start = zero, jnp.full_like(zero, MASKED), jnp.zeros(q.shape, jnp.float32)
    total, top, result = plan.over_keys(inputs, queries, step, start)
    total = jnp.where(total == 0, 1.0, total)
    plan.write(out, rows, head, result / total[:, None])
    at = rows * plan.num_heads + head
    plgpu.store(log_sum.at[at], top + jnp.log(total), mask=at < log_sum.shape[0])


def _attention_queries(plan: Plan, inputs: Inputs, errors: Errors, dq: Ref) -> None:
    window, head, queries = pl.program_id(0), pl.program_id(1), plan.tile(pl.program_id(2))
    rows = plan.rows(window, queries)
    q = plan.head(inputs.q, rows, head)
    error = errors.of(plan, rows, head)

    def step(total: jax.Array, k: jax.Array, v: jax.Array, bias: Any, mask: jax.Array) -> Any:
        _, dlogits = _gradients(plan, q, k, v, bias, mask, *error)
        return total + dot(dlogits.astype(k.dtype), k)

    total = plan.over_keys(inputs, queries, step, jnp.zeros(q.shape, jnp.float32))
    plan.write(dq, rows, head, total * plan.width**-0.5)


def _attention_keys(plan: Plan, inputs: Inputs, errors: Errors, dk: Ref, dv: Ref) -> None:
    window, head, keys = pl.program_id(0), pl.program_id(1), plan.tile(pl.program_id(2))
    at = plan.rows(window, keys)

    def queries(i: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        places = plan.tile(i)
        return plan.rows(window, places), *plan.seen(inputs, window, head, places, keys)

    steps = pl.cdiv(plan.length, plan.size)
    _sum_over_queries(plan, inputs, errors, (inputs.k, inputs.v), (dk, dv), at, queries, steps)


def _attention_extra(plan: Plan, inputs: Inputs, errors: Errors, dk: Ref, dv: Ref) -> None:
    sample = pl.program_id(0)
    at = plan.extra_rows(sample, plan.tile(pl.program_id(2)))
    mask = plan.seen_extra(inputs, at)

    def queries(i: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        places = plan.tile(i)
        is_token = places < plan.tokens
        rows = jnp.where(is_token, sample * plan.tokens + places, plan.batch * plan.tokens)
        return rows, 0.0, mask & is_token[:, None]

    keys = inputs.extra_k, inputs.extra_v
    steps = pl.cdiv(plan.tokens, plan.size)
    _sum_over_queries(plan, inputs, errors, keys, (dk, dv), at, queries, steps)


def _sum_over_queries(
    plan: Plan,
    inputs: Inputs,
    errors: Errors,
    keys: tuple[Ref, Ref],
    out: tuple[Ref, Ref],
    at: jax.Array,
    queries: Callable[[jax.Array], tuple[jax.Array, Any, jax.Array]],
    steps: int,
) -> None:
    """Writes the gradients of keys and values `at` some rows: sums over `queries(i)`."""
    head = pl.program_id(1)
    k, v = (plan.head(ref, at, head) for ref in keys)

    def step(i: jax.Array, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, bias, mask = queries(i)
        q = plan.head(inputs.q, rows, head)
        error = errors.of(plan, rows, head)
        weights, dlogits = _gradients(plan, q, k, v, bias, mask, *error)
        dk = total[0] + dot(dlogits.astype(q.dtype).T, q)
        return dk, total[1] + dot(weights.astype(q.dtype).T, error[0])

    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, steps, step, (zero, zero))
    plan.write(out[0], at, head, dk * plan.width**-0.5)
    plan.write(out[1], at, head, dv)


def _attention_bias(plan: Plan, inputs: Inputs, errors: Errors, dbias: Ref) -> None:
    head, queries, keys = pl.program_id(0), plan.tile(pl.program_id(1)), plan.tile(pl.program_id(2))

    def step(window: jax.Array, total: jax.Array) -> jax.Array:
        rows, at = (plan.rows(window, places) for places in (queries, keys))
        q = plan.head(inputs.q, rows, head)
        k, v = (plan.head(ref, at, head) for ref in (inputs.k, inputs.v))
        seen = plan.seen(inputs, window, head, queries, keys)
        return total + _gradients(plan, q, k, v, *seen, *errors.of(plan, rows, head))[1]

    zero = jnp.zeros((plan.size, plan.size), jnp.float32)
    total = lax.fori_loop(0, plan.windows, step, zero)
    mask = (queries < plan.length)[:, None] & (keys < plan.length)[None]
    at = dbias.at[(head * plan.length + queries)[:, None], keys[None]]
    plgpu.store(at, total.astype(dbias.dtype), mask=mask)


def _gradients(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: Any,
    mask: jax.Array,
    dy: jax.Array,
    log_sum: jax.Array,
    mean: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Weights and the gradient at the logits, float32 (queries, keys)."""
    weights = jnp.where(mask, jnp.exp(plan.logits(q, k, bias, mask) - log_sum), 0.0)
    return weights, weights * (dot(dy, v.T) - mean)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: Plan, interpret: bool, inputs: Inputs) -> jax.Array:
    return _save(plan, interpret, inputs)[0]


def _save(plan: Plan, interpret: bool, inputs: Inputs) -> tuple[jax.Array, Any]:
    q = inputs.q
    log_sum = jax.ShapeDtypeStruct((q.shape[0] * plan.num_heads,), jnp.float32)
    call = _caller(plan, interpret, q.dtype)
    tiles = plan.windows, plan.num_heads, pl.cdiv(plan.length, plan.size)
    y, log_sum = call(_attention_forward, tiles, [_like(q), log_sum])(inputs)
    return y, (inputs, y, log_sum)


def _pull(plan: Plan, interpret: bool, saved: Any, dy: jax.Array) -> tuple[Inputs]:
    inputs, y, log_sum = saved
    products = dy.astype(jnp.float32) * y.astype(jnp.float32)
    errors = Errors(dy, log_sum, products.reshape(-1, plan.width).sum(-1))
    call = _caller(plan, interpret, dy.dtype)
    steps = pl.cdiv(plan.length, plan.size)
    tiles = plan.windows, plan.num_heads, steps
    (dq,) = call(_attention_queries, tiles, [_like(inputs.q)])(inputs, errors)
    dk = dv = extra_dk = extra_dv = dbias = None
    if inputs.k is not None:
        out = [_like(inputs.k), _like(inputs.v)]
        dk, dv = call(_attention_keys, tiles, out)(inputs, errors)
    if inputs.extra_k is not None:
        tiles = plan.batch, plan.num_heads, pl.cdiv(plan.extra, plan.size)
        out = [_like(inputs.extra_k), _like(inputs.extra_v)]
        extra_dk, extra_dv = call(_attention_extra, tiles, out)(inputs, errors)
    if inputs.bias is not None:
        tiles = plan.num_heads, steps, steps
        (dbias,) = call(_attention_bias, tiles, [_like(inputs.bias)])(inputs, errors)
    return (Inputs(dq, dk, dv, extra_dk, extra_dv, dbias, ids=None, mask=None),)


_attend.defvjp(_save, _pull)


def _caller(plan: Plan, interpret: bool, dtype: jnp.dtype) -> Callable[..., Any]:
    """`call(kernel, grid, out)(*args)` runs `kernel(plan, *args, *out)` by Pallas."""
    stages = 2 if dtype.itemsize == 2 else 1  # of loads in shared memory

    def call(kernel: Callable[..., None], grid: tuple[int, ...], out: Any) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, plan),
            name=kernel.__name__.strip("_"),
            grid=grid,
            out_shape=out,
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=stages),
            interpret=interpret,
        )

    return call


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
