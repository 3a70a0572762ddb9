"""The pass forward of window attention as a Pallas TPU kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from walt_jax.kernels.attention.tpu_heads import (
    Inputs,
    ask,
    at_start,
    biased,
    by_core,
    dot,
    grid_and_extra,
    in_hbm,
    inverse,
    normalise,
    pipelined,
    powers,
    quarantine,
    scales,
    specs,
    turn_bias,
    visible,
)
from walt_jax.kernels.attention.tpu_plan import SUBLANES, Plan, Task, Tile
from walt_jax.kernels.rows import LANES, params


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def forward(plan: Plan, x: Inputs, interpret: Any = False) -> jax.Array:
    """Attention of each tile: (B, T, H, W, D) in q's dtype."""
    names, arrays, blocks = specs(plan, x)
    dtype = x.q.dtype
    columns, steps, *rest = plan.pallas_grid(len(x.q))
    # The bias is turned once for all windows where every core has heads or videos of its own, else
    # at each use, as cores then divide the windows as they like.
    cores = plan.cores(len(x.q))
    once = x.bias is not None and plan.parts == 1 and (columns > 1 or cores == plan.chip.cores)
    cores, order = (cores, "arbitrary") if once else (1, "parallel")
    # A wide matrix unit waits for the softmax: there sums are rows of its product.
    by_product = plan.chip.matrix_unit > LANES
    scratch = {}
    if once:
        scratch["bias_turned"] = pltpu.VMEM((plan.heads, plan.keys, plan.rows), jnp.float32)

    def body(*refs: Any) -> None:
        refs = dict(zip([*names, "out", *scratch], refs))
        part = pl.program_id(6)
        if once:
            turn_bias(refs, at_start([pl.program_id(i) for i in range(2, 7)]))
        seen = {tile: visible(plan, refs, tile, part) for tile in plan.each_tile()}
        done: dict[Any, list[jax.Array]] = {}

        @functools.cache
        def operands(tile: Tile, g: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            group = plan.groups[g]
            q = plan.read(refs["q"], tile, group)
            q = ask(plan, group, q, scales(refs, "q", group), dtype)
            k, v = (grid_and_extra(plan, refs, name, tile, group) for name in "kv")
            for scale in scales(refs, "k", group):
                k = normalise(group, k, scale, dtype)
            if plan.merged:
                k, _, v = quarantine(k, v)
            return q, k.astype(dtype), v.T

        def logits(task: Task) -> jax.Array:
            tile, g, i = task
            group, (q, k, _) = plan.groups[g], operands(tile, g)
            s = dot(k[:, group.touched(i)], group.only(q, i).astype(dtype), (1, 1))
            return biased(refs, s, group.head + i)

        def attend(task: Task, s: jax.Array) -> None:
            tile, g, i = task
            group, parts = plan.groups[g], done.setdefault((tile, g), [])
            e, v = powers(s, seen[tile]), operands(tile, g)[2][group.rows(i)]
            if by_product:
                v = jnp.concatenate([v, jnp.ones((SUBLANES, plan.keys), v.dtype)], axis=0)
            y = dot(v.astype(dtype), e.astype(dtype), (1, 0))
            total = y[plan.head_width :][:1] if by_product else e.sum(0, keepdims=True)
            parts.append(y[: plan.head_width] * inverse(total, seen[tile]))
            if len(parts) == group.heads:
                plan.write(refs["out"], tile, group, jnp.concatenate(parts, 0).T)

        pipelined(plan.tasks(), logits, attend)

    out = pl.pallas_call(
        body,
        name=plan.name,
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, dtype),
        grid=(cores, columns, steps // cores, *rest),
        in_specs=[by_core(spec, steps // cores) for spec in blocks],
        out_specs=by_core(plan.of_queries(), steps // cores),
        scratch_shapes=list(scratch.values()),
        compiler_params=params("parallel", "parallel", *[order] * 5),
        interpret=interpret,
    )(*in_hbm(arrays, interpret))
    return out.reshape(x.q.shape)
