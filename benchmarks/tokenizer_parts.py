"""What the tokenizer costs on a TPU by the compiler's estimate: part by part, and summed.

Compiling the whole tokenizer takes long and says little about where the cycles go, so each distinct
part (a residual block of one shape, a downsampling, ...) is priced by itself, forward and forward +
backward, and the parts are added up as often as they occur. What the compiler would fuse across
parts is missing from such a sum.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from walt_jax.kernels.causal_conv import causal_conv, fits
from walt_jax.kernels.channel_moments import channel_moments
from walt_jax.kernels.rows import block_rows
from walt_jax.models import Tokenizer, TokenizerConfig
from walt_jax.models.build import count
from walt_jax.models.tokenizer.tokenizer import ResBlock
from walt_jax.models.tokenizer.whole import Whole
from walt_jax.rehearsal.chips import CHIPS
from walt_jax.rehearsal.estimate import Estimate, estimate, peak_share
from walt_jax.training.flops import forward_flops

Shape = tuple[int, ...]
PASSES = ("forward", "forward + backward")
RESIDUAL = "residual block"


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer or block of the tokenizer at one shape.

    Attributes:
      name: what it is.
      function: of (params, *inputs).
      arguments: shapes of params and inputs.
      reads_pixels: whether its input is the video, which needs no gradient.
      count: how often the tokenizer has it.
    """

    name: str
    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...]
    reads_pixels: bool = False
    count: int = 1

    @property
    def input(self) -> Shape:
        """(T, H, W, C) of the main input."""
        return self.arguments[1].shape[1:]

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.function, *self.arguments)

    @property
    def params(self) -> int:
        """How many parameters it has."""
        return count(self.arguments[0])

    @property
    def flops(self) -> float:
        """Model FLOPs of one forward pass; a backward pass counts twice that."""
        return forward_flops(self.function, *self.arguments)

    def price(self, passes: str, chip: str) -> Estimate:
        """The estimate for 'forward' or 'forward + backward', that of Pallas kernels included."""
        whole = self._estimate(passes, chip)
        frames, height, width = self.input[:3]
        convolutions = [
            kernel.shape
            for kernel in jax.tree.leaves(self.arguments[0])
            if kernel.ndim == 5 and fits(self.arguments[1].shape, kernel.shape, jnp.bfloat16)
        ]
        if not whole.unpriced:
            return whole
        normed = self.name == RESIDUAL or "norm" in self.arguments[0]
        each = normed + (1 if passes == "forward" else 3)
        if len(whole.unpriced) != len(convolutions) * each:
            raise ValueError(f"{self.name}: the kernels {whole.unpriced} are not known.")
        kernels = sum(
            kernel_cycles((frames, height, width), shape, normed, passes, chip)
            for shape in convolutions
        )
        return dataclasses.replace(
            whole, cycles=whole.cycles + kernels, kernels=kernels, unpriced=()
        )

    def _estimate(self, passes: str, chip: str) -> Estimate:
        if passes == "forward":
            return estimate(self.function, *self.arguments, chip=chip, walk=False)

        def both(dy: jax.Array, params: Any, *inputs: jax.Array) -> tuple[jax.Array, Any]:
            if self.reads_pixels:
                y, pull = jax.vjp(lambda p: self.function(p, *inputs), params)
            else:
                y, pull = jax.vjp(self.function, params, *inputs)
            return y, pull(dy)

        return estimate(both, self.output, *self.arguments, chip=chip, walk=False)


@functools.cache
def kernel_cycles(
    video: tuple[int, int, int], kernel: Shape, normed: bool, passes: str, chip: str
) -> int:
    """Cycles of the Pallas kernels of one convolution, and of the norm before it.

    The compiler prices a kernel by walking through its grid, which takes long. So two frames of two
    blocks of rows are priced and scaled: other rows and frames are the same work, but for what the
    first frame alone needs, which this counts too often.

    Args:
      video: frames, height and width.
      kernel: shape of the convolution's kernel.
      normed: whether a norm and swish are before it.
      passes: 'forward' or 'forward + backward'.
      chip: a key of CHIPS.

    Raises:
      ValueError: the compiler gave a kernel no price.
    """
    frames, height, width = video
    taps, _, _, channels, features = kernel
    rows = 2 * block_rows(height, width, taps, channels, max(128, features), jnp.bfloat16)

    few = min(2, frames)
    x = jax.ShapeDtypeStruct((1, few, rows, width, channels), jnp.bfloat16)
    dy = jax.ShapeDtypeStruct((*x.shape[:-1], features), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((1, few, channels), jnp.float32)
    arguments = [x, jax.ShapeDtypeStruct(kernel, jnp.bfloat16), *[vector, vector] * normed]
    steps = [estimate(causal_conv, *arguments, chip=chip)]
    if normed:
        steps.append(estimate(channel_moments, x, chip=chip))
    if passes != "forward":

        def backward(dy: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, ...]:
            return jax.vjp(causal_conv, *arguments)[1](dy)

        steps.append(estimate(backward, dy, *arguments, chip=chip))
    if any(step.unpriced for step in steps):
        raise ValueError(f"No price of {kernel} on {chip}: {[s.unpriced for s in steps]}.")
    return round(sum(step.kernels for step in steps) * frames * height / (few * rows))


def tokenizer_parts(
    config: TokenizerConfig, video: tuple[int, int, int], fused: bool | None = None
) -> list[Part]:
    """The distinct parts of encode and decode of one clip, in order of their first use.

    Args:
      config: sizes.
      video: frames, height and width.
      fused: False leaves the Pallas kernels out.

    Raises:
      UserError: a number of frames or a size that does not fit the tokenizer.
    """
    model = nnx.eval_shape(lambda: Tokenizer(config, rngs=nnx.Rngs(0)))
    z = jax.ShapeDtypeStruct((1, *config.latent_shape(*video)), jnp.float32)
    x = jax.ShapeDtypeStruct((1, *video, 3), jnp.float32)
    parts: dict[Any, Part] = {}
    for name, modules, call in _calls(model):
        graphdef, state = nnx.split(modules)

        def function(params: Any, *inputs: jax.Array, graphdef=graphdef, call=call) -> jax.Array:
            return call(nnx.merge(graphdef, params), Whole(fused=fused), *inputs)

        x = z if name == "decoder's first convolution" else x
        inputs = (x, z) if name == "AdaGN" else (x,)
        part = Part(name, function, (nnx.to_pure_dict(state), *inputs), reads_pixels=not parts)
        key = (name, str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part.arguments)))
        before = parts.get(key, dataclasses.replace(part, count=0))
        parts[key] = dataclasses.replace(before, count=before.count + 1)
        x = part.output
    return list(parts.values())


