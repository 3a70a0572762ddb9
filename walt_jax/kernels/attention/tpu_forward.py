"""The pass forward of window attention as a Pallas TPU kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from walt_jax.kernels.attention.tpu_heads import (
    Inputs,
    ask,
    biased,
    dot,
    grid_and_extra,
    normalise,
    pipelined,
    powers,
    quarantine,
    scales,
    specs,
    visible,
)
from walt_jax.kernels.attention.tpu_plan import Plan, Task, Tile
from walt_jax.kernels.rows import params


def forward(plan: Plan, x: Inputs, interpret: Any = False) -> jax.Array:
    """Attention of each tile: (B, T, H, W, D) in q's dtype."""
    names, arrays, blocks = specs(plan, x)
    dtype = x.q.dtype

    def body(*refs: Any) -> None:
        refs, out = dict(zip(names, refs)), refs[-1]
        part = pl.program_id(5)
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
            e, inverse = powers(s, seen[tile])
            v = operands(tile, g)[2][group.rows(i)]
            parts.append(dot(v.astype(dtype), e.astype(dtype), (1, 0)) * inverse)
            if len(parts) == group.heads:
                plan.write(out, tile, group, jnp.concatenate(parts, 0).T)

        pipelined(plan.tasks(), logits, attend)

    out = pl.pallas_call(
        body,
        name=plan.name,
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, dtype),
        grid=plan.pallas_grid(len(x.q)),
        in_specs=blocks,
        out_specs=plan.of_queries(),
        compiler_params=params(*["parallel"] * 6),
        interpret=interpret,
    )(*arrays)
    return out.reshape(x.q.shape)
