"""The count of model FLOPs against arithmetic by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from walt_jax.models import Denoiser, DenoiserConfig, Network, TokenizerConfig
from walt_jax.models.discriminator import DiscriminatorConfig
from walt_jax.models.tokenizer.layers import CausalConv
from walt_jax.parallel import Layout
from walt_jax.tasks import DenoiserTask, TokenizerTask
from walt_jax.tasks.adversarial import AdversarialConfig
from walt_jax.training.flops import forward_flops, gradient_flops


def test_products_convolutions_scans_and_remat():
    a, b = jnp.zeros((4, 8)), jnp.zeros((8, 16))
    assert forward_flops(jnp.matmul, a, b) == 2 * 4 * 8 * 16
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    names = ("NHWC", "HWIO", "NHWC")

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=names)

    pairs = 8 * 3 - 2  # of pixels and taps along an axis, without the padding
    assert forward_flops(convolve, image, kernel) == 2 * 2 * 5 * 3 * pairs**2
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


def test_a_gradient_costs_what_it_passes_through():
    """Two trained layers of which the first needs no gradient at x, and a frozen one on both."""
    x, square = jnp.zeros((8, 8)), jnp.zeros((8, 8))

    def loss(params, frozen, x):
        a, b = params
        y = x @ a @ b
        return jnp.square(y @ frozen - x @ frozen).sum(), {"unused": (y @ y).sum()}

    products = (1 + 1) + (1 + 2) + (2 + 1)  # a and b, forward and backward; frozen of y and x
    assert gradient_flops(loss, (square, square), square, x) == products * 2 * 8**3


def of_task(task, batch):
    """FLOPs of the forward pass, and of the gradient."""
    params, extra = jax.eval_shape(task.init, jax.random.key(0)), task.init_extra()

    def loss(params):
        key, step = jax.random.key(0), np.zeros((), np.int32)
        return task.loss(params, extra, {}, batch, key, step, Layout())

    return forward_flops(loss, params), gradient_flops(loss, params)


@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 2, 2)])
def test_a_convolutions_padding_and_cpu_tricks_do_not_count(strides):
    conv = CausalConv(5, 7, (4, 4, 4), strides=strides, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.zeros((2, 5, 8, 8, 5))
    exact = 2.0 * conv(x).size * 4**3 * 5
    assert forward_flops(conv, x) == exact
    gradient = gradient_flops(lambda x: (jnp.sum(conv(x) ** 2), ()), x)
    assert gradient == pytest.approx(2 * exact)  # of the input alone, and the forward pass


def test_a_denoiser_recomputes_nothing():
    model = DenoiserConfig(
        grid=(2, 4, 4), width=64, num_heads=4, num_layers=4, windows=((0, 0, 0),)
    )
    task = DenoiserTask(tokenizer="", model=model)
    batch = {"latents": jnp.zeros((2, 2, 4, 4, 8)), "label": jnp.zeros((2,), jnp.int32)}
    forward, plain = of_task(task.plain(), batch)
    assert 2.9 * forward < plain <= 3 * forward
    assert of_task(task, batch)[1] > 1.2 * plain


def test_a_tokenizer_pays_for_its_discriminator_and_not_for_r1():
    sizes = {"channels": 8, "multipliers": (1, 1), "dtype": "float32"}
    model = TokenizerConfig(num_res_blocks=1, temporal_downsample=(False,), norm_groups=4, **sizes)
    gan = AdversarialConfig(discriminator=DiscriminatorConfig(clip=(3, 16, 16), **sizes))
    task = TokenizerTask(model=model, adversarial=gan)
    batch = {"video": np.zeros((2, 3, 16, 16, 3), np.uint8)}
    without = dataclasses.replace(task, adversarial=None)
    assert without.plain() == without
    (forward, alone), (both, plain) = (of_task(t.plain(), batch) for t in (without, task))
    assert 2.7 * forward < alone <= 3 * forward
    # Generated clips take two backward passes: to the discriminator's weights and to the pixels.
    assert 2.7 * (both - forward) < plain - alone < 3.5 * (both - forward)
    assert of_task(task, batch)[1] > 1.1 * plain
