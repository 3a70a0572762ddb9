"""Parts of the transformer's layers: norms, embeddings of time and place, attention."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from walt_jax.kernels import ExtraKv, resolve_window
from walt_jax.kernels.window_attention import Window
from walt_jax.models.denoiser.packing import Packing, to_frame
from walt_jax.parallel import Layout, sharded_attention

_kernel_init = nnx.initializers.xavier_uniform()
_zeros = nnx.initializers.zeros
_TIME_SINUSOIDS = 128
_SUBLANES = 8  # rows of ones: a product of fewer would be a sum again


@jax.custom_vjp
def layer_norm(x: jax.Array) -> jax.Array:
    """Normalises the last axis without scale or bias, in float32; the result keeps x's dtype."""
    return _layer_norm(x)[0]


def _layer_norm(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + 1e-6)
    return ((y - mean) * scale).astype(x.dtype), (x, mean, scale)


def _layer_norm_gradient(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array]:
    """From x and its moments alone: autodiff would keep four arrays of x's size in float32."""
    x, mean, scale = saved
    y, dy = (x.astype(jnp.float32) - mean) * scale, dy.astype(jnp.float32)
    dx = dy - dy.mean(-1, keepdims=True) - y * (y * dy).mean(-1, keepdims=True)
    return ((scale * dx).astype(x.dtype),)


layer_norm.defvjp(_layer_norm, _layer_norm_gradient)


# Kept is what goes in, which is what the product before it gave.
gelu = jax.checkpoint(nnx.gelu, prevent_cse=False)


class Dense(nnx.Linear):
    """nnx.Linear whose kernel's gradient is written as it lies.

    Autodiff makes it turned around, and XLA's CPU backend pays for the transposition with a fifth
    of a training step.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., features_in) to (..., features) in the layer's dtype."""
        (y,) = self.parts(x, 1)
        return y

    def parts(self, x: jax.Array, number: int, first: int = 0) -> list[jax.Array]:
        """The features in equal parts, each a product of its own: to split them is a copy.

        Those before the `first` part are left out.
        """
        kernels, biases = (
            [None] * number if p is None else jnp.split(p[...].astype(self.dtype), number, axis=-1)
            for p in (self.kernel, self.bias)
        )
        x = x.astype(self.dtype)
        products = (_product(x, kernel) for kernel in kernels[first:])
        return [y if b is None else y + over(y, b) for y, b in zip(products, biases[first:])]


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _product_gradient(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    return dy @ kernel.T, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_gradient)


