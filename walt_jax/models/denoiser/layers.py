"""Layers of the W.A.L.T transformer (2312.06662, section 3.2)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from walt_jax.kernels import window_attention
from walt_jax.kernels.window_attention import Window

_kernel_init = nnx.initializers.xavier_uniform()
_zeros = nnx.initializers.zeros


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Normalises the last axis without scale or bias, in float32; the result keeps x's dtype."""
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    y = (y - mean) * jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def linear(
    features_in: int, features: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, zero: bool = False
) -> nnx.Linear:
    """A Dense layer with bias; `zero` starts it at 0."""
    init = _zeros if zero else _kernel_init
    return nnx.Linear(features_in, features, kernel_init=init, dtype=dtype, rngs=rngs)


def over_grid(vectors_BD: jax.Array) -> jax.Array:
    """(B, D) to (B, 1, 1, 1, D)."""
    return vectors_BD[:, None, None, None, :]


def modulate(x: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, a vector a sample."""
    return x * (1 + over_grid(scale_BD)) + over_grid(shift_BD)


class TimeEmbedding(nnx.Module):
    """Sinusoids of the timestep through two Dense layers: (B,) to (B, D)."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, num_sinusoids: int = 256) -> None:
        self.num_sinusoids = num_sinusoids
        self.dense_in = linear(num_sinusoids, width, jnp.float32, rngs)
        self.dense_out = linear(width, width, jnp.float32, rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        half = self.num_sinusoids // 2
        frequencies = np.exp(-math.log(10_000) * np.arange(half) / half)
        angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.dense_out(nnx.silu(self.dense_in(x)))


class RelativeBias(nnx.Module):
    """Swin's relative position bias: one value for each offset (dt, dh, dw) and head.

    The table is (2wt-1, 2wh-1, 2ww-1, heads); calling it gives the bias (heads, L, L).
    """

    def __init__(self, window: Window, num_heads: int, rngs: nnx.Rngs) -> None:
        self.window = window
        shape = (*(2 * w - 1 for w in window), num_heads)
        self.table = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, shape))

    def __call__(self) -> jax.Array:
        places = np.stack(np.meshgrid(*(np.arange(w) for w in self.window), indexing="ij"), -1)
        places = places.reshape(-1, 3)
        offsets = places[:, None] - places[None] + np.array(self.window) - 1
        bias_LLH = self.table[...][offsets[..., 0], offsets[..., 1], offsets[..., 2]]
        return bias_LLH.transpose(2, 0, 1)


class Attention(nnx.Module):
    """Self-attention in windows with normalised queries and keys (ViT-22B, 2302.05442)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: Window,
        block: Window,
        *,
        relative_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads, self.window = num_heads, window
        self.qkv = linear(width, 3 * width, dtype, rngs)
        self.out = linear(width, width, dtype, rngs)
        self.q_scale = nnx.Param(jnp.ones((width // num_heads,), jnp.float32))
        self.k_scale = nnx.Param(jnp.ones((width // num_heads,), jnp.float32))
        self.bias = RelativeBias(block, num_heads, rngs) if relative_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, k = self._norm(q, self.q_scale[...]), self._norm(k, self.k_scale[...])
        bias = None if self.bias is None else self.bias()
        out = window_attention(q, k, v, num_heads=self.num_heads, window=self.window, bias=bias)
        return self.out(out)

    def _norm(self, x_BTHWD: jax.Array, scale_K: jax.Array) -> jax.Array:
        heads = x_BTHWD.reshape(*x_BTHWD.shape[:-1], self.num_heads, -1)
        return (layer_norm(heads) * scale_K.astype(x_BTHWD.dtype)).reshape(x_BTHWD.shape)


class Layer(nnx.Module):
    """Attention and MLP, each modulated and gated by AdaLN-LoRA (equation 3).

    The modulation is A_1 + W_b W_a (c + t): A_1 is computed once for all layers by the denoiser,
    the low-rank term is the layer's own.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        window: Window,
        block: Window,
        *,
        rank: int,
        relative_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.lora_a = nnx.Linear(width, rank, use_bias=False, rngs=rngs)
        self.lora_b = nnx.Linear(rank, 6 * width, use_bias=False, kernel_init=_zeros, rngs=rngs)
        self.attention = Attention(
            width, num_heads, window, block, relative_bias=relative_bias, dtype=dtype, rngs=rngs
        )
        self.up = linear(width, mlp_width, dtype, rngs)
        self.down = linear(mlp_width, width, dtype, rngs)

    def __call__(self, x: jax.Array, condition_BD: jax.Array, shared_BD: jax.Array) -> jax.Array:
        vectors = shared_BD + self.lora_b(self.lora_a(condition_BD)).astype(jnp.float32)
        vectors = jnp.split(vectors.astype(x.dtype), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        y = self.attention(modulate(layer_norm(x), shift1, scale1))
        x = x + over_grid(gate1) * y
        y = self.up(modulate(layer_norm(x), shift2, scale2))
        return x + over_grid(gate2) * self.down(nnx.gelu(y))
