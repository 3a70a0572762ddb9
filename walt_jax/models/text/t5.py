"""T5's encoder, of version 1.1 (1910.10683, 2002.05202) and of UMT5 (2304.09151)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.kernels import window_attention
from walt_jax.models.build import stack
from walt_jax.models.denoiser.layers import Dense
from walt_jax.models.text.base import Embeddings, FrozenTextConfig
from walt_jax.models.text.published import required
from walt_jax.parallel import Layout

_FULL = (0, 0, 0)
_BUCKETS = "SelfAttention.relative_attention_bias.weight"


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder.

    Attributes:
      width: of the tokens; mlp_width: between the gated MLP's matrices; head_width: of each of
        `num_heads` heads.
      num_layers: of the encoder.
      vocabulary: token ids.
      buckets: of relative positions, up to `max_distance` apart; the last holds all further ones.
      bias_by_layer: every layer has its own relative position bias, as in UMT5; T5 and mT5 have one
        for all.
      epsilon: of the norms.
      dtype: what matrices are kept and compute in. float16 overflows.
    """

    width: int = 2048
    mlp_width: int = 5120
    head_width: int = 64
    num_heads: int = 32
    num_layers: int = 24
    vocabulary: int = 32128
    buckets: int = 32
    max_distance: int = 128
    bias_by_layer: bool = False
    epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        sizes = (self.width, self.mlp_width, self.head_width, self.num_heads, self.num_layers)
        if min(*sizes, self.vocabulary) < 1 or self.buckets < 4 or self.buckets % 2:
            raise UserError(
                f"The sizes of config.task.text.model must be positive, buckets even, got {self}."
            )


def _sizes(width: int, mlp: int, heads: int, layers: int) -> tuple[T5Config, T5Config]:
    v1_1 = T5Config(width=width, mlp_width=mlp, num_heads=heads, num_layers=layers)
    return v1_1, dataclasses.replace(v1_1, vocabulary=256384, bias_by_layer=True)


T5_SIZES: dict[str, T5Config] = {
    "t5-v1_1-large": _sizes(1024, 2816, 16, 24)[0],  # UMT5 has no such size
    **{
        f"{family}-{name}": config
        for name, sizes in {
            "small": (512, 1024, 6, 8),
            "base": (768, 2048, 12, 12),
            "xl": (2048, 5120, 32, 24),
            "xxl": (4096, 10240, 64, 24),
        }.items()
        for family, config in zip(("t5-v1_1", "umt5"), _sizes(*sizes))
    },
}


