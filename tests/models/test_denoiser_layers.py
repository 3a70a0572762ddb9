"""Gradients written by hand are those of autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from walt_jax.models import Network
from walt_jax.models.denoiser.layers import gelu, layer_norm, linear, over


def _value_and_gradients(function, *arguments):
    weights = jax.random.normal(jax.random.key(9), jax.eval_shape(function, *arguments).shape)

    def loss(*a):
        return (function(*a).astype(jnp.float32) * weights).sum()

    return jax.value_and_grad(loss, tuple(range(len(arguments))))(*arguments)


def _autodiff_norm(x):
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_layer_norm(dtype, tolerance):
    x = (3 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 24))).astype(dtype)
    ours, theirs = (_value_and_gradients(f, x) for f in (layer_norm, _autodiff_norm))
    assert ours[1][0].dtype == x.dtype
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), atol=tolerance * scale)


def test_dense_and_gelu():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    network = Network.of(lambda rngs: linear(8, 12, jnp.float32, rngs))
    kernel, bias = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 12), (12,)]))

    def ours(x, kernel, bias):
        return gelu(network.bind({"kernel": kernel, "bias": bias})(x))

    def plain(x, kernel, bias):
        return nnx.gelu(jnp.einsum("abci,io->abco", x, kernel) + bias)

    results = [_value_and_gradients(f, x, kernel, bias) for f in (ours, plain)]
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_dense_layer_computes_in_its_own_dtype():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    dense = linear(8, 4, jnp.bfloat16, nnx.Rngs(1))
    assert dense(x).dtype == jnp.bfloat16
    gradient = jax.grad(lambda x: dense(x).astype(jnp.float32).sum())(x)
    assert gradient.dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shape", [(24,), (2, 24)])
def test_repeated_vectors(shape, dtype, tolerance):
    x = jnp.zeros((2, 3, 5, 4, 24), dtype)
    vectors = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    places = (slice(None),) * (len(shape) - 1) + (None,) * (5 - len(shape))
    found = _value_and_gradients(lambda v: over(x, v), vectors)
    wanted = _value_and_gradients(
        lambda v: jnp.broadcast_to(v[places].astype("f4"), x.shape), vectors
    )
    assert found[1][0].dtype == vectors.dtype and found[1][0].shape == shape
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), atol=tolerance * scale)


def test_parts_of_a_dense_layer_are_its_result_split():
    network = Network.of(lambda rngs: linear(8, 12, jnp.float32, rngs))
    module = network.bind(network.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    whole = module(x)
    for first in (0, 2):
        parts = module.parts(x, 3, first=first)
        assert len(parts) == 3 - first
        np.testing.assert_allclose(jnp.concatenate(parts, -1), whole[..., 4 * first :], rtol=1e-6)
