"""The pass forward of window attention as a Pallas TPU kernel."""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl

from walt_jax.kernels.attention.tpu_heads import (
    Inputs,
    dot,
    grid_and_extra,
    normalise,
    powers,
    quarantine,
    queries,
    scales,
    specs,
    visible,
)
from walt_jax.kernels.attention.tpu_plan import Plan, pipelined
from walt_jax.kernels.rows import params


def forward(plan: Plan, x: Inputs, interpret: Any = False) -> jax.Array:
    """Attention of each tile: (B, T, H, W, D) in q's dtype."""
    names, arrays, blocks = specs(plan, x, transposed=False)
    dtype = x.q.dtype

    def body(*refs: Any) -> None:
        refs, out = dict(zip(names, refs)), refs[-1]
        part = pl.program_id(5)
        tiles = list(plan.each_tile())
        seen = {tile: visible(plan, refs, tile, part, transposed=False) for tile in tiles}

        @functools.cache
        def inputs(tile: tuple[int, int], g: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            group = plan.groups[g]
            q = queries(plan, refs, tile, group)
            k, v = (grid_and_extra(plan, refs, name, tile, group) for name in "kv")
            scale = scales(refs, "k", group)
            k = normalise(group, k, *scale) if scale else k
            if plan.merged:
                k, _, v = quarantine(k, v)
            return q, k.astype(dtype), v.astype(dtype)

        done: dict[Any, list[jax.Array]] = {}

        def logits(task: Any) -> jax.Array:
            tile, g, i = task
            q, k, _ = inputs(tile, g)
            group = plan.groups[g]
            s = dot(group.only(q, i).astype(dtype), k, (1, 1))
            return s + refs["bias"][group.head + i] if "bias" in refs else s

        def attend(task: Any, s: jax.Array) -> None:
            tile, g, _ = task
            group, parts = plan.groups[g], done.setdefault((tile, g), [])
            e, inverse = powers(s, seen[tile], 1)
            parts.append(dot(e.astype(dtype), inputs(tile, g)[2], (1, 0)) * inverse)
            if len(parts) == group.heads:
                plan.write(out, tile, group, group.join(parts))

        tasks = [
            (tile, g, i)
            for tile in tiles
            for g, group in enumerate(plan.groups)
            for i in range(group.heads)
        ]
        pipelined(tasks, logits, attend)

    return pl.pallas_call(
        body,
        name=plan.name,
        out_shape=jax.ShapeDtypeStruct(x.q.shape, dtype),
        grid=plan.pallas_grid(len(x.q)),
        in_specs=blocks,
        out_specs=plan.of_queries(),
        compiler_params=params(*["parallel"] * 6),
        interpret=interpret,
    )(*arrays)
