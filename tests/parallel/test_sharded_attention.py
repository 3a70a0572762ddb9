"""Attention divided over a mesh equals attention on one device, and moves no more than it must."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from walt_jax.errors import UserError
from walt_jax.kernels import ExtraKv, window_attention
from walt_jax.kernels.attention import tpu
from walt_jax.parallel import MeshConfig, make_mesh, sharded_attention
from walt_jax.parallel.sharding import TOKENS

GRID, HEADS, WIDTH = (3, 8, 4), 4, 16
SPATIAL, BLOCKS, TEMPORAL, FULL = (1, 0, 0), (0, 4, 4), (0, 1, 1), (0, 0, 0)
# Five frames are divided by no mesh; rows are, and heads.
MESHES = {
    "all axes": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
    "context": MeshConfig(data=2, fsdp=1, tensor=1, context=4),
}


def _inputs(window, *, bias=False, text=False, ids=False, norm=False):
    keys = iter(jax.random.split(jax.random.key(0), 10))
    shape = (2, *GRID, WIDTH)
    given = {"qkv": tuple(jax.random.normal(next(keys), shape) for _ in range(3))}
    if bias:
        length = np.prod([w or g for w, g in zip(window, GRID)])
        given["bias"] = jax.random.normal(next(keys), (HEADS, length, length))
    if text:
        mask = jnp.array([[True, True, False], [True, False, False]])
        k, v = (jax.random.normal(next(keys), (2, 3, WIDTH)) for _ in range(2))
        given["extra_kv"] = ExtraKv(k, v, mask)
    if norm:
        given["qk_norm"] = tuple(jax.random.normal(next(keys), (WIDTH // HEADS,)) for _ in range(2))
    if ids:
        given["segment_ids"] = jax.random.randint(next(keys), shape[:-1], 0, 2)
    return given


def _loss(attention, inexact, rest, window, **options):
    given = inexact | rest
    if "extra_kv" in given:
        given["extra_kv"] = ExtraKv(*given["extra_kv"], rest["mask"])
    given = {k: v for k, v in given.items() if k != "mask"}
    out = attention(*given.pop("qkv"), num_heads=HEADS, window=window, **given, **options)
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out


def _run(attention, given, window, **options):
    inexact = {k: v for k, v in given.items() if k in ("qkv", "bias", "qk_norm")}
    rest = {k: v for k, v in given.items() if k == "segment_ids"}
    if "extra_kv" in given:
        inexact["extra_kv"], rest["mask"] = given["extra_kv"][:2], given["extra_kv"].mask
    run = jax.value_and_grad(functools.partial(_loss, attention), has_aux=True)
    (_, out), gradients = jax.jit(lambda a, b: run(a, b, window, **options))(inexact, rest)
    return out, gradients


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("window", "options"),
    [
        (SPATIAL, {"bias": True, "norm": True}),
        (BLOCKS, {"bias": True, "text": True}),
        (TEMPORAL, {"ids": True}),
        (FULL, {"text": True, "ids": True, "norm": True}),
    ],
)
def test_a_mesh_changes_nothing(window, options, mesh):
    given = _inputs(window, **options)
    divided = functools.partial(sharded_attention, make_mesh(MESHES[mesh]))
    causal = window == TEMPORAL
    ours, whole = (_run(f, given, window, causal=causal) for f in (divided, window_attention))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [(1, 0, 0), (0, 4, 8)])
def test_the_kernels_of_tpus_run_on_a_mesh(window, monkeypatch):
    """Interpreted; rows are exchanged for heads in the first window."""
    monkeypatch.setattr(tpu, "attention", functools.partial(tpu.attention, interpret=True))
    keys = jax.random.split(jax.random.key(0), 4)
    qkv = [jax.random.normal(key, (2, 1, 8, 8, 8 * 64)) for key in keys[:3]]
    tokens = np.prod([w or g for w, g in zip(window, (1, 8, 8))])
    bias = jax.random.normal(keys[3], (8, tokens, tokens))

    def gradients(attention, **options):
        def loss(qkv, bias):
            return jnp.sin(attention(*qkv, num_heads=8, window=window, bias=bias, **options)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(qkv, bias)

    divided = functools.partial(sharded_attention, make_mesh(MESHES["all axes"]))
    ours = gradients(divided, implementation="pallas_tpu")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradients(window_attention))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_plain_cross_attention_stays_where_it_is():
    given = _inputs(SPATIAL, text=True)
    mesh = make_mesh(MESHES["all axes"])
    q, extra = given["qkv"][0], given["extra_kv"]
    options = {"num_heads": HEADS, "window": (0, 8, 4), "extra_kv": extra}
    ours = sharded_attention(mesh, q, **options)
    np.testing.assert_allclose(ours, window_attention(q, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "exchanges"), [(SPATIAL, 2), (FULL, 2), (BLOCKS, 0), (TEMPORAL, 0)]
)
def test_rows_are_exchanged_for_heads_once_each_way_where_a_window_spans_devices(window, exchanges):
    mesh = make_mesh(MESHES["all axes"])
    lying = NamedSharding(mesh, jax.P(*TOKENS, None, "tensor"))
    q, k, v = (jax.device_put(x, lying) for x in _inputs(window)["qkv"])
    attention = functools.partial(sharded_attention, mesh, num_heads=HEADS, window=window)
    program = jax.jit(attention, out_shardings=lying).lower(q, k, v).compile().as_text()
    moves = re.findall(r" (all-[a-z-]+|collective-permute|reduce-scatter)(?:-start)?\(", program)
    assert moves == ["all-to-all"] * exchanges


def test_what_does_not_divide_is_one_sentence():
    q = jnp.zeros((2, *GRID, WIDTH))
    mesh = make_mesh(MeshConfig(data=1, tensor=1, context=8))
    with pytest.raises(UserError, match=r"\(1, 0, 0\).*1 rows.*context 8.*4 heads"):
        sharded_attention(mesh, q, q, q, num_heads=HEADS, window=SPATIAL)
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(UserError, match=r"tensor 8 does not divide the 4 heads"):
        sharded_attention(mesh, q, q, q, num_heads=HEADS, window=SPATIAL)
    six = jnp.zeros((2, 3, 6, 4, WIDTH))
    with pytest.raises(UserError, match="context 8 does not divide the 6 rows"):
        sharded_attention(
            make_mesh(MeshConfig(data=1, context=8)),
            six,
            six,
            six,
            num_heads=HEADS,
            window=TEMPORAL,
        )
    with pytest.raises(UserError, match="does not tile"):
        sharded_attention(mesh, q, q, q, num_heads=HEADS, window=(0, 3, 4))


def test_recomputed_layers_with_padded_text_lower_for_tpus():
    """Operands that all layers share are known beforehand; constrained ones JAX cannot keep."""
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    x, text = jnp.ones((2, 1, 16, 16, 128)), jnp.ones((2, 16, 128))

    def loss(x, text, mask):
        extra = ExtraKv(text, text, mask)

        @jax.checkpoint
        def layer(x, _):
            options = {"num_heads": 2, "window": (1, 0, 0), "extra_kv": extra}
            return sharded_attention(mesh, x, x, x, **options), None

        return jax.lax.scan(layer, x, None, 2)[0].sum()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        exported = jax.export.export(gradient, platforms=["tpu"])(x, text, jnp.ones((2, 16), bool))
    assert exported.mlir_module().count("tpu_custom_call") >= 2
