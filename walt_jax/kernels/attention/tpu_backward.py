"""The gradients of window attention as a Pallas TPU kernel, all recomputed from q, k and v."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from walt_jax.kernels.attention.tpu_heads import (
    LOG2_E,
    Inputs,
    Refs,
    ask,
    at_start,
    biased,
    by_core,
    dot,
    grid_and_extra,
    in_hbm,
    inverse,
    normalise,
    normalise_gradient,
    pipelined,
    powers,
    quarantine,
    scales,
    specs,
    turn_bias,
    visible,
)
from walt_jax.kernels.attention.tpu_plan import Group, Plan, Task, Tile
from walt_jax.kernels.rows import params

LN_2 = 1 / LOG2_E  # logits are powers of 2


class _Operands(NamedTuple):
    """Of a group of heads in a tile: (tokens, width), k transposed.

    Attributes:
      asked, known: queries and keys of the logits.
      q, k, v, dy: of the products.
    """

    asked: jax.Array
    known: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    dy: jax.Array


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def backward(plan: Plan, x: Inputs, dy: jax.Array, interpret: Any = False) -> Inputs:
    """The gradients of `forward`, None for integers."""
    names, arrays, blocks = specs(plan, x)
    names, arrays, blocks = ["dy", *names], [plan.view(dy), *arrays], [plan.of_queries(), *blocks]
    columns, steps, *rest = plan.pallas_grid(len(dy))
    # Each core of a chip sums the bias gradient of its own heads, or else of half the batch.
    cores = plan.cores(len(dy)) if x.bias is not None else 1
    outs = _outputs(plan, x, dy, cores)
    of_clips = [name for name in outs if "_" in name]
    scratch: dict[str, Any] = {}
    if plan.parts > 1:
        of_keys = pltpu.VMEM((plan.keys, plan.lanes), jnp.float32)
        scratch |= {"k_sum": of_keys, "v_sum": of_keys}
    if x.bias is not None:
        # Summed in scratch memory, whose address the compiler knows: what is written to an output
        # might be what an input is read from, and each head would wait for the one before.
        sizes = (plan.heads, plan.parts, plan.keys, plan.rows)
        scratch["bias_sum"] = pltpu.VMEM(sizes, jnp.float32)
        if plan.parts == 1:
            scratch["bias_turned"] = pltpu.VMEM((plan.heads, *sizes[2:]), jnp.float32)

    def body(*refs: Any) -> None:
        refs = dict(zip([*names, *(f"d{name}" for name in outs), *scratch], refs))
        ids = [pl.program_id(i) for i in range(7)]
        first = at_start(ids[3:])
        _clear_at(first, [refs[f"d{name}"] for name in of_clips])
        _clear_at(ids[6] == 0, [refs[name] for name in ("k_sum", "v_sum") if name in refs])
        if x.bias is None:
            _Step(plan, refs, dy.dtype).run()
            return
        start = at_start(ids[2:])
        _clear_at(start, [refs["bias_sum"]])
        if "bias_turned" in refs:
            turn_bias(refs, start)
        _Step(plan, refs, dy.dtype).run()
        ends = (i == pl.num_programs(axis) - 1 for axis, i in enumerate(ids[2:], 2))

        @pl.when(functools.reduce(jnp.logical_and, ends))
        def _() -> None:
            for head in range(plan.heads):
                for part in range(plan.parts):
                    refs["dbias"][head, part] = refs["bias_sum"][head, part].T

    clips = "parallel" if x.bias is None else "arbitrary"
    windows = "arbitrary" if of_clips or x.bias is not None else "parallel"
    found = pl.pallas_call(
        body,
        name=f"{plan.name}_gradient",
        out_shape=[shape for shape, _ in outs.values()],
        grid=(cores, columns, steps // cores, *rest),
        in_specs=[by_core(spec, steps // cores) for spec in blocks],
        out_specs=[by_core(spec, steps // cores) for _, spec in outs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=params("parallel", "parallel", clips, *[windows] * 3, "arbitrary"),
        interpret=interpret,
    )(*in_hbm(arrays, interpret))
    gradients = dict(zip(outs, found))
    for name, gradient in gradients.items():
        like = getattr(x, name)
        if name == "bias" or name.endswith("_scale"):
            gradient = gradient.sum(0)
        gradients[name] = gradient.astype(like.dtype).reshape(like.shape)
    return Inputs(**{name: gradients.get(name) for name in Inputs._fields})


def _outputs(
    plan: Plan, x: Inputs, dy: jax.Array, cores: int
) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    """Shapes and block specs of the gradients; those of extra keys and scales are sums."""
    like = jax.ShapeDtypeStruct(plan.view(dy).shape, dy.dtype)
    outs = {"q": (like, plan.of_queries())}
    if x.k is not None:
        outs |= {name: (like, plan.of_keys()) for name in "kv"}
    if x.extra_k is not None:
        extra = jax.ShapeDtypeStruct(x.extra_k.shape, jnp.float32)
        outs |= {name: (extra, plan.of_extra()) for name in ("extra_k", "extra_v")}
    if x.q_scale is not None:
        steps = len(dy) // plan.tiles[0]
        scale = jax.ShapeDtypeStruct((steps, 1, dy.shape[-1]), jnp.float32)
        spec = pl.BlockSpec((None, 1, plan.lanes), lambda d, b, *_: (b, 0, d))
        outs |= {name: (scale, spec) for name in ("q_scale", "k_scale")}
    if x.bias is not None:
        sizes = plan.parts, plan.rows, plan.keys
        bias = jax.ShapeDtypeStruct((cores, plan.num_heads, *sizes), jnp.float32)
        clips = len(dy) // plan.tiles[0] // cores
        # By core, which `by_core` hides in the number of the clip.
        spec = pl.BlockSpec(
            (None, plan.heads, *sizes), lambda d, b, *_: (lax.div(b, jnp.int32(clips)), d, 0, 0, 0)
        )
        outs["bias"] = bias, spec
    return outs


def _clear_at(first: jax.Array, refs: Any) -> None:
    if refs:

        @pl.when(first)
        def _() -> None:
            for ref in refs:
                ref[...] = jnp.zeros_like(ref)


class _Step:
    """One step of the kernel's grid."""

    def __init__(self, plan: Plan, refs: Refs, dtype: jnp.dtype) -> None:
        self.plan, self.refs = plan, refs
        self.dtype, self.part = dtype, pl.program_id(6) if plan.parts > 1 else 0
        self.seen = {tile: visible(plan, refs, tile, self.part) for tile in plan.each_tile()}
        self.operands = functools.cache(self._operands)
        self.done: dict[Any, list[tuple[jax.Array, ...]]] = {}

    def run(self) -> None:
        pipelined(self.plan.tasks(), self._products, self._pull)

    def _operands(self, tile: Tile, g: int) -> _Operands:
        plan, refs, group = self.plan, self.refs, self.plan.groups[g]
        q, dy = (plan.read(refs[name], tile, group) for name in ("q", "dy"))
        q = ask(plan, group, q, scales(refs, "q", group), self.dtype)
        k, v = (grid_and_extra(plan, refs, name, tile, group) for name in "kv")
        for scale in scales(refs, "k", group):
            k = normalise(group, k, scale, self.dtype)
        asked, known = q, k
        if plan.merged:
            (asked, q, dy), (known, k, v) = quarantine(q, dy), quarantine(k, v)
        known, v = known.astype(self.dtype), v.astype(self.dtype)
        return _Operands(asked, known, q, k.T, v, dy)

    def _products(self, task: Task) -> tuple[jax.Array, jax.Array]:
        """Logits and the gradients of the weights, (keys, queries)."""
        tile, g, i = task
        group, x = self.plan.groups[g], self.operands(tile, g)
        q, dy = (group.only(y, i).astype(self.dtype) for y in (x.asked, x.dy))
        tiles = group.touched(i)
        s, dp = dot(x.known[:, tiles], q, (1, 1)), dot(x.v[:, tiles], dy, (1, 1))
        return biased(self.refs, s, group.head + i), dp

    def _pull(self, task: Task, products: tuple[jax.Array, jax.Array]) -> None:
        tile, g, i = task
        group, x, seen = self.plan.groups[g], self.operands(tile, g), self.seen[tile]
        s, dp = products
        e = powers(s, seen)
        p = e * inverse(e.sum(0, keepdims=True), seen)
        ds = p * dp
        ds = ds - p * ds.sum(0, keepdims=True)
        if self.plan.merged:
            p, ds = jnp.where(seen, p, 0), jnp.where(seen, ds, 0)
        if "bias" in self.refs:
            self.refs["bias_sum"][group.head + i, self.part] += ds
        operands = p, ds, x.q[:, group.touched(i)], x.k[group.rows(i)], x.dy[:, group.touched(i)]
        p, ds, q, k, dy = (y.astype(self.dtype) for y in operands)
        parts = self.done.setdefault((tile, g), [])
        # Of the queries' gradient the transpose: that of ds would cost more.
        parts.append((dot(k, ds, (1, 0)), dot(ds, q, (1, 0)), dot(p, dy, (1, 0))))
        if len(parts) == group.heads:
            dq, dk, dv = zip(*parts)
            self._queries(tile, group, jnp.concatenate(dq, 0).T)
            self._keys(tile, group, group.join(dk) * LN_2, group.join(dv))

    def _queries(self, tile: Tile, group: Group, dq: jax.Array) -> None:
        """Writes the gradient of q, given that of what `ask` makes of it, without its log2(e)."""
        plan = self.plan
        dq *= plan.head_width**-0.5
        for scale in scales(self.refs, "q", group):
            q = plan.read(self.refs["q"], tile, group)
            dq, dscale = normalise_gradient(group, q, scale, dq, self.dtype)
            self.refs["dq_scale"][:, group.lanes] += dscale
        plan.write(self.refs["dq"], tile, group, dq)

    def _keys(self, tile: Tile, group: Group, dk: jax.Array, dv: jax.Array) -> None:
        if self.plan.parts == 1:
            self._write_keys(tile, group, dk, dv)
            return
        totals = self.refs["k_sum"], self.refs["v_sum"]
        for total, gradient in zip(totals, (dk, dv)):
            total[:, group.lanes] += gradient

        @pl.when(self.part == self.plan.parts - 1)
        def _() -> None:
            self._write_keys(tile, group, *(total[:, group.lanes] for total in totals))

    def _write_keys(self, tile: Tile, group: Group, dk: jax.Array, dv: jax.Array) -> None:
        plan = self.plan
        for scale in scales(self.refs, "k", group):
            k = grid_and_extra(plan, self.refs, "k", tile, group)
            dk, dscale = normalise_gradient(group, k, scale, dk, self.dtype)
            self.refs["dk_scale"][:, group.lanes] += dscale
        for name, gradient in (("k", dk), ("v", dv)):
            if plan.has_grid:
                plan.write(self.refs[f"d{name}"], tile, group, gradient[: plan.own_keys])
            if plan.extra:
                self.refs[f"dextra_{name}"][tile[0], :, group.lanes] += gradient[plan.own_keys :]
