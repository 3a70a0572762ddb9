"""The attention primitive: each implementation against masked attention over all tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walt_jax.errors import UserError
from walt_jax.kernels import ExtraKv, resolve_window, window_attention
from walt_jax.kernels.attention import gpu

SHAPE = (2, 3, 4, 6, 16)
HEADS = 4
WINDOWS = [(1, 0, 0), (0, 1, 1), (0, 2, 3), (0, 0, 0), (3, 4, 2), (1, 1, 1)]
KERNELS = ["xla", "pallas_gpu"]

ALL = {"bias", "segments", "extra", "norm"}
CASES = {
    "spatial": ((1, 0, 0), {"bias", "norm"}, False),
    "spatiotemporal": ((0, 2, 3), set(), False),
    "everything": ((0, 2, 3), ALL, 2),
    "temporal": ((0, 1, 1), {"bias", "extra"}, True),
    "full": ((0, 0, 0), {"segments", "unpadded"}, True),
    "cross": ((1, 2, 2), {"extra", "norm", "no grid"}, False),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """GPU kernels in Pallas' interpret mode, with more than one tile a window."""
    monkeypatch.setattr(gpu, "TILE", 16)
    monkeypatch.setattr(gpu, "attention", functools.partial(gpu.attention, interpret=True))


