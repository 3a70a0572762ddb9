"""Which implementation of window attention runs, what it refuses, and what it compiles to."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from walt_jax.errors import UserError
from walt_jax.kernels import ExtraKv, attention, window_attention
from walt_jax.kernels.attention import xla

SHAPE = (2, 3, 4, 6, 16)
X = jnp.zeros(SHAPE)


def extra(length=5, d=16, mask=None):
    return ExtraKv(*jnp.zeros((2, 2, length, d)), mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0, 2, 4)}, r"does not tile the grid .* W a multiple of 4"),
        ({"k": None, "v": None}, "no keys"),
        ({"v": None}, "k and v together"),
        ({"k": X[:, :2]}, r"k is \(2, 3, 4, 6, 16\), not \(2, 2, 4, 6, 16\)"),
        ({"q": X[0]}, r"q as \(B, T, H, W, D\)"),
        ({"num_heads": 3}, "a multiple of 3 heads"),
        ({"bias": jnp.zeros((4, 5, 5))}, r"bias is \(4, 24, 24\), not \(4, 5, 5\)"),
        (
            {"bias": jnp.zeros((4, 24, 24)), "k": None, "v": None, "extra_kv": extra()},
            "bias to keys of the grid",
        ),
        ({"segment_ids": jnp.zeros((2, 3), int)}, r"segment_ids is \(2, 3, 4, 6\), not \(2, 3\)"),
        ({"segment_ids": jnp.zeros(SHAPE[:4])}, "are integers, not float32"),
        ({"causal": -1}, "number of frames, not -1"),
        ({"extra_kv": extra(d=8)}, r"extra_kv.k is \(2, 5, 16\), not \(2, 5, 8\)"),
        ({"extra_kv": extra(mask=jnp.ones((2, 4), bool))}, r"mask is \(2, 5\), not \(2, 4\)"),
        ({"qk_norm": (jnp.ones(16), jnp.ones(4))}, r"a scale of qk_norm is \(4,\), not \(16,\)"),
        ({"implementation": "magic"}, "No implementation 'magic' .*'reference', 'xla', 'pallas"),
    ],
)
def test_wrong_arguments_are_told_in_one_sentence(options, message):
    options = {"q": X, "k": X, "v": X, "num_heads": 4, "window": (1, 0, 0)} | options
    with pytest.raises(UserError, match=message):
        window_attention(**options)


@pytest.fixture
def tpu_kernel(monkeypatch):
    """A kernel for TPUs that fits where its attribute says so, and gives cosines."""
    kernel = types.SimpleNamespace(
        fitting=True,
        fits=lambda *shape, **options: kernel.fitting,
        attention=lambda q, *inputs, **options: jnp.cos(q),
    )
    monkeypatch.setattr(attention, "tpu", kernel, raising=False)
    return kernel


def lowered(function, *arguments, platform):
    traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)  # always anew
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_tpus_take_their_kernel_where_it_fits_and_all_else_plain_xla(tpu_kernel):
    attend = functools.partial(window_attention, num_heads=4, window=(1, 0, 0))
    inputs = X, X, X
    assert "cosine" in lowered(attend, *inputs, platform="tpu")
    for platform in ("cpu", "cuda"):
        text = lowered(attend, *inputs, platform=platform)
        assert "cosine" not in text and "dot_general" in text
    asked = functools.partial(attend, implementation="xla")
    assert "cosine" not in lowered(asked, *inputs, platform="tpu")
    tpu_kernel.fitting = False
    assert "cosine" not in lowered(attend, *inputs, platform="tpu")
    with pytest.raises(UserError, match=r"'pallas_tpu' .* does not fit windows of .*'xla' does"):
        attend(*inputs, implementation="pallas_tpu")


def test_a_choice_by_platform_is_differentiable(tpu_kernel):
    def loss(q, implementation):
        options = {"num_heads": 4, "window": (1, 0, 0), "implementation": implementation}
        return jnp.square(window_attention(q, q, q, extra_kv=extra(), **options)).sum()

    q = jax.random.normal(jax.random.key(0), SHAPE)
    chosen, plain = (jax.jit(jax.grad(loss), static_argnums=1)(q, name) for name in (None, "xla"))
    np.testing.assert_allclose(chosen, plain, atol=1e-5)


def test_an_image_alone_in_time_costs_nothing():
    q, k, v = (jnp.full((2, 1, 4, 6, 16), i, jnp.bfloat16) for i in range(3))
    attend = functools.partial(window_attention, num_heads=4, window=(0, 1, 1))
    assert not jax.make_jaxpr(attend)(q, k, v).eqns
    np.testing.assert_array_equal(attend(q, k, v), attend(q, k, v, implementation="xla"))


def test_norms_by_products_equal_norms_by_heads_and_are_for_tpus():
    x = 3 + jax.random.normal(jax.random.key(0), (5, 3 * 24))
    scale = jax.random.normal(jax.random.key(1), (24,))

    def run(norm):
        y, pull = jax.vjp(functools.partial(norm, num_heads=3), x, scale)
        return y, *pull(jnp.sin(y))

    for a, b in zip(run(xla.norm_by_heads), run(xla.norm_by_products)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    norm = functools.partial(xla.head_norm, num_heads=3)
    assert "dot_general" in lowered(norm, x, scale, platform="tpu")
    assert "dot_general" not in lowered(norm, x, scale, platform="cpu")


H100 = jax.sharding.use_abstract_mesh(  # newer versions of jax ask what GPU it is
    AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))
)


@pytest.mark.parametrize(
    ("d", "window", "dtype"),
    [(256, (1, 0, 0), jnp.bfloat16), (288, (0, 8, 8), jnp.bfloat16), (512, (0, 1, 1), jnp.float32)],
)
def test_gpu_kernels_lower_for_cuda(d, window, dtype):
    """Widths of 64, 72 and 128; forward, queries, keys, extra keys and bias."""
    x = jax.ShapeDtypeStruct((2, 5, 16, 16, d), dtype)
    ids = jax.ShapeDtypeStruct(x.shape[:4], jnp.int32)
    keys = jax.ShapeDtypeStruct((2, 77, d), dtype)
    mask = jax.ShapeDtypeStruct((2, 77), bool)
    length = int(np.prod([g if w == 0 else w for g, w in zip(x.shape[1:4], window)]))
    bias = jax.ShapeDtypeStruct((4, length, length), jnp.float32)

    def loss(q, k, v, bias, extra_k, extra_v, ids, mask):
        out = window_attention(
            q,
            k,
            v,
            num_heads=4,
            window=window,
            bias=bias,
            segment_ids=ids,
            causal=2,
            extra_kv=ExtraKv(extra_k, extra_v, mask),
            implementation="pallas_gpu",
        )
        return out.astype(jnp.float32).sum()

    gradients = jax.grad(loss, tuple(range(6)))
    with H100:
        text = lowered(gradients, x, x, x, bias, keys, keys, ids, mask, platform="cuda")
    assert text.count("__gpu$xla.gpu.triton") == 5


def test_gpu_kernels_refuse_wide_heads():
    x = jnp.zeros((1, 1, 2, 2, 320))
    with pytest.raises(UserError, match=r"'pallas_gpu' .* 2 heads of 160 features"):
        window_attention(x, x, x, num_heads=2, window=(1, 0, 0), implementation="pallas_gpu")
