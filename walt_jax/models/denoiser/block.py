"""A layer: attention in windows, cross-attention, MLP, and how the condition acts on them."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from walt_jax.kernels.window_attention import Window
from walt_jax.models.denoiser.config import DenoiserConfig, Stage
from walt_jax.models.denoiser.layers import (
    Affine,
    Attention,
    CrossAttention,
    gelu,
    layer_norm,
    linear,
    modulate,
    over,
)
from walt_jax.models.denoiser.packing import Packing
from walt_jax.parallel import Layout


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers are given beside the tokens.

    Attributes:
      condition_BD: float32, the sum of the embeddings of time, class and so on.
      shared_BD: the modulation that layers share, or None.
      memory_BMD: tokens outside of the grid that layers read, or None; memory_mask_BM: which.
      segment_ids: int (B, T, H, W), tokens of other numbers are hidden; or None.
      image: the tokens are one frame of a grid with more.
      packing: the tokens are packed videos; then vectors are (B, S, D), one a video.
    """

    condition_BD: jax.Array
    shared_BD: jax.Array | None = None
    memory_BMD: jax.Array | None = None
    memory_mask_BM: jax.Array | None = None
    segment_ids: jax.Array | None = None
    image: bool = False
    packing: Packing | None = None

    def over(self, x: jax.Array, vectors: jax.Array) -> jax.Array:
        """Vectors (B, D), or (B, S, D) of packed videos, to multiply tokens x (B, T, H, W, D)."""
        return over(x, vectors) if self.packing is None else self.packing.over_grid(vectors)


def num_vectors(config: DenoiserConfig) -> int:
    """How many vectors (B, D) modulate one layer: a shift, a scale and a gate for each part.

    In "adaln_single" the attentions of a layer share theirs (STDiT); "adaln" has no gates.
    """
    attentions = len(config.windows) if config.order == "block" else 1
    if config.conditioning == "adaln_single":
        attentions = 1
    cross = config.reads and config.cross_attention.norm == "modulated"
    return (attentions + cross + 1) * (2 if config.conditioning == "adaln" else 3)


class LowRank(nnx.Module):
    """AdaLN-LoRA: A_1 + W_b W_a (c + t), A_1 shared by all layers (W.A.L.T, equation 3)."""

    def __init__(self, config: DenoiserConfig, size: int, rngs: nnx.Rngs) -> None:
        rank, zeros = config.adaln_rank, nnx.initializers.zeros
        self.lora_a = nnx.Linear(config.width, rank, use_bias=False, rngs=rngs)
        self.lora_b = nnx.Linear(rank, size, use_bias=False, kernel_init=zeros, rngs=rngs)

    def __call__(self, context: Context) -> jax.Array:
        own = self.lora_b(self.lora_a(context.condition_BD))
        return context.shared_BD + own.astype(jnp.float32)


class Table(nnx.Module):
    """adaLN-single: what all layers share, plus a table (PixArt-alpha, 2310.00426)."""

    def __init__(self, config: DenoiserConfig, size: int, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jax.random.normal(rngs.params(), (size,)) * config.width**-0.5)

    def __call__(self, context: Context) -> jax.Array:
        return context.shared_BD + self.table[...]


class Separate(nnx.Module):
    """A Dense of the layer's own (DiT)."""

    def __init__(self, config: DenoiserConfig, size: int, rngs: nnx.Rngs) -> None:
        self.dense = linear(config.width, size, jnp.float32, rngs, zero=True)

    def __call__(self, context: Context) -> jax.Array:
        return self.dense(nnx.silu(context.condition_BD))


_MODULATIONS = {
    "adaln_lora": LowRank,
    "adaln_single": Table,
    "adaln_zero": Separate,
    "adaln": Separate,
}