def over(x: jax.Array, vectors: jax.Array) -> jax.Array:
    """Vectors (D,), or (B, D) of each sample, repeated over x (B, ..., D).

    Their gradients, sums over all tokens, are products with ones: on TPUs sums of rows take twenty
    times as long.
    """
    return _repeat(vectors, x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat(vectors: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    places = (1,) * (len(shape) - vectors.ndim)
    return jnp.broadcast_to(vectors.reshape(*vectors.shape[:-1], *places, shape[-1]), shape)


@jax.jit
def uncounted_sum(dy: jax.Array) -> jax.Array:
    """(..., N, D) over N: (..., D) in float32. Model FLOPs leave these products out."""
    ones = jnp.ones((*dy.shape[:-2], _SUBLANES, dy.shape[-2]), dy.dtype)
    precision = jax.lax.Precision.HIGHEST if dy.dtype == jnp.float32 else None
    return jnp.matmul(ones, dy, precision=precision, preferred_element_type=jnp.float32)[..., 0, :]


def _sum(shape: tuple[int, ...], batch: int, dy: jax.Array) -> tuple[jax.Array]:
    dy = dy.reshape(*dy.shape[:batch], -1, dy.shape[-1])
    return (uncounted_sum(dy).astype(dy.dtype),)


_repeat.defvjp(lambda vectors, shape: (_repeat(vectors, shape), vectors.ndim - 1), _sum)


def linear(
    features_in: int, features: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, zero: bool = False
) -> Dense:
    """A Dense layer with bias; `zero` starts it at 0."""
    init = _zeros if zero else _kernel_init
    return Dense(features_in, features, kernel_init=init, dtype=dtype, rngs=rngs)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, which lie over the grid."""
    return x * (1 + scale) + shift


def sinusoids(values: jax.Array, features: int) -> jax.Array:
    """Cosines and sines of (...) values at falling frequencies: float32 (..., features)."""
    half = features // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / half)
    angles = values.astype(jnp.float32)[..., None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoids of the time through two Dense layers: (..., num_sinusoids) to (..., D)."""

    def __init__(self, width: int, num_sinusoids: int, rngs: nnx.Rngs) -> None:
        self.dense_in = linear(num_sinusoids, width, jnp.float32, rngs)
        self.dense_out = linear(width, width, jnp.float32, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense_out(nnx.silu(self.dense_in(x)))


class FrameTimes(nnx.Module):
    """Where a clip's frames lie in a long video: their distances, and whether it begins here."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.dense = linear(_TIME_SINUSOIDS, width, jnp.float32, rngs)
        self.first = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))

    def __call__(self, times: jax.Array) -> jax.Array:
        """Of frames (B, T): float32 (B, T, D)."""
        distances = times - times.min(axis=1, keepdims=True)
        # A causal tokenizer's first latent is one frame, all others are several.
        first = (times == 0)[..., None] * self.first[...]
        return self.dense(sinusoids(distances, _TIME_SINUSOIDS)) + first


class AxisEmbedding(nnx.Module):
    """Learned positions along one axis (NaViT, 2307.06304, section 2.1)."""

    def __init__(self, length: int, width: int, *, fractional: bool, rngs: nnx.Rngs) -> None:
        self.fractional = fractional
        self.table = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (length, width)))

    def __call__(self, places: jax.Array, extents: jax.Array) -> jax.Array:
        """Of places (..., L) in videos with so many places (...): float32 (..., L, D).

        Fractional ones read the table between its entries, at (place + 1/2) / extent of its length;
        a video of this length has the entries themselves.
        """
        table = self.table[...]
        if not self.fractional:
            return table[places]
        length = table.shape[0]
        at = (places + 0.5) / jnp.maximum(extents, 1)[..., None] * length - 0.5
        at = jnp.clip(at, 0.0, length - 1.0)
        low = jnp.floor(at).astype(jnp.int32)
        share = (at - low)[..., None]
        return (1 - share) * table[low] + share * table[jnp.minimum(low + 1, length - 1)]


class Affine(nnx.Module):
    """Layer norm with a learned scale and shift."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        del rngs
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = layer_norm(x)
        scale, shift = (over(y, param[...].astype(x.dtype)) for param in (self.scale, self.shift))
        return y * scale + shift


def of_image(window: Window) -> Window:
    """The window's part of one frame."""
    return (min(window[0], 1), *window[1:])


class RelativeBias(nnx.Module):
    """Swin's relative position bias: one value for each offset (dt, dh, dw) and head.

    The table is (2wt-1, 2wh-1, 2ww-1, heads); for a block no larger than the window the bias is
    (heads, L, L).
    """

    def __init__(self, window: Window, num_heads: int, rngs: nnx.Rngs) -> None:
        self.window = window
        shape = (*(2 * w - 1 for w in window), num_heads)
        self.table = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, shape))

    def __call__(self, block: Window) -> jax.Array:
        places = np.stack(np.meshgrid(*(np.arange(w) for w in block), indexing="ij"), -1)
        places = places.reshape(-1, 3)
        offsets = places[:, None] - places[None] + np.array(self.window) - 1
        bias_LLH = self.table[...][offsets[..., 0], offsets[..., 1], offsets[..., 2]]
        return bias_LLH.transpose(2, 0, 1)


class HeadNorm(nnx.Module):
    """Scales of the layer norm of each head's queries and keys, which heads share (2302.05442)."""

    def __init__(self, width: int, num_heads: int) -> None:
        self.q_scale = nnx.Param(jnp.ones((width // num_heads,), jnp.float32))
        self.k_scale = nnx.Param(jnp.ones((width // num_heads,), jnp.float32))

    def scales(self) -> tuple[jax.Array, jax.Array]:
        """Of queries and of keys, (head width,) each."""
        return self.q_scale[...], self.k_scale[...]


class Attention(nnx.Module):
    """Self-attention in windows: one for all heads, or several, each for its share of them."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        windows: Sequence[Window],
        grid: Window,
        *,
        causal: bool,
        image_identity: bool,
        relative_bias: bool,
        any_size: bool = False,
        qk_norm: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        implementation: str | None = None,
    ) -> None:
        self.implementation = implementation
        self.windows, self.causal = tuple(windows), causal
        self.image_identity = image_identity
        self.share = num_heads // len(self.windows)
        self.qkv = linear(width, 3 * width, dtype, rngs)
        self.out = linear(width, width, dtype, rngs)
        self.norm = HeadNorm(width, num_heads) if qk_norm else None
        # A window that spans an axis is as large as the clip.
        self.biased = [i for i, w in enumerate(self.windows) if not any_size or 0 not in w]
        blocks = [resolve_window(grid, self.windows[i]) for i in self.biased]
        self.biases = (
            nnx.List([RelativeBias(block, self.share, rngs) for block in blocks])
            if relative_bias
            else None
        )

    def __call__(
        self,
        x: jax.Array,
        layout: Layout = Layout(),  # noqa: B008
        *,
        image: bool = False,
        segment_ids: jax.Array | None = None,
        packing: Packing | None = None,
    ) -> jax.Array:
        """x (B, T, H, W, D); `image` where it is one frame of the grid that this was built for."""
        passes = [image and self.image_identity and window[0] != 1 for window in self.windows]
        if all(passes):
            return self.out(*self.qkv.parts(x, 3, first=2))
        count = len(self.windows)
        shares = [checkpoint_name(y, "qkv") for y in self.qkv.parts(x, 3 * count)]
        outs = []
        for i, window in enumerate(self.windows):
            qkv = shares[i::count]
            if passes[i]:
                outs.append(qkv[2])
                continue
            ids = segment_ids
            if packing is not None:
                ids = None if packing.holds(window) else to_frame(packing.window_ids(window))
                qkv = qkv if ids is None else [to_frame(y) for y in qkv]
                window = packing.native(window)
            window = of_image(window) if image else window
            bias = None
            if self.biases is not None and i in self.biased:
                bias = self.biases[self.biased.index(i)](resolve_window(x.shape[1:4], window))
            out = sharded_attention(
                layout.mesh,
                *qkv,
                num_heads=self.share,
                window=window,
                bias=bias,
                causal=self.causal,
                segment_ids=ids,
                qk_norm=self.norm and self.norm.scales(),
                implementation=self.implementation,
            )
            outs.append(out.reshape(*x.shape[:4], -1))
        return self.out(checkpoint_name(jnp.concatenate(outs, axis=-1), "attention"))


class CrossAttention(nnx.Module):
    """Attention to tokens outside of the grid, and to the queries of the window where asked.

    `zero` starts its output at 0, for a layer without a gate that does so.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: Window,
        *,
        queries: bool,
        causal: bool,
        zero: bool,
        qk_norm: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        implementation: str | None = None,
    ) -> None:
        self.implementation = implementation
        self.num_heads, self.window = num_heads, window
        self.queries, self.causal = queries, causal and queries
        self.q = linear(width, width, dtype, rngs)
        self.kv = linear(width, 2 * width, dtype, rngs)
        self.out = linear(width, width, dtype, rngs, zero=zero)
        self.norm = HeadNorm(width, num_heads) if qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        memory_BMD: jax.Array,
        mask_BM: jax.Array,
        layout: Layout = Layout(),  # noqa: B008
        *,
        image: bool = False,
        segment_ids: jax.Array | None = None,
        packing: Packing | None = None,
    ) -> jax.Array:
        """x (B, T, H, W, D) reads the memory where its mask is True; (B, M) or for each token."""
        keys = self.kv.parts(x, 2) if self.queries else (None, None)
        window = self.window
        if packing is not None:
            segment_ids = None if packing.holds(window) else packing.window_ids(window)
            window = packing.native(window)
        out = sharded_attention(
            layout.mesh,
            self.q(x),
            *keys,
            num_heads=self.num_heads,
            window=of_image(window) if image else window,
            causal=self.causal,
            segment_ids=segment_ids if self.queries else None,
            extra_kv=ExtraKv(*self.kv.parts(memory_BMD, 2), mask_BM),
            qk_norm=self.norm and self.norm.scales(),
            implementation=self.implementation,
        )
        return self.out(out)