def dense(q, k, v, *, num_heads, window, bias, segment_ids, causal, extra_kv, qk_norm):
    """Over all pairs of tokens, masked, in float32; every row must see a key."""
    b, t, h, w, d = q.shape
    block = np.array(resolve_window((t, h, w), window))
    places = np.stack(np.indices((t, h, w)), -1).reshape(-1, 3)
    inside = places % block
    index = (inside * [block[1] * block[2], block[2], 1]).sum(-1)
    heads = [
        x.astype(jnp.float32).reshape(b, -1, num_heads, d // num_heads)
        for x in (q, k, v, *(extra_kv or ())[:2])
        if x is not None
    ]
    if qk_norm is not None:
        scales = [qk_norm[0], *[qk_norm[1], None] * (len(heads) // 2)]
        heads = [x if s is None else layer_norm(x) * s for x, s in zip(heads, scales)]
    q, *keys = heads
    masks, biases = [], []
    if k is not None:
        mask = (places // block == (places // block)[:, None]).all(-1)[None]
        if causal:
            back = places[:, None, 0] - places[None, :, 0]
            mask &= (back >= 0) & (back < (t if causal is True else causal))
        if segment_ids is not None:
            ids = segment_ids.reshape(b, -1)
            mask &= ids[:, :, None] == ids[:, None]
        masks.append(jnp.broadcast_to(mask, (b, t * h * w, t * h * w)))
        biases.append(0.0 if bias is None else bias[:, index][:, :, index])
    if extra_kv is not None:
        seen = True if extra_kv[2] is None else extra_kv[2][:, None]
        masks.append(jnp.broadcast_to(seen, (b, t * h * w, keys[-1].shape[1])))
        biases.append(0.0)
    logits = [
        jnp.einsum("blhk,bmhk->bhlm", q, k) * (d // num_heads) ** -0.5 + bias
        for k, bias in zip(keys[::2], biases)
    ]
    logits = jnp.where(jnp.concatenate(masks, -1)[:, None], jnp.concatenate(logits, -1), -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhlm,bmhk->blhk", weights, jnp.concatenate(keys[1::2], 1))
    return out.reshape(b, t, h, w, d)


def layer_norm(x):
    x -= x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def extra_keys(shape=SHAPE, length=5, dtype=jnp.float32):
    """The last two of the first sample are padding."""
    k, v = jax.random.normal(jax.random.key(7), (2, shape[0], length, shape[-1]), dtype)
    padding = np.zeros((shape[0], length), bool)
    padding[0, -2:] = True
    return ExtraKv(k, v, jnp.asarray(~padding))


def arguments(window, used, causal, shape=SHAPE, num_heads=HEADS, dtype=jnp.float32):
    """Arrays to differentiate by name, and the function of them that an implementation gives."""
    length, width = int(np.prod(resolve_window(shape[1:4], window))), shape[-1] // num_heads
    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape), dtype)
    arrays = {"q": q} if "no grid" in used else {"q": q, "k": k, "v": v}
    if "bias" in used:
        arrays["bias"] = jax.random.normal(jax.random.key(1), (num_heads, length, length))
    if "norm" in used:
        scales = 1 + 0.3 * jax.random.normal(jax.random.key(3), (2, width))
        arrays |= {"q_scale": scales[0], "k_scale": scales[1]}
    ids = jax.random.randint(jax.random.key(2), shape[:4], 0, 2) if "segments" in used else None
    mask = None
    if "extra" in used or "unpadded" in used:
        extra = extra_keys(shape, dtype=dtype)
        arrays |= {"extra_k": extra.k, "extra_v": extra.v}
        mask = extra.mask if "extra" in used else None

    def call(attention, arrays):
        extra = None
        if "extra_k" in arrays:
            extra = ExtraKv(arrays["extra_k"], arrays["extra_v"], mask)
        return attention(
            *(arrays.get(name) for name in "qkv"),
            num_heads=num_heads,
            window=window,
            bias=arrays.get("bias"),
            segment_ids=ids,
            causal=causal,
            extra_kv=extra,
            qk_norm=(arrays["q_scale"], arrays["k_scale"]) if "q_scale" in arrays else None,
        )

    return arrays, call


def result_and_gradients(attention, arrays, call):
    def total(arrays):
        y = call(attention, arrays)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    with jax.default_matmul_precision("highest"):
        grads, y = jax.jit(jax.grad(total, has_aux=True))(arrays)
    return {"y": y, **grads}


@functools.cache
def expected(case, dtype="float32"):
    arrays, call = arguments(*CASES[case], dtype=jnp.dtype(dtype))
    return result_and_gradients(dense, arrays, call)


def check(found, wanted, tolerance):
    for name, array in wanted.items():
        array = np.asarray(array, np.float32)
        np.testing.assert_allclose(
            np.asarray(found[name], np.float32),
            array,
            atol=tolerance * max(1, np.abs(array).max()),
            err_msg=name,
        )


@pytest.mark.parametrize(
    ("case", "implementation"),
    [("everything", "reference"), *((case, name) for case in CASES for name in KERNELS)],
)
def test_equals_masked_attention_over_all_tokens_and_its_gradients(case, implementation):
    attention = functools.partial(window_attention, implementation=implementation)
    check(result_and_gradients(attention, *arguments(*CASES[case])), expected(case), 1e-5)


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_bfloat16_keeps_its_dtype_and_the_values(implementation):
    arrays, call = arguments(*CASES["everything"], dtype=jnp.bfloat16)
    attention = functools.partial(window_attention, implementation=implementation)
    found = result_and_gradients(attention, arrays, call)
    for name in ("y", "q", "k", "v", "extra_k", "extra_v"):
        assert found[name].dtype == jnp.bfloat16
    check(found, expected("everything", "bfloat16"), 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.tuples(st.integers(1, 3), st.integers(1, 2))] * 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sets(st.sampled_from(sorted(ALL))),
    st.integers(0, 2),
)
def test_any_shape(implementation, axes, num_heads, width, used, causal):
    """A window of some tokens along each axis, some windows along each."""
    grid, window = [w * n for w, n in axes], [w for w, _ in axes]
    shape = (2, *grid, num_heads * width)
    arrays, call = arguments(window, used, causal, shape, num_heads)
    wanted = result_and_gradients(dense, arrays, call)
    attention = functools.partial(window_attention, implementation=implementation)
    check(result_and_gradients(attention, arrays, call), wanted, 2e-5)


@pytest.mark.parametrize(
    ("window", "implementation"),
    [((0, 2, 3), "pallas_gpu"), *((window, "xla") for window in WINDOWS)],
)
def test_no_gradient_leaks_between_windows(window, implementation):
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))

    def out_at(k, v):
        options = {"num_heads": HEADS, "window": window, "implementation": implementation}
        return jnp.square(window_attention(q, k, v, **options)[0, 1, 2, 3]).sum()

    block = np.array(resolve_window(SHAPE[1:4], window))
    places = np.stack(np.indices(SHAPE[1:4]), -1)
    inside = (places // block == np.array([1, 2, 3]) // block).all(-1)
    grads = jax.jit(jax.grad(out_at, (0, 1)))(k, v)
    reached = sum(np.abs(np.asarray(g)).sum(-1) for g in grads)
    np.testing.assert_array_equal(reached[0] > 0, inside)
    assert np.all(reached[1] == 0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_nan_stays_in_its_window(implementation):
    """Forward and backward, from q, k and v."""
    qkv = list(jax.random.normal(jax.random.key(0), (3, *SHAPE)))

    @jax.jit
    def run(q, k, v):
        options = {"num_heads": HEADS, "window": (1, 0, 0), "implementation": implementation}
        y, pull = jax.vjp(functools.partial(window_attention, **options), q, k, v)
        return y, *pull(jnp.ones_like(y))

    for i in range(3):
        holes = [x.at[0, 0, 0, 0].set(jnp.nan) if j == i else x for j, x in enumerate(qkv)]
        y, *grads = run(*holes)
        assert np.any(np.isnan(y[0, 0]))
        for x in (y, *grads):
            assert np.all(np.isfinite(x[0, 1:])) and np.all(np.isfinite(x[1]))


@pytest.mark.parametrize("implementation", KERNELS)
def test_what_is_hidden_has_no_gradient_and_no_say(implementation):
    """Padding may even be NaN; a token that sees nothing gets 0, with finite gradients."""
    q, extra = jax.random.normal(jax.random.key(0), SHAPE), extra_keys()
    mask = jnp.zeros_like(extra.mask).at[0, 1].set(True)
    scales = jnp.ones((2, SHAPE[-1] // HEADS))

    @jax.jit
    def run(q, k_extra, v_extra):
        def out(q, k_extra, v_extra):
            return window_attention(
                q,
                num_heads=HEADS,
                window=(1, 0, 0),
                extra_kv=ExtraKv(k_extra, v_extra, mask),
                qk_norm=(scales[0], scales[1]),
                implementation=implementation,
            )

        y, pull = jax.vjp(out, q, k_extra, v_extra)
        return y, *pull(2 * y)

    holes = [jnp.where(mask[..., None], x, jnp.nan) for x in extra[:2]]
    y, *grads = run(q, *holes)
    np.testing.assert_array_equal(y, run(q, *extra[:2])[0])
    assert np.any(y[0]) and not np.any(y[1])
    assert all(np.all(np.isfinite(g)) for g in grads)
    np.testing.assert_array_equal(np.abs(np.asarray(grads[2])).sum(-1) > 0, mask)
    assert not np.any(np.asarray(grads[1])[~np.asarray(mask)])


@pytest.mark.parametrize(
    ("causal", "frames", "implementation"),
    [(True, [0, 1], "xla"), (1, [1], "xla"), (2, [0, 1], "xla"), (1, [1], "pallas_gpu")],
)
def test_no_gradient_from_hidden_frames(causal, frames, implementation):
    q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))

    def out(k, v):
        options = {"num_heads": HEADS, "window": (0, 2, 2), "implementation": implementation}
        return jnp.square(window_attention(q, k, v, causal=causal, **options)[:, 1]).sum()

    grads = jax.jit(jax.grad(out, (0, 1)))(k, v)
    reached = sum(np.abs(np.asarray(g)) for g in grads)
    assert [t for t in range(3) if reached[:, t].any()] == frames


def test_a_mask_for_each_token():
    """Each token's result is that of its own mask for all; what no token sees may be anything."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (2, 1, 2, 3, 8)
    q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    extra_k, extra_v = (jax.random.normal(key, (2, 4, 8)) for key in keys[3:])
    mask = np.random.default_rng(0).random((*shape[:4], 4)) < 0.5
    mask[..., 3] = False
    extra_k = extra_k.at[:, 3].set(jnp.nan)
    attend = functools.partial(window_attention, num_heads=2, window=(1, 2, 0))
    for queries in ((q, k, v), (q,)):
        out = attend(*queries, extra_kv=ExtraKv(extra_k, extra_v, mask))
        for h, w in np.ndindex(2, 3):
            alone = attend(*queries, extra_kv=ExtraKv(extra_k, extra_v, mask[:, 0, h, w]))
            np.testing.assert_allclose(out[:, 0, h, w], alone[:, 0, h, w], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="extra keys with a mask for each token"):
        attend(q, k, v, extra_kv=ExtraKv(extra_k, extra_v, mask), implementation="pallas_tpu")
    with pytest.raises(UserError, match=r"extra_kv\.mask is \(2, 1, 2, 3, 4\)"):
        attend(q, k, v, extra_kv=ExtraKv(extra_k, extra_v, mask[:, :, :1]))
