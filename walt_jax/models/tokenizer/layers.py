"""Layers of the MAGVIT-v2 tokenizer (2310.05737, section 3.2 and figure 7).

All take and give (B, T, H, W, C) and are causal in time: frame t of the output depends on frames
0..t of the input only.
"""

import jax
import jax.numpy as jnp
from flax import nnx

Triple = tuple[int, int, int]


class CausalConv(nnx.Module):
    """A causal convolution with edge padding: time by (k - 1, 0), space by ((k-1)//2, k//2).

    The taps in time are laid side by side as channels and contracted by one 2-D convolution. The
    result is that of a 3-D convolution; XLA's 3-D convolutions of these sizes are 3 to 5 times
    slower on a CPU and, by the TPU compiler's estimate, 1.4 times slower on v5e.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        kernel_size: Triple = (3, 3, 3),
        *,
        strides: Triple = (1, 1, 1),
        use_bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.strides, self.dtype = strides, dtype
        shape = (*kernel_size, features_in, features_out)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        kt, kh, kw, c, features = kernel.shape
        time_stride, stride, _ = self.strides
        space = [((k - 1) // 2, k // 2) for k in (kh, kw)]
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (kt - 1, 0), *space, (0, 0)), mode="edge")
        frames = (x.shape[1] - kt) // time_stride + 1
        taps = [x[:, i : i + time_stride * (frames - 1) + 1 : time_stride] for i in range(kt)]
        x = jnp.concatenate(taps, axis=-1)
        b, t, h, w, _ = x.shape
        y = _convolve(
            x.reshape(b * t, h, w, kt * c),
            kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, kt * c, features),
            stride,
        )
        y = y.reshape(b, t, *y.shape[1:])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 2-D convolution without padding: (N, H, W, C), (kh, kw, C, F) -> (N, H', W', F).

    Where the stride divides the kernel, pixels are first folded into channels: the same sums, by a
    dense convolution of stride 1 with a kernel of a `stride`-th of the size.
    """
    if stride > 1:
        x, kernel = _fold_stride(x, kernel, stride)

    def plain(x: jax.Array, kernel: jax.Array, before: int = 0) -> jax.Array:
        padding = [(before, 0), (before, 0)]
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=names)

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # XLA's CPU convolutions are 3 to 5 times slower without padding than with it, so one row
        # and one column too many are computed and dropped.
        return plain(x, kernel, before=1)[:, 1:, 1:]

    if kernel.shape[:2] == (1, 1):
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


def _fold_stride(x: jax.Array, kernel: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    (n, h, w, c), (kh, kw, _, features) = x.shape, kernel.shape
    h, w = ((size - k) // s * s + k for size, k in ((h, kh), (w, kw)))  # what the taps reach
    x = x[:, :h, :w].reshape(n, h // s, s, w // s, s, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = kernel.reshape(kh // s, s, kw // s, s, c, features).transpose(0, 2, 1, 3, 4, 5)
    return (
        x.reshape(n, h // s, w // s, s * s * c),
        kernel.reshape(kh // s, kw // s, s * s * c, features),
    )


def normalise_groups(x: jax.Array, groups: int, eps: float = 1e-6) -> jax.Array:
    """Group statistics of each frame alone, in float32: over (H, W, channels of a group).

    Statistics over time would let a frame see later ones.
    """
    c = x.shape[-1]
    y = x.astype(jnp.float32)

    def group_mean(per_pixel: jax.Array) -> jax.Array:
        means = per_pixel.mean(axis=(2, 3)).reshape(*x.shape[:2], groups, c // groups)
        return jnp.repeat(means.mean(-1), c // groups, axis=-1)[:, :, None, None]

    y = y - group_mean(y)
    return y * jax.lax.rsqrt(group_mean(jnp.square(y)) + eps)


class GroupNorm(nnx.Module):
    """Per-frame group normalisation with a learned scale and bias."""

    def __init__(self, features: int, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = normalise_groups(x, self.groups) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class AdaptiveGroupNorm(nnx.Module):
    """Group normalisation whose scale and bias are read from the latents (section 3.2).

    The latents are repeated to the grid of x, the first frame's copies trimmed as in upsampling.
    """

    def __init__(
        self, latent_channels: int, features: int, groups: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.groups = groups
        self.gamma = nnx.Linear(latent_channels, features, dtype=dtype, rngs=rngs)
        self.beta = nnx.Linear(latent_channels, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        gamma, beta = self.gamma(z), self.beta(z)
        gamma, beta = (repeat_to(y, x.shape[1:4]).astype(jnp.float32) for y in (gamma, beta))
        return (normalise_groups(x, self.groups) * (1.0 + gamma) + beta).astype(x.dtype)


def repeat_to(z: jax.Array, grid: Triple) -> jax.Array:
    """Nearest-neighbour enlargement of (B, T, H, W, C) to a grid of 1 + n (T - 1) frames."""
    (t, h, w), frames = grid, z.shape[1]
    if frames > 1:
        factor = (t - 1) // (frames - 1)
        z = jnp.repeat(z, factor, axis=1)[:, factor - 1 :]
    z = jnp.repeat(z, h // z.shape[2], axis=2)
    return jnp.repeat(z, w // z.shape[3], axis=3)


def depth_to_space(x: jax.Array, factors: Triple) -> jax.Array:
    """Channels (ft, fh, fw, C) become frames and pixels; the first ft - 1 frames are dropped."""
    b, t, h, w, c = x.shape
    ft, fh, fw = factors
    c //= ft * fh * fw
    x = x.reshape(b, t, h, w, ft, fh, fw, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, t * ft, h * fh, w * fw, c)[:, ft - 1 :]


class ResBlock(nnx.Module):
    """Norm, swish, convolution, twice; a 1x1x1 shortcut where the widths differ."""

    def __init__(
        self, features_in: int, features: int, groups: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = GroupNorm(features_in, groups)
        self.conv1 = CausalConv(features_in, features, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(features, groups)
        self.conv2 = CausalConv(features, features, dtype=dtype, rngs=rngs)
        self.shortcut = (
            None
            if features_in == features
            else CausalConv(features_in, features, (1, 1, 1), dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.swish(self.norm1(x)))
        y = self.conv2(nnx.swish(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))
