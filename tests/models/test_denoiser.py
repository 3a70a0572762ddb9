"""The denoiser: sizes, windows by leakage, conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import Denoiser, DenoiserConfig, Network, count

SMALL = DenoiserConfig(
    grid=(3, 4, 4),
    width=32,
    num_heads=4,
    num_layers=4,
    windows=((1, 0, 0), (0, 2, 2)),
    num_classes=3,
    dtype="float32",
)


def build(config, seed=0):
    """A network with random weights everywhere: fresh ones start with zero gates and output."""
    network = Network.of(lambda rngs: Denoiser(config, rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.jit(network.bind(jax.tree.unflatten(structure, noisy)))


def test_published_parameter_count():
    """W.A.L.T-L on UCF-101 has 313,237,384: less self-conditioning's input, plus a null class."""
    network = Network.of(lambda r: Denoiser(DenoiserConfig(num_classes=101), rngs=r))
    assert count(network.shapes()) == 313_237_384 - 8 * 1024 + 1024


def test_starts_at_zero():
    network = Network.of(lambda r: Denoiser(SMALL, rngs=r))
    model = network.bind(network.init(jax.random.key(0)))
    z = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 8))
    out = model(z, jnp.array([0, 999]), jnp.array([0, 2]))
    assert out.shape == z.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(
    ("window", "sees"),
    [
        ((1, 0, 0), lambda t, h, w: t == 1),
        ((0, 1, 1), lambda t, h, w: (h == 1) & (w == 2)),
        ((0, 2, 2), lambda t, h, w: (h < 2) & (w >= 2)),
        ((0, 0, 0), lambda t, h, w: t >= 0),
    ],
)
def test_a_token_sees_its_window_and_nothing_else(window, sees):
    config = DenoiserConfig(
        grid=(3, 4, 4), width=32, num_heads=4, num_layers=1, windows=(window,), dtype="float32"
    )
    model = build(config)
    z = jax.random.normal(jax.random.key(2), (1, 3, 4, 4, 8))
    grad = jax.jit(jax.grad(lambda z: jnp.square(model(z, jnp.array([500]))[0, 1, 1, 2]).sum()))(z)
    reached = np.abs(np.asarray(grad))[0].sum(-1) > 0
    np.testing.assert_array_equal(reached, sees(*np.indices((3, 4, 4))))


def test_samples_do_not_see_each_other():
    model = build(SMALL)
    z = jax.random.normal(jax.random.key(2), (2, 3, 4, 4, 8))
    t, label = jnp.array([10, 500]), jnp.array([0, 1])
    grad = jax.jit(jax.grad(lambda z: jnp.square(model(z, t, label)[0]).sum()))(z)
    assert np.all(np.asarray(grad[1]) == 0) and np.any(np.asarray(grad[0]) != 0)


def test_time_and_class_matter():
    model = build(SMALL)
    z = jnp.broadcast_to(jax.random.normal(jax.random.key(2), (1, 3, 4, 4, 8)), (3, 3, 4, 4, 8))
    out = model(z, jnp.array([10, 500, 10]), jnp.array([0, 0, SMALL.num_classes]))
    assert float(jnp.abs(out[0] - out[1]).max()) > 1e-3
    assert float(jnp.abs(out[0] - out[2]).max()) > 1e-3


def test_remat_and_patches_keep_the_meaning():
    z = jax.random.normal(jax.random.key(2), (1, 3, 4, 4, 8))
    t, label = jnp.array([10]), jnp.array([1])
    with_remat = build(SMALL)(z, t, label)
    without = build(DenoiserConfig(**{**vars(SMALL), "remat": False}))(z, t, label)
    np.testing.assert_allclose(with_remat, without, atol=1e-5)
    patched = build(DenoiserConfig(**{**vars(SMALL), "patch_size": (1, 2, 2)}))
    assert patched(z, t, label).shape == z.shape


def test_bfloat16_stays_near_float32():
    z = jax.random.normal(jax.random.key(2), (2, 3, 4, 4, 8))
    t, label = jnp.array([10, 900]), jnp.array([1, 2])
    exact = build(SMALL)(z, t, label)
    rough = build(DenoiserConfig(**{**vars(SMALL), "dtype": "bfloat16"}))(z, t, label)
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(rough - exact).max()) < 0.05 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 5}, "num_layers=5 must be a multiple of the 2 windows"),
        ({"num_heads": 5}, "width=32 must be a multiple"),
        ({"windows": ((0, 3, 3),), "num_layers": 1}, "does not tile the grid .* H a multiple of 3"),
        ({"patch_size": (2, 1, 1)}, "no multiple of patch_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        DenoiserConfig(**{**vars(SMALL), "windows": ((1, 0, 0), (0, 2, 2)), **change})


def test_wrong_inputs_are_refused():
    model = build(SMALL)
    with pytest.raises(UserError, match="do not fit this denoiser"):
        model(jnp.zeros((1, 3, 4, 6, 8)), jnp.zeros((1,)), jnp.zeros((1,), int))
    with pytest.raises(UserError, match="labels were not given"):
        model(jnp.zeros((1, 3, 4, 4, 8)), jnp.zeros((1,)))
