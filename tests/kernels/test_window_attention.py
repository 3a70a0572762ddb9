"""The attention primitive against a direct computation, and by leakage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.kernels import resolve_window, window_attention

SHAPE = (2, 3, 4, 6, 16)
WINDOWS = [(1, 0, 0), (0, 1, 1), (0, 2, 3), (0, 0, 0), (3, 4, 2), (1, 1, 1)]


def naive(q, k, v, num_heads, window, bias=None):
    """Token by token, with a mask over all pairs."""
    b, t, h, w, d = q.shape
    block = resolve_window((t, h, w), window)
    places = np.stack(np.indices((t, h, w)), -1).reshape(-1, 3)
    window_of = places // np.array(block)
    same = (window_of[:, None] == window_of[None]).all(-1)
    inside = places % np.array(block)
    index = (inside * [block[1] * block[2], block[2], 1]).sum(-1)
    heads = [np.asarray(x, np.float64).reshape(b, t * h * w, num_heads, -1) for x in (q, k, v)]
    logits = np.einsum("blhk,bmhk->bhlm", heads[0], heads[1]) * (d // num_heads) ** -0.5
    if bias is not None:
        logits = logits + np.asarray(bias)[:, index][:, :, index]
    logits = np.where(same, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhlm,bmhk->blhk", weights, heads[2]).reshape(q.shape)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_masked_full_attention(window, with_bias):
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    length = int(np.prod(resolve_window(SHAPE[1:4], window)))
    bias = jax.random.normal(jax.random.key(1), (4, length, length)) if with_bias else None
    out = window_attention(q, k, v, num_heads=4, window=window, bias=bias)
    np.testing.assert_allclose(out, naive(q, k, v, 4, window, bias), atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_no_gradient_leaks_between_windows(window):
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))

    def out_at(q, k, v):
        y = window_attention(q, k, v, num_heads=4, window=window)
        return jnp.square(y[0, 1, 2, 3]).sum()

    block = np.array(resolve_window(SHAPE[1:4], window))
    places = np.stack(np.indices(SHAPE[1:4]), -1)
    inside = (places // block == np.array([1, 2, 3]) // block).all(-1)
    grads = jax.grad(out_at, (1, 2))(q, k, v)
    reached = sum(np.abs(np.asarray(g)).sum(-1) for g in grads)
    np.testing.assert_array_equal(reached[0] > 0, inside)
    assert np.all(reached[1] == 0)


def test_nan_stays_in_its_window():
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    out = window_attention(q, k.at[0, 0, 0, 0].set(jnp.nan), v, num_heads=4, window=(1, 0, 0))
    assert np.all(np.isnan(out[0, 0])) and np.all(np.isfinite(out[0, 1:]))


def test_bfloat16_keeps_its_dtype_and_the_values():
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    exact = window_attention(q, k, v, num_heads=4, window=(0, 2, 2))
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = window_attention(*half, num_heads=4, window=(0, 2, 2))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)


def test_a_window_that_does_not_tile_names_what_fits():
    x = jnp.zeros(SHAPE)
    with pytest.raises(UserError, match=r"does not tile the grid .* W a multiple of 4"):
        window_attention(x, x, x, num_heads=4, window=(0, 2, 4))
