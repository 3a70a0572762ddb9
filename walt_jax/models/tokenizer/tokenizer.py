"""The causal 3D encoder and decoder of MAGVIT-v2 (2310.05737, figure 7)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.models.tokenizer.layers import (
    AdaptiveGroupNorm,
    CausalConv,
    GroupNorm,
)
from walt_jax.models.tokenizer.quantizers import Identity, Quantizer
from walt_jax.models.tokenizer.whole import Whole
from walt_jax.parallel import Layout


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer; the defaults are W.A.L.T's (2312.06662, table 8).

    Attributes:
      channels: width of the first level.
      multipliers: width of each level, in `channels`; each level but the last halves the frame.
      num_res_blocks: residual blocks a level, or one number a level; the last number also counts
        the blocks between encoder and decoder.
      temporal_downsample: whether each level but the last also halves time.
      dimensions: 3, or 2 for a tokenizer of images, which takes each frame by itself (and whose
        `temporal_downsample` must be all False).
      latent_channels: channels of the latents.
      quantizer: what lies between encoder and decoder.
      norm_groups: groups of every GroupNorm.
      dtype: what the convolutions compute in; parameters and statistics are float32.
      remat: whether a residual block keeps only its input for the gradient and runs once more.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int | tuple[int, ...] = 4
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    dimensions: int = 3
    latent_channels: int = 8
    quantizer: Quantizer = Identity()
    norm_groups: int = 32
    dtype: str = "bfloat16"
    remat: bool = False

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.multipliers) - 1:
            raise UserError(
                f"config.task.model.temporal_downsample has {len(self.temporal_downsample)} "
                f"entries: it needs one less than the {len(self.multipliers)} multipliers."
            )
        if self.dimensions not in (2, 3) or (
            self.dimensions == 2 and any(self.temporal_downsample)
        ):
            raise UserError(
                f"config.task.model.dimensions={self.dimensions} with temporal_downsample="
                f"{self.temporal_downsample}: choose 3, or 2 with all of the latter False."
            )
        if len(self.blocks) != len(self.multipliers):
            raise UserError(
                f"config.task.model.num_res_blocks has {len(self.blocks)} entries: it needs one "
                f"a level, {len(self.multipliers)}."
            )
        if any(w % self.norm_groups for w in self.widths):
            raise UserError(
                f"config.task.model.norm_groups={self.norm_groups} does not divide the widths "
                f"{self.widths}."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level."""
        n = self.num_res_blocks
        return n if isinstance(n, tuple) else (n,) * len(self.multipliers)

    @property
    def taps(self) -> int:
        """Frames that a convolution of 3 x 3 pixels sees."""
        return 3 if self.dimensions == 3 else 1

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """(time, height, width) strides between the levels."""
        return tuple((2 if time else 1, 2, 2) for time in self.temporal_downsample)

    @property
    def factors(self) -> tuple[int, int, int]:
        """Total (time, height, width) downsampling."""
        return tuple(math.prod(s) for s in zip(*self.strides))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents of a video.

        Raises:
          UserError: the number of frames is not 1 + n x the temporal factor, or the size is no
            multiple of the spatial one; the sentence names the nearest that fits.
        """
        ft, fh, fw = self.factors
        if frames < 1 or (frames - 1) % ft:
            near = 1 + max(0, frames - 1) // ft * ft
            raise UserError(
                f"A video of {frames} frames does not fit the tokenizer: it takes 1 + {ft}n "
                f"frames, such as {near} or {near + ft}."
            )
        if height < 1 or width < 1 or height % fh or width % fw:
            near = f"{max(fh, height // fh * fh)}x{max(fw, width // fw * fw)}"
            raise UserError(
                f"Frames of {height}x{width} do not fit the tokenizer: height and width must be "
                f"multiples of {fh}, such as {near}."
            )
        return (frames - 1) // ft + 1, height // fh, width // fw, self.latent_channels


class ResBlock(nnx.Module):
    """Norm, swish, convolution, twice; a shortcut of one tap where the widths differ."""

    def __init__(
        self,
        features_in: int,
        features: int,
        groups: int,
        *,
        taps: int = 3,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = GroupNorm(features_in, groups)
        self.conv1 = CausalConv(features_in, features, (taps, 3, 3), **options)
        self.norm2 = GroupNorm(features, groups)
        self.conv2 = CausalConv(features, features, (taps, 3, 3), **options)
        self.shortcut = (
            None
            if features_in == features
            else CausalConv(features_in, features, (1, 1, 1), **options)
        )

    @jax.named_scope("res_block")
    def __call__(self, x: jax.Array, run: Whole) -> jax.Array:
        y = run.convolve(self.conv1, x, self.norm1)
        shortcut = x if self.shortcut is None else run.convolve(self.shortcut, x)
        return run.convolve(self.conv2, y, self.norm2, shortcut)


class Encoder(nnx.Module):
    """Pixels (B, T, H, W, 3) to what the quantizer takes, (B, t, h, w, c)."""

    def __init__(self, config: TokenizerConfig, rngs: nnx.Rngs) -> None:
        taps, groups = config.taps, config.norm_groups
        options = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        width = config.widths[0]
        self.conv_in = CausalConv(3, width, (taps, 3, 3), **options)
        stages: list[nnx.Module] = []
        for level, features in enumerate(config.widths):
            for _ in range(config.blocks[level]):
                stages.append(ResBlock(width, features, groups, taps=taps, **options))
                width = features
            if level < len(config.strides):
                size = (4 if config.dimensions == 3 else 1, 4, 4)
                strides = config.strides[level]
                down = CausalConv(width, width, size, strides=strides, use_bias=True, **options)
                stages.append(down)
        for _ in range(config.blocks[-1]):
            stages.append(ResBlock(width, width, groups, taps=taps, **options))
        self.stages = nnx.List(stages)
        self.norm_out = GroupNorm(width, groups)
        features = config.quantizer.encoder_channels(config.latent_channels)
        self.conv_out = CausalConv(width, features, (1, 1, 1), use_bias=True, **options)

    @jax.named_scope("encoder")
    def __call__(self, x: jax.Array, run: Whole) -> jax.Array:
        x = run.convolve(self.conv_in, x)
        for stage in self.stages:
            x = (run.block if isinstance(stage, ResBlock) else run.convolve)(stage, x)
        return run.convolve(self.conv_out, x, self.norm_out)


class Level(nnx.Module):
    """One level of the decoder: AdaGN by the latents, residual blocks, upsampling."""

    def __init__(
        self,
        config: TokenizerConfig,
        level: int,
        features_in: int,
        rngs: nnx.Rngs,
    ) -> None:
        taps, groups = config.taps, config.norm_groups
        options = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        features, width = config.widths[level], features_in
        self.norm = AdaptiveGroupNorm(config.latent_channels, width, groups, **options)
        blocks: list[nnx.Module] = []
        for _ in range(config.blocks[level]):
            blocks.append(ResBlock(width, features, groups, taps=taps, **options))
            width = features
        self.blocks = nnx.List(blocks)
        self.factors = config.strides[level - 1] if level else (1, 1, 1)
        self.features = width
        enlarged = math.prod(self.factors) * width
        self.upsample = (
            CausalConv(width, enlarged, (taps, 3, 3), use_bias=True, **options) if level else None
        )

    @jax.named_scope("level")
    def __call__(self, x: jax.Array, z: jax.Array, run: Whole) -> jax.Array:
        x = run.normalise(self.norm, x, z)
        for block in self.blocks:
            x = run.block(block, x)
        return (
            x
            if self.upsample is None
            else run.enlarge(run.convolve(self.upsample, x), self.factors)
        )


class Decoder(nnx.Module):
    """Latents (B, t, h, w, c) to pixels (B, T, H, W, 3)."""

    def __init__(self, config: TokenizerConfig, rngs: nnx.Rngs) -> None:
        taps, groups = config.taps, config.norm_groups
        options = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        width = config.widths[-1]
        self.conv_in = CausalConv(
            config.latent_channels, width, (taps, 3, 3), use_bias=True, **options
        )
        self.blocks = nnx.List(
            [ResBlock(width, width, groups, taps=taps, **options) for _ in range(config.blocks[-1])]
        )
        levels = []
        for level in reversed(range(len(config.widths))):
            levels.append(Level(config, level, width, rngs))
            width = levels[-1].features
        self.levels = nnx.List(levels)
        self.norm_out = GroupNorm(width, groups)
        self.conv_out = CausalConv(width, 3, (taps, 3, 3), use_bias=True, **options)

    @jax.named_scope("decoder")
    def __call__(self, z: jax.Array, run: Whole) -> jax.Array:
        x = run.convolve(self.conv_in, z)
        for block in self.blocks:
            x = run.block(block, x)
        for level in self.levels:
            x = level(x, z, run)
        return run.convolve(self.conv_out, x, self.norm_out)


class Tokenizer(nnx.Module):
    """Encoder, quantizer and decoder; an image is a video of one frame."""

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)

    def features(self, x: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """What the encoder says, before the quantizer.

        Args:
          x: (B, 1 + 4n, H, W, 3) in [-1, 1], H and W multiples of 8 (with the default strides).
          layout: where activations lie on the mesh.

        Returns:
          float32 (B, 1 + n, H / 8, W / 8, quantizer.encoder_channels(latent_channels)).

        Raises:
          UserError: a number of frames or a size that does not fit.
        """
        self.config.latent_shape(*x.shape[1:4])
        return self.encoder(layout.pixels(x), self._run(layout)).astype(jnp.float32)

    def encode(self, x: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """As `features`, quantised: float32 (..., latent_channels), not normalised."""
        return self.config.quantizer(self.features(x, layout))

    def decode(self, z: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Latents (B, 1 + n, h, w, latent_channels) to float32 pixels, about [-1, 1]."""
        return self.decoder(layout.pixels(z), self._run(layout)).astype(jnp.float32)

    def _run(self, layout: Layout) -> Whole:
        return Whole(layout, remat=self.config.remat)
