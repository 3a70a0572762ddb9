"""Layers of the MAGVIT-v2 tokenizer (2310.05737, section 3.2 and figure 7).

All take and give (B, T, H, W, C) and are causal in time: frame t of the output depends on frames
0..t of the input only.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from walt_jax.kernels.channel_moments import channel_moments

Triple = tuple[int, int, int]
EPSILON = 1e-6  # added to variances
_LANES = 128  # of a TPU: fewer channels than that are padded to them


class CausalConv(nnx.Module):
    """A causal convolution with edge padding: time by (k - 1, 0), space by ((k-1)//2, k//2)."""

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
        return self.valid(self.pad_space(self.pad_time(x)))

    def pad_time(self, x: jax.Array) -> jax.Array:
        """Repeats the first frame k - 1 times before the video."""
        return _edges(x, 1, self.kernel.shape[0] - 1, 0)

    def pad_space(self, x: jax.Array) -> jax.Array:
        """Repeats the outermost pixels of each frame."""
        for axis in (2, 3):
            k = self.kernel.shape[axis - 1]
            x = _edges(x, axis, (k - 1) // 2, k // 2)
        return x

    def valid(self, x: jax.Array) -> jax.Array:
        """Convolves what is padded already."""
        return self.add_bias(
            convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.strides)
        )

    def add_bias(self, y: jax.Array) -> jax.Array:
        """`y`, or `y + bias` where the convolution has one."""
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _edges(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths, mode="edge") if before or after else x


def convolve(x: jax.Array, kernel: jax.Array, strides: Triple = (1, 1, 1)) -> jax.Array:
    """A 3-D convolution without padding.

    The result is that of XLA's 3-D convolution, by 2-D ones, which are faster: on CPUs 3 to 5
    times, by the TPU compiler's estimate 1.4 times forward and 5 times backward. On TPUs a few
    channels, such as colours, are contracted with all taps at once, which takes a third of that, or
    with those in time and within a stride.

    Args:
      x: (B, T, H, W, C), of the kernel's dtype.
      kernel: (kt, kh, kw, C, F).
      strides: of time, height and width; the last two must be equal.
    """
    kt = kernel.shape[0]
    time_stride, stride, _ = strides
    if strides == (1, 1, 1) and math.prod(kernel.shape[:4]) <= _LANES:
        on_tpu = _all_at_once
    elif stride > 1 and kt * stride**2 * kernel.shape[3] <= _LANES:
        on_tpu = _side_by_side(stride, _folded)
    else:
        on_tpu = _one_by_one(stride)
    frames = (x.shape[1] - kt) // time_stride + 1
    taps = [x[:, i : i + time_stride * (frames - 1) + 1 : time_stride] for i in range(kt)]
    return jax.lax.platform_dependent(
        tuple(taps),
        kernel,
        cpu=_side_by_side(stride, _on_cpu),
        tpu=on_tpu,
        default=_side_by_side(stride, _plain),
    )


Convolution = Callable[[jax.Array, jax.Array, int], jax.Array]
OfTaps = Callable[[tuple[jax.Array, ...], jax.Array], jax.Array]


def _side_by_side(stride: int, convolution: Convolution) -> OfTaps:
    """The taps in time are laid side by side as channels and contracted by one convolution."""

    def run(taps: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
        kt, kh, kw, c, features = kernel.shape
        kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, kt * c, features)
        return _over_frames(convolution, jnp.concatenate(taps, axis=-1), kernel, stride)

    return run


def _one_by_one(stride: int) -> OfTaps:
    """A convolution for each tap in time, summed in float32."""

    def run(taps: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
        convolution = functools.partial(_plain, result=jnp.float32)
        parts = (_over_frames(convolution, x, k, stride) for x, k in zip(taps, kernel))
        return functools.reduce(jnp.add, parts).astype(kernel.dtype)

    return run


def _all_at_once(taps: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
    """The taps in time, rows and columns are laid side by side as channels: one product."""
    _, kh, kw, _, features = kernel.shape
    height, width = taps[0].shape[2] - kh + 1, taps[0].shape[3] - kw + 1
    moved = [
        x[:, :, i : i + height, j : j + width] for x in taps for i in range(kh) for j in range(kw)
    ]
    return jnp.concatenate(moved, axis=-1) @ kernel.reshape(-1, features)


def _over_frames(
    convolution: Convolution, x: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
    b, t = x.shape[:2]
    y = convolution(x.reshape(b * t, *x.shape[2:]), kernel, stride)
    return y.reshape(b, t, *y.shape[1:])


def _plain(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    before: int = 0,
    result: jnp.dtype | None = None,
) -> jax.Array:
    """A 2-D convolution: (N, H, W, C), (kh, kw, C, F) -> (N, H', W', F)."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(before, 0), (before, 0)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=result,
    )


def _on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """As `_plain`, by a dense convolution where the stride divides the kernel.

    Pixels are folded into channels: the same sums, of stride 1 and a `stride`-th of the size. XLA's
    CPU convolutions are 3 to 5 times slower without padding than with it, so one row and one
    column too many are computed and dropped.
    """
    if stride > 1:
        x, kernel = _fold_stride(x, kernel, stride)
    if kernel.shape[:2] == (1, 1):
        return _plain(x, kernel, 1)
    return _plain(x, kernel, 1, before=1)[:, 1:, 1:]


def _folded(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """As `_plain`, with pixels folded into channels: the same sums, of stride 1."""
    return _plain(*_fold_stride(x, kernel, stride), 1)


def _fold_stride(x: jax.Array, kernel: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    (n, h, w, c), (kh, kw, _, features) = x.shape, kernel.shape
    h, w = ((size - k) // s * s + k for size, k in ((h, kh), (w, kw)))  # what the taps reach
    x = x[:, :h, :w].reshape(n, h // s, s, w // s, s, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = kernel.reshape(kh // s, s, kw // s, s, c, features).transpose(0, 2, 1, 3, 4, 5)
    return (
        x.reshape(n, h // s, w // s, s * s * c),
        kernel.reshape(kh // s, kw // s, s * s * c, features),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and mean square deviation of each frame's groups, float32 (B, T, groups)."""

    mean: jax.Array
    variance: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def group_statistics(x: jax.Array, groups: int, fused: bool = False) -> Statistics:
    """Statistics of each frame alone, over (H, W, channels of a group), in float32.

    Statistics over time would let a frame see later ones. Only x and the means are kept for the
    gradient; otherwise float32 copies of x would be. `fused` reads x once, by a Pallas kernel.
    """
    if fused:
        means, variances = (m.reshape(*m.shape[:2], groups, -1) for m in channel_moments(x))
        return Statistics(means.mean(-1), variances.mean(-1) + means.var(-1))
    y = x.astype(jnp.float32)
    mean = _group_mean(y, groups)
    return Statistics(mean, _group_mean(jnp.square(y - _by_channel(mean, x)), groups))


def _keep_means(
    x: jax.Array, groups: int, fused: bool
) -> tuple[Statistics, tuple[jax.Array, jax.Array]]:
    s = group_statistics(x, groups, fused)
    return s, (x, s.mean)


def _pull_statistics(
    groups: int, fused: bool, kept: tuple[jax.Array, jax.Array], ds: Statistics
) -> tuple[jax.Array]:
    x, mean = kept
    deviation = x.astype(jnp.float32) - _by_channel(mean, x)
    dx = _by_channel(ds.mean, x) + 2.0 * _by_channel(ds.variance, x) * deviation
    return ((dx * (groups / (x.shape[2] * x.shape[3] * x.shape[4]))).astype(x.dtype),)


group_statistics.defvjp(_keep_means, _pull_statistics)


def normalise_groups(x: jax.Array, groups: int, statistics: Statistics | None = None) -> jax.Array:
    """Zero mean and unit variance a group of each frame; float32.

    Args:
      x: (B, T, H, W, C).
      groups: number of groups of channels.
      statistics: of the whole frame where x is a part of it; default: of x.
    """
    s = statistics or group_statistics(x, groups)
    y = x.astype(jnp.float32) - _by_channel(s.mean, x)
    return y * _by_channel(jax.lax.rsqrt(s.variance + EPSILON), x)


def _group_mean(per_pixel: jax.Array, groups: int) -> jax.Array:
    means = per_pixel.mean(axis=(2, 3))
    return means.reshape(*means.shape[:2], groups, -1).mean(-1)


def _by_channel(per_group: jax.Array, x: jax.Array) -> jax.Array:
    channels = jnp.repeat(per_group, x.shape[-1] // per_group.shape[-1], axis=-1)
    return channels[:, :, None, None]


class GroupNorm(nnx.Module):
    """Per-frame group normalisation with a learned scale and bias."""

    def __init__(self, features: int, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: jax.Array, statistics: Statistics | None = None) -> jax.Array:
        y = normalise_groups(x, self.groups, statistics)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)

    def affine(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(scale, offset), float32 (B, T, C), of the norm as `scale * x + offset`; on TPUs."""
        s = group_statistics(x, self.groups, fused=True)
        repeats = x.shape[-1] // self.groups
        scale = jnp.repeat(jax.lax.rsqrt(s.variance + EPSILON), repeats, axis=-1) * self.scale[...]
        return scale, self.bias[...] - jnp.repeat(s.mean, repeats, axis=-1) * scale


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

    def __call__(
        self,
        x: jax.Array,
        z: jax.Array,
        statistics: Statistics | None = None,
        first: bool = True,
    ) -> jax.Array:
        gamma, beta = (
            repeat_to(y, x.shape[1:4], first).astype(jnp.float32)
            for y in (self.gamma(z), self.beta(z))
        )
        y = normalise_groups(x, self.groups, statistics)
        return (y * (1.0 + gamma) + beta).astype(x.dtype)


def repeat_to(z: jax.Array, grid: Triple, first: bool = True) -> jax.Array:
    """Nearest-neighbour enlargement of (B, t, h, w, C) to a grid.

    Args:
      z: latents.
      grid: frames, height and width; 1 + n (t - 1) frames where the video's first is among them,
        n t where not.
      first: whether it is.
    """
    frames, height, width = grid
    if first and z.shape[1] > 1:
        factor = (frames - 1) // (z.shape[1] - 1)
        z = jnp.repeat(z, factor, axis=1)[:, factor - 1 :]
    elif not first:
        z = jnp.repeat(z, frames // z.shape[1], axis=1)
    z = jnp.repeat(z, height // z.shape[2], axis=2)
    return jnp.repeat(z, width // z.shape[3], axis=3)


def depth_to_space(x: jax.Array, factors: Triple, first: bool = True) -> jax.Array:
    """Channels (ft, fh, fw, C) become frames and pixels.

    Where the video's first frame is among x's, the first ft - 1 frames are dropped.
    """
    b, t, h, w, c = x.shape
    ft, fh, fw = factors
    c //= ft * fh * fw
    x = x.reshape(b, t, h, w, ft, fh, fw, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, t * ft, h * fh, w * fw, c)[:, ft - 1 if first else 0 :]