class Layer(nnx.Module):
    """Attentions one after another, cross-attention, MLP; each a residual branch.

    A branch reads x through a norm that the condition modulates, or through one with a learned
    scale and shift where the condition comes by other ways.
    """

    def __init__(self, config: DenoiserConfig, windows: tuple[Window, ...], rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.config = config
        self.modulation = (
            _MODULATIONS[config.conditioning](config, num_vectors(config) * width, rngs)
            if config.modulated
            else None
        )
        sides = (windows,) if config.order == "heads" else tuple((w,) for w in windows)
        self.attentions = nnx.List(
            [
                Attention(
                    width,
                    config.num_heads,
                    side,
                    config.tokens,
                    causal=config.causal,
                    image_identity=config.image_identity,
                    relative_bias=config.relative_bias,
                    any_size=config.any_size,
                    qk_norm=config.qk_norm,
                    dtype=dtype,
                    rngs=rngs,
                    implementation=config.attention,
                )
                for side in sides
            ]
        )
        cross = config.cross_attention
        self.cross = (
            CrossAttention(
                width,
                config.num_heads,
                cross.window or windows[-1],
                queries=cross.queries,
                causal=config.causal,
                zero=cross.norm != "modulated",
                qk_norm=config.qk_norm,
                dtype=dtype,
                rngs=rngs,
                implementation=config.attention,
            )
            if config.reads
            else None
        )
        norms = len(sides) + 1 + (config.reads and cross.norm == "modulated")
        self.norms = (
            None if config.modulated else nnx.List([Affine(width, rngs) for _ in range(norms)])
        )
        mlp_width = round(width * config.mlp_ratio)
        self.up = linear(width, mlp_width, dtype, rngs)
        self.down = linear(mlp_width, width, dtype, rngs)

    def __call__(self, x: jax.Array, context: Context, layout: Layout) -> jax.Array:
        config, cross = self.config, self.config.cross_attention
        branches = self._branches(context, x.dtype)
        seen = {
            "image": context.image,
            "segment_ids": context.segment_ids,
            "packing": context.packing,
        }
        for i, attention in enumerate(self.attentions):
            # STDiT's temporal attention reads x as it is and has the spatial one's gate.
            if i and config.conditioning == "adaln_single":
                norm = _as_it_is
            else:
                norm, gate = next(branches)
            with jax.named_scope("attention"):
                x = x + gate(attention(norm(x), layout, **seen))
        if self.cross is not None:
            plain = layer_norm if cross.norm == "plain" else _as_it_is
            norm, gate = next(branches) if cross.norm == "modulated" else (plain, _as_it_is)
            memory = context.memory_BMD, context.memory_mask_BM
            with jax.named_scope("cross_attention"):
                x = x + gate(self.cross(norm(x), *memory, layout, **seen))
        norm, gate = next(branches)
        with jax.named_scope("mlp"):
            h = gelu(checkpoint_name(self.up(norm(x)), "up"))
            return x + gate(checkpoint_name(self.down(h), "down"))

    def _branches(
        self, context: Context, dtype: jnp.dtype
    ) -> Iterator[tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]]:
        """For each branch in turn: what it reads x through, and what its result passes."""
        if self.modulation is None:
            for norm in self.norms:
                yield norm, _as_it_is
            return
        with jax.named_scope("modulation"):
            vectors = self.modulation(context).astype(dtype)
        vectors = iter(jnp.split(vectors, num_vectors(self.config), axis=-1))
        for shift in vectors:
            scale = next(vectors)
            gate = None if self.config.conditioning == "adaln" else next(vectors)
            yield (
                lambda x, vectors=(shift, scale): modulate(
                    layer_norm(x), *(context.over(x, v) for v in vectors)
                ),
                _as_it_is if gate is None else lambda y, gate=gate: context.over(y, gate) * y,
            )


class Group(nnx.Module):
    """The layers of a stage that repeat; the denoiser scans over such groups."""

    def __init__(self, config: DenoiserConfig, stage: Stage, rngs: nnx.Rngs) -> None:
        self.skip = (
            linear(2 * config.width, config.width, jnp.dtype(config.dtype), rngs)
            if stage.skip == "read"
            else None
        )
        self.layers = nnx.List([Layer(config, windows, rngs) for windows in stage.blocks])

    def __call__(
        self, x: jax.Array, skip: jax.Array | None, context: Context, layout: Layout
    ) -> jax.Array:
        if self.skip is not None:
            x = self.skip(jnp.concatenate([x, skip], axis=-1))
        for layer in self.layers:
            x = layout.tokens(layer(x, context, layout))
        return x


def _as_it_is(x: jax.Array) -> jax.Array:
    return x
