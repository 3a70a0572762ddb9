"""The Pallas kernels of the tokenizer's convolutions, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from walt_jax.kernels.causal_conv import causal_conv, fits
from walt_jax.kernels.channel_moments import channel_moments
from walt_jax.models.tokenizer.tokenizer import ResBlock
from walt_jax.models.tokenizer.whole import Whole
from walt_jax.parallel import Layout, MeshConfig, make_mesh

C = 128


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def reference(x, kernel, scale=None, offset=None, residual=0.0):
    if scale is not None:
        x = nnx.swish(x * scale[:, :, None, None] + offset[:, :, None, None])
    x = jnp.pad(x, ((0, 0), (kernel.shape[0] - 1, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    names = ("NDHWC", "DHWIO", "NDHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "VALID", dimension_numbers=names)
    return y + residual


def arguments(shape, features=C, taps=3, affine=True, residual=False):
    """(x, kernel, scale, offset, residual), and dy."""
    keys = jax.random.split(jax.random.key(0), 6)
    *grid, c = shape
    kernel = jax.random.normal(keys[1], (taps, 3, 3, c, features)) / (9 * c * taps) ** 0.5
    args = [jax.random.normal(keys[0], shape), kernel]
    if affine:
        args.append(1.0 + 0.3 * jax.random.normal(keys[2], (*grid[:2], c)))
        args.append(0.3 * jax.random.normal(keys[3], (*grid[:2], c)))
    if residual:
        args.append(jax.random.normal(keys[5], (*grid, features)))
    return args, jax.random.normal(keys[4], (*grid, features))


def close(a, b, tolerance):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 4, 4, 16, C), {}),  # two blocks of rows of two clips; edges in time and space
        (
            (1, 3, 3, 8, C),
            {"features": 256, "residual": True},
        ),  # one row a block, two blocks of features
        ((1, 2, 2, 16, C), {"taps": 1, "affine": False}),
        ((1, 1, 2, 8, C), {}),  # an image
        ((1, 5, 1, 8, 256), {"features": C}),  # a frame of one row
        ((1, 2, 2, 8, C), {"features": 3}),  # colours
    ],
)
def test_equals_a_padded_convolution_and_its_gradients(shape, options):
    args, dy = arguments(shape, **options)
    with jax.default_matmul_precision("highest"):
        expected, pull_expected = jax.vjp(reference, *args)
        y, pull = jax.vjp(causal_conv, *args)
        close(y, expected, 1e-6)
        for gradient, wanted in zip(pull(dy), pull_expected(dy), strict=True):
            close(gradient, wanted, 2e-6)


def test_bfloat16_sums_in_float32():
    args, dy = arguments((1, 3, 4, 16, C))
    x, kernel = (a.astype(jnp.bfloat16) for a in args[:2])
    exact = [x.astype(jnp.float32), kernel.astype(jnp.float32), *args[2:]]
    expected, pull_expected = jax.vjp(reference, *exact)
    y, pull = jax.vjp(causal_conv, x, kernel, *args[2:])
    dy = dy.astype(jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    close(y, expected, 1e-2)
    for gradient, wanted in zip(pull(dy), pull_expected(dy.astype(jnp.float32)), strict=True):
        close(gradient, wanted, 1e-2)


def test_a_frame_does_not_see_later_ones():
    args, dy = arguments((1, 4, 2, 8, C))
    gradient = jax.grad(lambda x: jnp.sum(causal_conv(x, *args[1:])[:, :2] * dy[:, :2]))(args[0])
    assert np.all(gradient[:, 2:] == 0) and np.all(np.any(gradient[:, :2] != 0, axis=(2, 3, 4)))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 2, 6, 16, C), "bfloat16"), ((1, 1, 3, 8, C), "float32")]
)
def test_moments_of_channels(shape, dtype, monkeypatch):
    monkeypatch.setattr("walt_jax.kernels.channel_moments.PIXELS", 32)  # several blocks
    x = (50.0 + jax.random.normal(jax.random.key(0), shape)).astype(dtype)
    exact = np.asarray(x, np.float64)
    mean, variance = channel_moments(x)
    np.testing.assert_allclose(mean, exact.mean((2, 3)), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var((2, 3)), rtol=1e-5)


def test_what_fits():
    bf16, kernel = jnp.dtype("bfloat16"), (3, 3, 3, C, C)
    assert fits((1, 17, 128, 128, C), kernel, bf16)
    assert fits((1, 17, 512, 896, C), kernel, bf16)
    assert fits((1, 5, 16, 16, 512), (3, 3, 3, 512, 512), bf16)
    assert not fits((1, 17, 128, 128, 64), (3, 3, 3, 64, C), bf16)
    assert not fits((1, 17, 128, 120, C), kernel, bf16)  # half a tile of bfloat16
    assert fits((1, 17, 128, 120, C), kernel, jnp.dtype("float32"))
    assert not fits((1, 17, 128, 128, C), (1, 1, 1, C, C), bf16)
    assert not fits((1, 5, 16, 16, 512), (3, 3, 3, 512, 4096), bf16)  # weights beyond VMEM


@pytest.fixture(scope="module")
def block():
    return ResBlock(C, C, 32, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def value_and_gradients(block, x, run):
    layers, params = nnx.split(block)

    def loss(params, x):
        y = run.block(nnx.merge(layers, params), x)
        return jnp.mean(jnp.sin(y)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return jax.tree.leaves((y, gradients))


def test_a_residual_block_is_the_same_by_kernels_or_recomputed(block):
    x = jax.random.normal(jax.random.key(1), (1, 3, 4, 8, C)) + 1.0
    expected = value_and_gradients(block, x, Whole(fused=False))
    for run in (Whole(fused=True), Whole(remat=True), Whole()):
        for a, b in zip(value_and_gradients(block, x, run), expected, strict=True):
            close(a, b, 3e-5)


@pytest.mark.parametrize("clips", [4, 3])  # 3 do not divide: every device then takes all
def test_clips_divide_over_a_mesh(block, clips):
    x = jax.random.normal(jax.random.key(1), (clips, 2, 2, 8, C))
    expected = value_and_gradients(block, x, Whole(fused=False))
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4]))
    for a, b in zip(
        value_and_gradients(block, x, Whole(layout, fused=True, remat=True)), expected, strict=True
    ):
        close(a, b, 3e-5)
