"""The count of model FLOPs against arithmetic by hand."""

import jax
import jax.numpy as jnp
import pytest

from walt_jax.models import Denoiser, DenoiserConfig, Network
from walt_jax.training.flops import forward_flops


def test_products_convolutions_scans_and_remat():
    a, b = jnp.zeros((4, 8)), jnp.zeros((8, 16))
    assert forward_flops(jnp.matmul, a, b) == 2 * 4 * 8 * 16
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    names = ("NHWC", "HWIO", "NHWC")

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=names)

    assert forward_flops(convolve, image, kernel) == 2 * (2 * 8 * 8 * 5) * 27
    square = jnp.zeros((8, 8))

    @jax.checkpoint
    def body(x, w):
        return x @ w, None

    scanned = forward_flops(
        lambda x, w: jax.lax.scan(jax.jit(body), x, w)[0], a, jnp.stack([square] * 5)
    )
    assert scanned == 5 * 2 * 4 * 8 * 8


@pytest.mark.parametrize("num_layers", [2, 8])
def test_the_denoiser_costs_its_weights_and_its_windows(num_layers):
    config = DenoiserConfig(
        grid=(3, 4, 4), width=64, num_heads=4, num_layers=num_layers, windows=((1, 0, 0), (0, 2, 2))
    )
    network = Network.of(lambda rngs: Denoiser(config, rngs=rngs))
    z = jax.ShapeDtypeStruct((2, 3, 4, 4, 8), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    counted = forward_flops(lambda p, z, t: network.bind(p)(z, t), network.shapes(), z, t)
    tokens, width = 2 * 48, 64
    weights = 2 * 12 * width**2 * num_layers * tokens
    attention = 4 * tokens * width * (16 + 12) * num_layers / 2
    vectors = 2 * 2 * (256 * 64 + 64 * 64 + 8 * 64 * 64 + num_layers * (64 * 2 + 2 * 6 * 64))
    patches = 2 * tokens * 2 * 8 * width
    assert counted == weights + attention + vectors + patches
