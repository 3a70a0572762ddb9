"""The discriminator: sizes, blur pooling and the whole network against plain convolutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import Network, count
from walt_jax.models.discriminator import Discriminator, DiscriminatorConfig, blur_pool

TINY = DiscriminatorConfig(channels=4, multipliers=(2, 3), clip=(5, 12, 8), dtype="float32")


def network_of(config):
    return Network.of(lambda rngs: Discriminator(config, rngs=rngs))


def random_params(network):
    """With biases, which start as 0, and weights large enough for clips to differ in logits."""
    rng = np.random.default_rng(0)

    def draw(s):
        scale = 2 * np.prod(s.shape[:-1]) ** -0.5 if s.ndim > 1 else 0.1
        return (scale * rng.normal(size=s.shape)).astype(s.dtype)

    return jax.tree.map(draw, network.shapes())


def clips(config, batch=4):
    """Colours with noise."""
    rng = np.random.default_rng(1)
    colours = rng.uniform(-0.7, 0.7, (batch, 1, 1, 1, 3))
    return (colours + 0.1 * rng.normal(size=(batch, *config.clip, 3))).astype(np.float32)


@pytest.mark.parametrize(("order", "millions"), [("code", 61.3), ("figure", 68.0)])
def test_published_parameter_counts(order, millions):
    network = network_of(DiscriminatorConfig(order=order))
    assert round(count(network.shapes()) / 1e6, 1) == millions


def test_full_size_shapes():
    config = DiscriminatorConfig()
    network = network_of(config)
    x = jax.ShapeDtypeStruct((2, *config.clip, 3), jnp.float32)
    logits = jax.eval_shape(lambda p, x: network.bind(p)(x), network.shapes(), x)
    assert logits.shape == (2,) and logits.dtype == jnp.float32
    assert config.grid == (1, 4, 4)


def plain(x, kernel, stride=1, groups=1):
    names = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 3, "SAME", dimension_numbers=names, feature_group_count=groups
    )


def plain_blur_pool(x):
    lines = [jnp.array([1.0, 2.0, 1.0]) / 4 if n > 1 else jnp.ones((1,)) for n in x.shape[1:4]]
    kernel = jnp.einsum("i,j,k->ijk", *lines)[..., None, None]
    c = x.shape[-1]
    return plain(x, jnp.tile(kernel, (1, 1, 1, 1, c)), 2, groups=c)


@pytest.mark.parametrize("size", [(1, 2, 3), (5, 8, 7), (17, 4, 6)])
def test_blur_pool_equals_a_depthwise_convolution(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    expected = plain_blur_pool(x)
    assert expected.shape[1:4] == tuple((n + 1) // 2 for n in size)
    np.testing.assert_allclose(blur_pool(x), expected, atol=1e-6)


def test_blur_pool_keeps_the_brightness_of_an_image():
    """Nothing lies beside its only frame, so that nothing is blurred along time."""
    pooled = blur_pool(jnp.ones((1, 1, 9, 9, 2)))
    np.testing.assert_array_equal(pooled[:, :, 1:-1, 1:-1], 1.0)


@pytest.mark.parametrize("order", ["code", "figure"])
def test_network_equals_plain_convolutions(order):
    config = dataclasses.replace(TINY, order=order)
    network = network_of(config)
    params, x = random_params(network), clips(config)

    def conv(p, x):
        return plain(x, p["kernel"]) + p.get("bias", 0)

    def activate(x):
        return jnp.where(x > 0, x, 0.2 * x)

    @jax.jit
    def reference(params, x):
        x = activate(conv(params["conv_in"], x))
        for p in params["blocks"].values():
            assert "bias" not in p["shortcut"]
            y = activate(conv(p["conv2"], plain_blur_pool(activate(conv(p["conv1"], x)))))
            x = (y + conv(p["shortcut"], plain_blur_pool(x))) / np.sqrt(2)
        x = activate(conv(params["conv_out"], x)).reshape(x.shape[0], -1)
        x = activate(x @ params["dense"]["kernel"] + params["dense"]["bias"])
        return (x @ params["logit"]["kernel"] + params["logit"]["bias"])[:, 0]

    widths = params["blocks"][0]["conv1"]["kernel"].shape[-2:]
    assert widths == {"code": (4, 4), "figure": (4, 8)}[order]
    logits = jax.jit(lambda p, x: network.bind(p)(x))(params, x)
    np.testing.assert_allclose(logits, reference(params, x), atol=1e-5)
    assert np.std(logits) > 0.01


def test_bfloat16_follows_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    exact, network = network_of(TINY), network_of(config)
    params, x = random_params(exact), clips(config, 8)
    logits = jax.jit(lambda p, x: network.bind(p)(x))(params, x)
    expected = jax.jit(lambda p, x: exact.bind(p)(x))(params, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.std(expected))


def test_an_image_is_a_clip_of_one_frame():
    """With the parameters of a video's: frames halve to 1 in either."""
    image = dataclasses.replace(TINY, clip=(1, 12, 8))
    video = dataclasses.replace(TINY, clip=(4, 12, 8))
    network, x = network_of(image), clips(image)
    assert network.shapes() == network_of(video).shapes()
    logits = jax.jit(lambda p, x: network.bind(p)(x))(random_params(network), x)
    assert logits.shape == (4,) and np.std(logits) > 1e-3


@pytest.mark.parametrize("shape", [(1, 4, 12, 8, 3), (1, 5, 12, 12, 3), (1, 5, 12, 8, 1)])
def test_other_clips_are_refused(shape):
    network = network_of(TINY)
    with pytest.raises(UserError, match=r"do not fit the discriminator, made for \(5, 12, 8, 3\)"):
        jax.eval_shape(lambda p, x: network.bind(p)(x), network.shapes(), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"clip": (0, 8, 8)}, "must be positive"), ({"multipliers": ()}, "multipliers are empty")],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        DiscriminatorConfig(**change)