@dataclasses.dataclass(frozen=True)
class T5TextConfig(FrozenTextConfig, name="t5"):
    """A frozen T5, mT5 or UMT5 encoder; W.A.L.T reads T5-XL (2312.06662, section 5.3).

    Attributes:
      model: sizes; those of the files.
      The others are those of `FrozenTextConfig`.
    """

    model_types: ClassVar[tuple[str, ...]] = ("t5", "mt5", "umt5")

    model: T5Config = T5_SIZES["t5-v1_1-xl"]

    @classmethod
    def sizes_of(cls, values: Mapping[str, Any]) -> T5Config:
        """Reads a config.json of T5, mT5 or UMT5; see `FrozenTextConfig.sizes_of`."""
        kind, form = values.get("model_type"), values.get("feed_forward_proj")
        if kind not in cls.model_types or form != "gated-gelu":
            raise UserError(
                f"config.json describes a model of type {kind!r} with feed_forward_proj={form!r}, "
                "but config.task.text.name='t5' takes t5 (of version 1.1), mt5 and umt5 with "
                "'gated-gelu': give the folder of such a one."
            )
        return T5Config(
            width=required(values, "d_model"),
            mlp_width=required(values, "d_ff"),
            head_width=required(values, "d_kv"),
            num_heads=required(values, "num_heads"),
            num_layers=required(values, "num_layers"),
            vocabulary=required(values, "vocab_size"),
            buckets=values.get("relative_attention_num_buckets", 32),
            max_distance=values.get("relative_attention_max_distance", 128),
            bias_by_layer=kind == "umt5",
            epsilon=values.get("layer_norm_epsilon", 1e-6),
        )

    def make(self, rngs: nnx.Rngs) -> "T5Encoder":
        """The network; see `FrozenTextConfig.make`."""
        return T5Encoder(self.model, rngs=rngs)

    def tensors(self) -> Mapping[str, Sequence[str]]:
        """See `FrozenTextConfig.tensors`."""
        first, second = (f"encoder.block.{{}}.layer.{i}." for i in (0, 1))
        return {
            "embedding": ("shared.weight", "encoder.embed_tokens.weight"),
            "relative_bias": (first.format(0) + _BUCKETS,),
            "layers/relative_bias": (first + _BUCKETS,),
            **{f"layers/{n}/kernel": (f"{first}SelfAttention.{n}.weight",) for n in "qkv"},
            "layers/out/kernel": (f"{first}SelfAttention.o.weight",),
            "layers/norms/0/scale": (f"{first}layer_norm.weight",),
            "layers/gate/kernel": (f"{second}DenseReluDense.wi_0.weight",),
            "layers/up/kernel": (f"{second}DenseReluDense.wi_1.weight",),
            "layers/down/kernel": (f"{second}DenseReluDense.wo.weight",),
            "layers/norms/1/scale": (f"{second}layer_norm.weight",),
            "norm/scale": ("encoder.final_layer_norm.weight",),
        }


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each pair of places (1910.10683, section 2.1): int32 (L, L), query first.

    A half of them is for keys before the query. Of a half, the first half holds one distance each,
    the others hold ranges that grow as the logarithm.
    """
    offsets = np.arange(length)[None] - np.arange(length)[:, None]
    half, distance = buckets // 2, np.abs(offsets)
    exact = half // 2
    # In float32 and this order, as theirs: a distance at the border of two ranges stays in its own.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (np.where(offsets > 0, half, 0) + np.where(distance < exact, distance, far)).astype("i4")


class T5Encoder(nnx.Module):
    """The transformer; each token sees all others of its text."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (config.vocabulary, config.width)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.relative_bias = None if config.bias_by_layer else _relative_bias(config, rngs)
        self.layers = stack(lambda rngs: _Layer(config, rngs), config.num_layers, rngs)
        self.norm = _norm(config, rngs)

    @jax.named_scope("text")
    def __call__(self, tokens: jax.Array, layout: Layout = Layout()) -> Embeddings:  # noqa: B008
        """Encodes.

        Args:
          tokens: int32 (B, M), ids; -1 is padding, after all others.
          layout: where activations lie on the mesh.

        Returns:
          float32 (B, M, width) and where tokens are; what is in padding means nothing.
        """
        config, mask = self.config, tokens >= 0
        buckets = relative_buckets(tokens.shape[1], config.buckets, config.max_distance)
        shared = None
        if self.relative_bias is not None:
            shared = self.relative_bias[...][buckets].transpose(2, 0, 1)
        x = self.embedding[...][jnp.maximum(tokens, 0)].astype(jnp.float32)
        graphdef, state = nnx.split(self.layers)
        segment_ids = mask.astype(jnp.int32)[:, None, None]

        def layer(x: jax.Array, params: dict) -> tuple[jax.Array, None]:
            params = layout.gather(params, jnp.dtype(config.dtype), keep=("tensor",))
            x = nnx.merge(graphdef, params)(x, shared, buckets, segment_ids)
            return layout.tokens(x), None

        x = layout.tokens(x[:, None, None])  # a sequence as a grid of one row
        x, _ = jax.lax.scan(layer, x, nnx.to_pure_dict(state))
        return Embeddings(self.norm(x)[:, 0, 0], mask)


class _Layer(nnx.Module):
    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        self.config = config
        width, inner, mlp = config.width, config.num_heads * config.head_width, config.mlp_width
        self.q, self.k, self.v = (_linear(config, width, inner, rngs) for _ in range(3))
        self.out = _linear(config, inner, width, rngs)
        self.gate, self.up = (_linear(config, width, mlp, rngs) for _ in range(2))
        self.down = _linear(config, mlp, width, rngs)
        self.norms = nnx.List([_norm(config, rngs) for _ in range(2)])
        self.relative_bias = _relative_bias(config, rngs) if config.bias_by_layer else None

    def __call__(
        self, x: jax.Array, bias: jax.Array | None, buckets: np.ndarray, segment_ids: jax.Array
    ) -> jax.Array:
        if self.relative_bias is not None:
            bias = self.relative_bias[...][buckets].transpose(2, 0, 1)
        y = self.norms[0](x)
        # Scores of T5 are not divided by the root of the head's width, those of the primitive are.
        q = self.q(y) * math.sqrt(self.config.head_width)
        seen = window_attention(
            q,
            self.k(y),
            self.v(y),
            num_heads=self.config.num_heads,
            window=_FULL,
            bias=bias,
            segment_ids=segment_ids,
            implementation="xla",  # few tokens, which the partitioner may divide as it likes
        )
        x = x + self.out(seen)
        y = self.norms[1](x)
        return x + self.down(nnx.gelu(self.gate(y)) * self.up(y))


def _linear(config: T5Config, features_in: int, features: int, rngs: nnx.Rngs) -> Dense:
    dtype = jnp.dtype(config.dtype)
    return Dense(features_in, features, use_bias=False, dtype=dtype, rngs=rngs)


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.epsilon, dtype=jnp.float32, rngs=rngs)


def _relative_bias(config: T5Config, rngs: nnx.Rngs) -> nnx.Param:
    shape = (config.buckets, config.num_heads)
    return nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))