def _calls(model: Tokenizer) -> Iterator[tuple[str, Any, Callable[..., jax.Array]]]:
    """(name, modules, how to call them) of encode, then of decode."""

    def convolve(modules: Any, run: Whole, x: jax.Array) -> jax.Array:
        return run.convolve(modules["conv"], x, modules.get("norm"))

    def block(block: ResBlock, run: Whole, x: jax.Array) -> jax.Array:
        return block(x, run)

    def normalise(norm: nnx.Module, run: Whole, x: jax.Array, z: jax.Array) -> jax.Array:
        return run.normalise(norm, x, z)

    encoder, decoder = model.encoder, model.decoder
    yield "encoder's first convolution", {"conv": encoder.conv_in}, convolve
    for stage in encoder.stages:
        if isinstance(stage, ResBlock):
            yield RESIDUAL, stage, block
        else:
            yield "downsampling", {"conv": stage}, convolve
    head = {"conv": encoder.conv_out, "norm": encoder.norm_out}
    yield "encoder's last convolution", head, convolve
    yield "decoder's first convolution", {"conv": decoder.conv_in}, convolve
    for residual in decoder.blocks:
        yield RESIDUAL, residual, block
    for level in decoder.levels:
        yield "AdaGN", level.norm, normalise
        for residual in level.blocks:
            yield RESIDUAL, residual, block
        if level.upsample is not None:

            def enlarge(
                modules: Any, run: Whole, x: jax.Array, factors: Shape = level.factors
            ) -> jax.Array:
                return run.enlarge(run.convolve(modules["conv"], x), factors)

            yield "upsampling", {"conv": level.upsample}, enlarge
    head = {"conv": decoder.conv_out, "norm": decoder.norm_out}
    yield "decoder's last convolution", head, convolve


def level_blocks(parts: Iterable[Part]) -> list[Part]:
    """The residual block of each level, where it keeps the level's width."""
    blocks = (p for p in parts if p.name == RESIDUAL and p.output.shape == p.arguments[1].shape)
    return list({p.input: p for p in blocks}.values())


@dataclasses.dataclass(frozen=True)
class Row:
    """A priced part, once."""

    part: Part
    passes: str
    chip: str
    estimate: Estimate

    @property
    def flops(self) -> float:
        backward = 1 if self.part.reads_pixels else 2
        return self.part.flops * (1 if self.passes == "forward" else 1 + backward)

    @property
    def share(self) -> float:
        return peak_share(self.flops, self.estimate.cycles, self.chip)

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "part": self.part.name,
            "input": self.part.input,
            "output": self.part.output.shape[1:],
            "count": self.part.count,
            "passes": self.passes,
            "chip": self.chip,
            "flops": self.flops,
            "share_of_peak": self.share,
            **dataclasses.asdict(self.estimate),
        }


def total(rows: list[Row]) -> dict[str, Any]:
    """Sums the rows of one chip, one video and one kind of pass.

    HBM beside parameters (float32) and, with a backward pass, their gradients: forward, the part
    that takes most; else either everything that the parts keep at most (`kept`) or each part's
    input and the part that takes most (`recomputed`: each part's forward pass is then run again,
    which the cycles do not hold). The optimizer is not in it.
    """
    chip, passes = rows[0].chip, rows[0].passes
    cycles = sum(r.estimate.cycles * r.part.count for r in rows)
    flops = sum(r.flops * r.part.count for r in rows)
    weights = 4 * sum(r.part.params * r.part.count for r in rows)
    working = max(_working(r) for r in rows)
    if passes == "forward":
        memory = {"forward": weights + working}
    else:
        inputs = sum(_inputs(r) * r.part.count for r in rows)
        kept = sum((_inputs(r) + r.estimate.temporaries) * r.part.count for r in rows)
        memory = {"kept": 2 * weights + kept, "recomputed": 2 * weights + inputs + working}
    return {
        "chip": chip,
        "passes": passes,
        "cycles": cycles,
        "seconds": cycles / CHIPS[chip].hertz,
        "flops": flops,
        "share_of_peak": peak_share(flops, cycles, chip),
        "hbm": memory,
        "unpriced": [name for r in rows for name in r.estimate.unpriced],
    }


def _inputs(row: Row) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in row.part.arguments[1:])


def _working(row: Row) -> int:
    """Bytes of activations and temporaries while the part runs."""
    e, weights = row.estimate, 4 * row.part.params
    gradients = 0 if row.passes == "forward" else weights
    return e.arguments - weights + e.outputs - gradients + e.temporaries
