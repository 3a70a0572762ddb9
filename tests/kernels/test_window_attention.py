"""The attention primitive against a direct computation, and by leakage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.kernels import ExtraKv, resolve_window, window_attention

SHAPE = (2, 3, 4, 6, 16)
WINDOWS = [(1, 0, 0), (0, 1, 1), (0, 2, 3), (0, 0, 0), (3, 4, 2), (1, 1, 1)]


def naive(q, k, v, num_heads, window, bias=None, age=None, segment_ids=None, extra=None):
    """Token by token, with a mask over all pairs; `age` is how many frames back may be seen."""
    b, t, h, w, d = q.shape
    block = resolve_window((t, h, w), window)
    places = np.stack(np.indices((t, h, w)), -1).reshape(-1, 3)
    window_of = places // np.array(block)
    same = (window_of[:, None] == window_of[None]).all(-1)
    inside = places % np.array(block)
    index = (inside * [block[1] * block[2], block[2], 1]).sum(-1)
    if age is not None:
        back = places[:, None, 0] - places[None, :, 0]
        same &= (back >= 0) & (back < age)
    mask = np.broadcast_to(same, (b, *same.shape))
    if segment_ids is not None:
        ids = np.asarray(segment_ids).reshape(b, -1)
        mask = mask & (ids[:, :, None] == ids[:, None])
    heads = [np.asarray(x, np.float64).reshape(b, t * h * w, num_heads, -1) for x in (q, k, v)]
    logits = np.einsum("blhk,bmhk->bhlm", heads[0], heads[1]) * (d // num_heads) ** -0.5
    if bias is not None:
        logits = logits + np.asarray(bias)[:, index][:, :, index]
    if extra is not None:
        more = [
            np.asarray(x, np.float64).reshape(b, -1, num_heads, d // num_heads) for x in extra[:2]
        ]
        added = np.einsum("blhk,bmhk->bhlm", heads[0], more[0]) * (d // num_heads) ** -0.5
        logits = np.concatenate([logits, added], -1)
        heads[2] = np.concatenate([heads[2], more[1]], 1)
        seen = np.broadcast_to(np.asarray(extra[2])[:, None], (b, t * h * w, extra[2].shape[1]))
        mask = np.concatenate([mask, seen], -1)
    logits = np.where(mask[:, None], logits, -np.inf)
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


def extra_keys(length=5):
    k, v = jax.random.normal(jax.random.key(7), (2, SHAPE[0], length, SHAPE[-1]))
    return ExtraKv(k, v, jnp.arange(length) < jnp.array([[3], [length]]))


@pytest.mark.parametrize("window", [(1, 0, 0), (0, 1, 1), (0, 2, 3), (3, 4, 2)])
@pytest.mark.parametrize("age", [None, 2, 99])
@pytest.mark.parametrize("packed", [False, True])
def test_all_options_together_equal_masked_full_attention(window, age, packed):
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    length = int(np.prod(resolve_window(SHAPE[1:4], window)))
    bias = jax.random.normal(jax.random.key(1), (4, length, length))
    ids = jax.random.randint(jax.random.key(2), SHAPE[:4], 0, 2) if packed else None
    out = window_attention(
        q,
        k,
        v,
        num_heads=4,
        window=window,
        bias=bias,
        segment_ids=ids,
        causal={None: False, 99: True}.get(age, age),
        extra_kv=extra_keys(),
    )
    expected = naive(q, k, v, 4, window, bias, age, ids, extra_keys())
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_keys_from_outside_alone():
    q = jax.random.normal(jax.random.key(0), SHAPE)
    out = window_attention(q, num_heads=4, window=(1, 2, 2), extra_kv=extra_keys())
    heads = [x.reshape(2, -1, 4, 4) for x in (q, *extra_keys()[:2])]
    logits = jnp.einsum("blhk,bmhk->bhlm", heads[0], heads[1]) / 2
    logits = jnp.where(extra_keys().mask[:, None, None], logits, -jnp.inf)
    expected = jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(logits), heads[2]).reshape(SHAPE)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_what_is_hidden_has_no_gradient_and_no_say():
    """Padding may even be NaN; a token that sees nothing gets 0, with finite gradients."""
    q, extra = jax.random.normal(jax.random.key(0), SHAPE), extra_keys()
    extra = extra._replace(mask=jnp.zeros_like(extra.mask).at[0, 1].set(True))

    def out(q, k_extra, v_extra):
        keys = ExtraKv(k_extra, v_extra, extra.mask)
        return window_attention(q, num_heads=4, window=(1, 0, 0), extra_kv=keys)

    holes = [jnp.where(extra.mask[..., None], x, jnp.nan) for x in extra[:2]]
    np.testing.assert_array_equal(out(q, *holes), out(q, *extra[:2]))
    assert not np.any(out(q, *holes)[1])
    grads = jax.grad(lambda *a: jnp.square(out(*a)).sum(), (0, 1, 2))(q, *holes)
    assert all(np.all(np.isfinite(g)) for g in grads)
    np.testing.assert_array_equal(np.abs(np.asarray(grads[2])).sum(-1) > 0, extra.mask)


@pytest.mark.parametrize(("causal", "frames"), [(True, [0, 1]), (1, [1]), (2, [0, 1])])
def test_no_gradient_from_hidden_frames(causal, frames):
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))

    def out(k, v):
        y = window_attention(q, k, v, num_heads=4, window=(0, 0, 0), causal=causal)
        return jnp.square(y[:, 1]).sum()

    reached = sum(np.abs(np.asarray(g)) for g in jax.grad(out, (0, 1))(k, v))
    assert [t for t in range(3) if reached[:, t].any()] == frames


def test_nothing_to_attend_to_and_unknown_implementations_are_refused():
    x = jnp.zeros(SHAPE)
    with pytest.raises(UserError, match="no keys"):
        window_attention(x, num_heads=4, window=(1, 0, 0))
    with pytest.raises(UserError, match="No implementation 'magic'"):
        window_attention(x, x, x, num_heads=4, window=(1, 0, 0), implementation="magic")
