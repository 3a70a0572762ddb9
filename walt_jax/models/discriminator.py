"""The 3D discriminator of MAGVIT-v2 (2310.05737, figure 7): a StyleGAN-like one with blur pooling.

Where the figure and the authors' public code differ, the code wins; see `order`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.models.tokenizer.layers import convolve
from walt_jax.parallel import Layout


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of a discriminator; the defaults are MAGVIT-v2's for 17 frames of 128x128, 61.3M.

    Attributes:
      channels: width before the first block.
      multipliers: width after each block, in `channels`; each block halves frames and pixels.
      clip: frames, height and width of the clips, which the dense layer needs to know; one frame
        makes it a discriminator of images.
      order: of a block's two convolutions: the authors' code keeps the width, pools, then widens;
        their figure widens, pools, then keeps the width (68.0M).
      dtype: what the convolutions compute in; parameters and logits are float32.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (2, 4, 4, 4, 4)
    clip: tuple[int, int, int] = (17, 128, 128)
    order: Literal["code", "figure"] = "code"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.clip) < 1:
            raise UserError(
                f"The discriminator's clip={self.clip} must be positive: give frames, height and "
                "width of the clips it sees."
            )
        if not self.multipliers:
            raise UserError("The discriminator's multipliers are empty: give one a block.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each block."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def grid(self) -> tuple[int, ...]:
        """Frames, height and width after the last block; each block halves them, rounding up."""
        return tuple(-(-n // 2 ** len(self.multipliers)) for n in self.clip)


class Conv(nnx.Module):
    """A convolution of stride 1 that sees both ways in time; zeros around it keep the size."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int = 3,
        *,
        use_bias: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.size, self.dtype = size, dtype
        shape = (size, size, size, features_in, features_out)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        around = (self.size // 2, self.size // 2)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), around, around, around, (0, 0)))
        y = convolve(x, self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def blur_pool(x: jax.Array) -> jax.Array:
    """Blurs (B, T, H, W, C) by [1, 2, 1] / 4 along T, H and W and keeps every second of each.

    Zeros are padded as TensorFlow's SAME does: an axis of n becomes ceil(n / 2), with one zero on
    either side where n is odd and one after the end where n is even. But an axis of 1, such as an
    image's T, stays as it is: nothing lies beside it, and a blur would only halve it. Sums of
    slices, an axis at a time: XLA's depthwise convolution is 3 times slower on a TPU by the
    compiler's estimate, and over 100 times slower on a CPU.
    """
    for axis in (1, 2, 3):
        n = x.shape[axis]
        if n == 1:
            continue
        half = -(-n // 2)
        total = 2 * half + 1 - n
        widths = [(0, 0)] * x.ndim
        widths[axis] = (total // 2, total - total // 2)
        x = jnp.pad(x, widths)
        left, middle, right = (
            jax.lax.slice_in_dim(x, i, i + 2 * half - 1, 2, axis) for i in range(3)
        )
        x = 0.25 * (left + right) + 0.5 * middle
    return x


def _activate(x: jax.Array) -> jax.Array:
    return nnx.leaky_relu(x, 0.2)


class ResBlockDown(nnx.Module):
    """Two convolutions with a blur pool between them, and a shortcut of a blur pool and a 1x1x1."""

    def __init__(
        self,
        features_in: int,
        features: int,
        order: Literal["code", "figure"],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"dtype": dtype, "rngs": rngs}
        between = features_in if order == "code" else features
        self.conv1 = Conv(features_in, between, **options)
        self.conv2 = Conv(between, features, **options)
        self.shortcut = Conv(features_in, features, 1, use_bias=False, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = blur_pool(_activate(self.conv1(x)))
        y = _activate(self.conv2(y))
        return (y + self.shortcut(blur_pool(x))) * 0.5**0.5


class Discriminator(nnx.Module):
    """Clips to logits, positive for real; nothing is normalised, so that no clip sees another."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        options = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        width = config.channels
        self.conv_in = Conv(3, width, **options)
        blocks = []
        for features in config.widths:
            blocks.append(ResBlockDown(width, features, config.order, **options))
            width = features
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv(width, width, **options)
        t, h, w = config.grid
        self.dense = nnx.Linear(t * h * w * width, width, **options)
        # In float32: bfloat16 keeps 3 digits of a logit, and LeCAM compares logits.
        self.logit = nnx.Linear(width, 1, dtype=jnp.float32, rngs=rngs)

    @jax.named_scope("discriminator")
    def __call__(self, x: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Logits of clips.

        Args:
          x: (B, T, H, W, 3) in about [-1, 1], of the config's clip.
          layout: where activations lie on the mesh.

        Returns:
          float32 (B,).

        Raises:
          UserError: clips of another size.
        """
        expected = (*self.config.clip, 3)
        if x.shape[1:] != expected:
            raise UserError(
                f"Clips of {x.shape[1:]} frames, height, width and channels do not fit the "
                f"discriminator, made for {expected}: set its clip to the data's."
            )
        x = layout.pixels(_activate(self.conv_in(layout.pixels(x))))
        for block in self.blocks:
            x = layout.pixels(block(x))
        x = _activate(self.conv_out(x))
        x = layout.pixels(x.reshape(x.shape[0], -1))
        x = _activate(self.dense(x))
        return self.logit(x.astype(jnp.float32))[:, 0]
