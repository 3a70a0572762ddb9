"""CLIP's text encoder (2103.00020): OpenAI's, and OpenCLIP's in Hugging Face's layout."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.kernels import window_attention
from walt_jax.models.build import stack
from walt_jax.models.denoiser.layers import linear
from walt_jax.models.text.base import Embeddings, FrozenTextConfig
from walt_jax.models.text.published import required
from walt_jax.parallel import Layout

_PLACES = 77


def quick_gelu(x: jax.Array) -> jax.Array:
    """The activation of OpenAI's weights."""
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: nnx.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP text encoder.

    Attributes:
      width: of the tokens; mlp_width: between the MLP's matrices.
      num_layers, num_heads: of the transformer.
      vocabulary: token ids; places: the longest text, in tokens.
      activation: "quick_gelu" of OpenAI's weights, "gelu" of most of OpenCLIP's.
      epsilon: of the norms.
      dtype: what matrices are kept and compute in.
    """

    width: int = 768
    mlp_width: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    vocabulary: int = 49408
    places: int = _PLACES
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        sizes = (self.width, self.mlp_width, self.num_layers, self.num_heads, self.vocabulary)
        if min(*sizes, self.places) < 1 or self.width % self.num_heads:
            raise UserError(
                "The sizes of config.task.text.model must be positive, width a multiple of "
                f"num_heads, got {self}."
            )


CLIP_SIZES: dict[str, ClipConfig] = {
    "clip-b-32": ClipConfig(width=512, mlp_width=2048, num_heads=8),
    "clip-l-14": ClipConfig(),
    "openclip-h-14": ClipConfig(
        width=1024, mlp_width=4096, num_layers=24, num_heads=16, activation="gelu"
    ),
    "openclip-g-14": ClipConfig(
        width=1280, mlp_width=5120, num_layers=32, num_heads=20, activation="gelu"
    ),
}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(FrozenTextConfig, name="clip"):
    """A frozen CLIP text encoder.

    Attributes:
      model: sizes; those of the files.
      clip_skip: last layers left out before the last norm; 1 gives the penultimate layer's tokens.
      The others are those of `FrozenTextConfig`.
    """

    max_places: ClassVar[int] = _PLACES
    model_types: ClassVar[tuple[str, ...]] = ("clip_text_model", "clip")

    max_tokens: int = _PLACES
    model: ClipConfig = CLIP_SIZES["clip-l-14"]
    clip_skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clip_skip < self.model.num_layers:
            raise UserError(
                f"config.task.text.clip_skip must be 0 to {self.model.num_layers - 1}, got "
                f"{self.clip_skip}."
            )
        if self.max_tokens > self.model.places:
            raise UserError(
                f"config.task.text.max_tokens={self.max_tokens} is more than "
                f"config.task.text.model.places={self.model.places}: make it no larger."
            )

    @classmethod
    def sizes_of(cls, values: Mapping[str, Any]) -> ClipConfig:
        """Reads a config.json of CLIP or of its text part; see `FrozenTextConfig.sizes_of`."""
        kind = values.get("model_type")
        values = values.get("text_config") or values  # of both towers
        activation = values.get("hidden_act", "quick_gelu")
        if kind not in cls.model_types or activation not in _ACTIVATIONS:
            raise UserError(
                f"config.json describes a model of type {kind!r} with hidden_act={activation!r}, "
                "but config.task.text.name='clip' takes clip and clip_text_model with 'quick_gelu' "
                "or 'gelu': give the folder of such a one."
            )
        return ClipConfig(
            width=required(values, "hidden_size"),
            mlp_width=required(values, "intermediate_size"),
            num_layers=required(values, "num_hidden_layers"),
            num_heads=required(values, "num_attention_heads"),
            vocabulary=values.get("vocab_size", 49408),
            places=values.get("max_position_embeddings", _PLACES),
            activation=activation,
            epsilon=values.get("layer_norm_eps", 1e-5),
        )

    def make(self, rngs: nnx.Rngs) -> "ClipEncoder":
        """The network; see `FrozenTextConfig.make`."""
        return ClipEncoder(self.model, clip_skip=self.clip_skip, rngs=rngs)

    def tensors(self) -> Mapping[str, Sequence[str]]:
        """See `FrozenTextConfig.tensors`."""
        layer = "encoder.layers.{}."
        dense = {"out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}
        dense |= {n: f"self_attn.{n}_proj" for n in "qkv"}
        norms = {"norms/0": "layer_norm1", "norms/1": "layer_norm2"}
        names = {
            "embedding": "embeddings.token_embedding.weight",
            "places": "embeddings.position_embedding.weight",
            **{f"layers/{n}/kernel": f"{layer}{m}.weight" for n, m in dense.items()},
            **{f"layers/{n}/bias": f"{layer}{m}.bias" for n, m in dense.items()},
            **{f"layers/{n}/scale": f"{layer}{m}.weight" for n, m in norms.items()},
            **{f"layers/{n}/bias": f"{layer}{m}.bias" for n, m in norms.items()},
            "norm/scale": "final_layer_norm.weight",
            "norm/bias": "final_layer_norm.bias",
        }
        return {path: (f"text_model.{name}", name) for path, name in names.items()}


class ClipEncoder(nnx.Module):
    """The transformer; a token sees itself and those before."""

    def __init__(self, config: ClipConfig, *, clip_skip: int = 0, rngs: nnx.Rngs) -> None:
        self.config, self.clip_skip = config, clip_skip
        table = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(table(rngs.params(), (config.vocabulary, config.width)))
        self.places = nnx.Param(table(rngs.params(), (config.places, config.width)))
        self.layers = stack(lambda rngs: _Layer(config, rngs), config.num_layers, rngs)
        self.norm = _norm(config, rngs)

    @jax.named_scope("text")
    def __call__(self, tokens: jax.Array, layout: Layout = Layout()) -> Embeddings:  # noqa: B008
        """Encodes.

        Args:
          tokens: int32 (B, M), ids; -1 is padding, after all others.
          layout: where activations lie on the mesh.

        Returns:
          float32 (B, M, width), of the layer that `clip_skip` says, normalised, and where tokens
          are; what is in padding means nothing.
        """
        states = self.states(tokens, layout)
        return Embeddings(states[0], tokens >= 0)

    def states(
        self,
        tokens: jax.Array,
        layout: Layout = Layout(),  # noqa: B008
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens as in a call, and the last layer's end token: float32 (B, width)."""
        config, length = self.config, tokens.shape[1]
        if length > config.places:
            raise UserError(f"Texts of {length} tokens do not fit CLIP's {config.places} places.")
        x = self.embedding[...][jnp.maximum(tokens, 0)].astype(jnp.float32)
        x = x + self.places[...][:length].astype(jnp.float32)
        graphdef, state = nnx.split(self.layers)

        def layer(x: jax.Array, params: dict) -> tuple[jax.Array, None]:
            params = layout.gather(params, jnp.dtype(config.dtype), keep=("tensor",))
            return layout.tokens(nnx.merge(graphdef, params)(x)), None

        x = layout.tokens(x[:, :, None, None])  # the text along time, where attention is causal
        params, cut = nnx.to_pure_dict(state), config.num_layers - self.clip_skip
        parts = [
            jax.tree.map(lambda p, at=at: p[at], params) for at in (slice(cut), slice(cut, None))
        ]
        x, _ = jax.lax.scan(layer, x, parts[0])
        last = x
        if self.clip_skip:
            last, _ = jax.lax.scan(layer, x, parts[1])
        ends = jnp.maximum((tokens >= 0).sum(1) - 1, 0)
        pooled = jnp.take_along_axis(last[:, :, 0, 0], ends[:, None, None], axis=1)[:, 0]
        return self.norm(x[:, :, 0, 0]), self.norm(pooled)


class _Layer(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, mlp, dtype = config.width, config.mlp_width, jnp.dtype(config.dtype)
        self.q, self.k, self.v = (linear(width, width, dtype, rngs) for _ in range(3))
        self.out = linear(width, width, dtype, rngs)
        self.up, self.down = linear(width, mlp, dtype, rngs), linear(mlp, width, dtype, rngs)
        self.norms = nnx.List([_norm(config, rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norms[0](x)
        x = x + self.out(
            window_attention(
                self.q(y),
                self.k(y),
                self.v(y),
                num_heads=self.config.num_heads,
                window=(0, 0, 0),
                causal=True,
                implementation="xla",  # few tokens, which the partitioner may divide as it likes
            )
        )
        inner = self.up(self.norms[1](x))
        return x + self.down(_ACTIVATIONS[self.config.activation](inner))


def _norm(config: ClipConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, dtype=jnp.float32, rngs=rngs)
