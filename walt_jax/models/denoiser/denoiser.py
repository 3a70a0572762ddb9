"""The W.A.L.T denoiser: alternating window layers with AdaLN-LoRA (2312.06662, section 3.2)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.kernels import resolve_window
from walt_jax.kernels.window_attention import Window
from walt_jax.models.build import stack
from walt_jax.models.denoiser.layers import Layer, TimeEmbedding, layer_norm, linear, modulate
from walt_jax.parallel import Layout


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of a denoiser; the defaults are W.A.L.T-L on UCF-101 (table 8, 24/1024/16).

    Attributes:
      grid: (T, H, W) of the latents.
      latent_channels: channels of the latents.
      patch_size: (pt, ph, pw) of the patches that become tokens.
      width: of the transformer; num_heads: heads, dividing it; mlp_ratio: MLP width / width.
      num_layers: attention layers, a multiple of the number of windows.
      windows: the attention windows in token units, repeated over the layers; 0 = whole axis.
      adaln_rank: rank r of each layer's own modulation.
      num_classes: classes, 0 for none; one more entry, the last, stands for no class.
      relative_bias: Swin's relative position bias in every layer and head.
      remat: recompute each group of layers in the backward pass.
      dtype: what matrices compute in; parameters, softmax and statistics are float32.
    """

    grid: tuple[int, int, int] = (5, 16, 16)
    latent_channels: int = 8
    patch_size: tuple[int, int, int] = (1, 1, 1)
    width: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_layers: int = 24
    windows: tuple[tuple[int, int, int], ...] = ((1, 0, 0), (0, 8, 8))
    adaln_rank: int = 2
    num_classes: int = 0
    relative_bias: bool = True
    remat: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.num_layers % len(self.windows):
            raise UserError(
                f"config.task.model.num_layers={self.num_layers} must be a multiple of the "
                f"{len(self.windows)} windows that take turns."
            )
        if self.width % self.num_heads:
            raise UserError(
                f"config.task.model.width={self.width} must be a multiple of "
                f"num_heads={self.num_heads}."
            )
        if any(g % p for g, p in zip(self.grid, self.patch_size)):
            raise UserError(
                f"config.task.model.grid {self.grid} is no multiple of patch_size "
                f"{self.patch_size}."
            )
        for window in self.windows:
            resolve_window(self.tokens, window)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """(T, H, W) of the tokens."""
        t, h, w = (g // p for g, p in zip(self.grid, self.patch_size))
        return t, h, w


class Group(nnx.Module):
    """One layer of each window; the denoiser scans over such groups."""

    def __init__(self, config: DenoiserConfig, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(
            [
                Layer(
                    config.width,
                    config.num_heads,
                    int(config.width * config.mlp_ratio),
                    window,
                    resolve_window(config.tokens, window),
                    rank=config.adaln_rank,
                    relative_bias=config.relative_bias,
                    dtype=jnp.dtype(config.dtype),
                    rngs=rngs,
                )
                for window in config.windows
            ]
        )

    def __call__(
        self, x: jax.Array, condition_BD: jax.Array, shared_BD: jax.Array, layout: Layout
    ) -> jax.Array:
        for layer in self.layers:
            x = layout.tokens(layer(x, condition_BD, shared_BD))
        return x


class Denoiser(nnx.Module):
    """Predicts the diffusion target (v by default) from noisy latents, time and class."""

    def __init__(self, config: DenoiserConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        patch = _volume(config.patch_size) * config.latent_channels
        t, h, w = config.tokens
        table = nnx.initializers.normal(0.02)
        self.patch_in = linear(patch, width, dtype, rngs)
        self.spatial_embedding = nnx.Param(table(rngs.params(), (h * w, width)))
        self.temporal_embedding = nnx.Param(table(rngs.params(), (t, width)))
        self.time = TimeEmbedding(width, rngs)
        self.class_embedding = (
            # As large as the time embedding that it is added to, so that classes differ from the
            # first step on.
            nnx.Param(jax.random.normal(rngs.params(), (config.num_classes + 1, width)))
            if config.num_classes
            else None
        )
        self.adaln = linear(width, 6 * width, jnp.float32, rngs, zero=True)
        self.groups = stack(
            lambda r: Group(config, r), config.num_layers // len(config.windows), rngs
        )
        self.adaln_out = linear(width, 2 * width, jnp.float32, rngs, zero=True)
        self.patch_out = linear(width, patch, jnp.float32, rngs, zero=True)

    @property
    def null_class(self) -> int:
        """The class index that stands for no class."""
        return self.config.num_classes

    def __call__(
        self,
        z: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
        layout: Layout = Layout(),  # noqa: B008
    ) -> jax.Array:
        """One evaluation of the network.

        Args:
          z: noisy latents (B, T, H, W, latent_channels) on the config's grid.
          t: timesteps (B,), 0 (clean) to the schedule's length - 1 (noise).
          label: int32 (B,), class indices, `null_class` for none; None without classes.
          layout: where activations lie on the mesh.

        Returns:
          float32 (B, T, H, W, latent_channels).

        Raises:
          UserError: latents of another shape, or labels given to a model without classes.
        """
        config = self.config
        expected = (*config.grid, config.latent_channels)
        if z.shape[1:] != expected:
            raise UserError(
                f"Latents of shape {z.shape[1:]} do not fit this denoiser, which was built for "
                f"{expected}."
            )
        if (label is None) != (self.class_embedding is None):
            raise UserError(
                f"This denoiser has {config.num_classes} classes, but labels were "
                f"{'not given' if label is None else 'given'}."
            )
        condition = self.time(t)
        if label is not None:
            condition = condition + self.class_embedding[...][label]
        _, tokens_h, tokens_w = config.tokens
        x = self.patch_in(_patchify(z, config.patch_size))
        places = self.spatial_embedding[...].reshape(1, tokens_h, tokens_w, -1)
        x = x + (places + self.temporal_embedding[...][:, None, None, :]).astype(x.dtype)
        x = layout.tokens(x)
        x = self._layers(x, condition, self.adaln(nnx.silu(condition)), layout)
        shift, scale = jnp.split(self.adaln_out(nnx.silu(condition)), 2, axis=-1)
        x = modulate(layer_norm(x.astype(jnp.float32)), shift, scale)
        return _unpatchify(self.patch_out(x), config.patch_size)

    def _layers(
        self, x: jax.Array, condition: jax.Array, shared: jax.Array, layout: Layout
    ) -> jax.Array:
        graphdef, state = nnx.split(self.groups)
        dtype = jnp.dtype(self.config.dtype)

        def group(x: jax.Array, params: dict) -> tuple[jax.Array, None]:
            module = nnx.merge(graphdef, layout.gather(params, dtype, keep=("tensor",)))
            return module(x, condition, shared, layout), None

        if self.config.remat:
            group = jax.checkpoint(group)
        x, _ = jax.lax.scan(group, x, nnx.to_pure_dict(state))
        return x


def _volume(size: Window) -> int:
    return size[0] * size[1] * size[2]


def _patchify(x: jax.Array, patch: Window) -> jax.Array:
    b, t, h, w, c = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, t // pt, h // ph, w // pw, -1)


def _unpatchify(x: jax.Array, patch: Window) -> jax.Array:
    b, t, h, w, d = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, t, h, w, pt, ph, pw, d // _volume(patch)).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, t * pt, h * ph, w * pw, -1)
