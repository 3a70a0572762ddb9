"""The tokenizer: sizes, causality, images, and its convolution against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.models import Network, Tokenizer, TokenizerConfig
from walt_jax.models.tokenizer.layers import (
    CausalConv,
    depth_to_space,
    normalise_groups,
    repeat_to,
)
from walt_jax.parallel import Layout, MeshConfig, make_mesh

TINY = TokenizerConfig(
    channels=8, multipliers=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4, dtype="float32"
)


@pytest.fixture(scope="module")
def tiny():
    network = Network.of(lambda rngs: Tokenizer(TINY, rngs=rngs))
    return network.bind(jax.jit(network.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(1), (1, 9, 16, 16, 3), minval=-1.0)


def test_full_size_shapes():
    network = Network.of(lambda r: Tokenizer(TokenizerConfig(), rngs=r))
    z = jax.eval_shape(
        lambda p, x: network.bind(p).encode(x),
        network.shapes(),
        jax.ShapeDtypeStruct((1, 17, 128, 128, 3), jnp.float32),
    )
    assert z.shape == (1, 5, 16, 16, 8) and z.dtype == jnp.float32
    x = jax.eval_shape(lambda p, z: network.bind(p).decode(z), network.shapes(), z)
    assert x.shape == (1, 17, 128, 128, 3) and x.dtype == jnp.float32


def frames_seen(fn, x):
    """(frames of the output, frames of x): size of the gradient between each two."""

    @jax.jit
    def gradient(x, pick):
        return jax.grad(lambda x: (jnp.square(fn(x)).sum((0, 2, 3, 4)) * pick).sum())(x)

    picks = jnp.eye(jax.eval_shape(fn, x).shape[1])
    return np.stack([np.abs(np.asarray(gradient(x, p))).sum((0, 2, 3, 4)) for p in picks])


def test_a_latent_sees_no_later_frame(tiny, video):
    """Latent frame n stands for frames up to 4n: the gradient to later frames is exactly 0."""
    for latent, seen in enumerate(frames_seen(tiny.encode, video)):
        assert np.all(seen[4 * latent + 1 :] == 0)
        assert np.all(seen[max(0, 4 * latent - 3) : 4 * latent + 1] > 0)


def test_a_decoded_frame_sees_no_later_latent(tiny):
    z = jax.random.normal(jax.random.key(2), (1, 3, 2, 2, 8))
    for frame, seen in enumerate(frames_seen(tiny.decode, z)):
        last = -(-frame // 4)
        assert np.all(seen[last + 1 :] == 0) and seen[last] > 0


def test_an_image_encodes_as_the_first_frame(tiny, video):
    encode, decode = jax.jit(tiny.encode), jax.jit(tiny.decode)
    whole, alone = encode(video), encode(video[:, :1])
    np.testing.assert_allclose(alone, whole[:, :1], atol=2e-5)
    np.testing.assert_allclose(decode(alone), decode(whole)[:, :1], atol=2e-5)


CONVOLUTIONS = pytest.mark.parametrize(
    ("kernel", "strides", "channels"),
    [
        ((3, 3, 3), (1, 1, 1), 5),
        ((3, 3, 3), (1, 1, 1), 3),  # few: all taps at once on TPUs
        ((4, 4, 4), (1, 2, 2), 5),  # few: strides are folded on TPUs
        ((4, 4, 4), (2, 2, 2), 9),
        ((1, 1, 1), (1, 1, 1), 5),
    ],
)


@pytest.fixture(params=["cpu", "tpu", "default"])
def platform(request, monkeypatch):
    """Takes what would run on a platform."""

    def choose(*args, default, **of_platform):
        return of_platform.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


def convolution(kernel, strides, channels):
    """A convolution, its input, and what XLA's 3-D convolution makes of it."""
    conv = CausalConv(
        channels, 7, kernel, strides=strides, use_bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    space = [((k - 1) // 2, k // 2) for k in kernel[1:]]

    def plain(x):
        padded = jnp.pad(x, ((0, 0), (kernel[0] - 1, 0), *space, (0, 0)), mode="edge")
        names = ("NDHWC", "DHWIO", "NDHWC")
        return jax.lax.conv_general_dilated(
            padded, conv.kernel[...], strides, "VALID", dimension_numbers=names
        )

    return conv, jax.random.normal(jax.random.key(1), (4, 5, 8, 12, channels)), plain


@CONVOLUTIONS
def test_convolution_equals_the_plain_one(kernel, strides, channels, platform):
    conv, x, plain = convolution(kernel, strides, channels)
    np.testing.assert_allclose(conv(x), plain(x), atol=2e-5)


@CONVOLUTIONS
def test_convolution_of_divided_frames(kernel, strides, channels, platform):
    conv, x, plain = convolution(kernel, strides, channels)
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    layout = Layout(mesh)

    def gradient(run, pin):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(pin(run(pin(x)))))))(x)

    expected = gradient(plain, lambda x: x)
    np.testing.assert_allclose(gradient(conv, layout.pixels), expected, atol=1e-4)


def test_statistics_are_of_each_frame_alone():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 8)) * 3 + 1
    y = np.asarray(normalise_groups(x, 4)).reshape(2, 3, 16, 4, 2)
    np.testing.assert_allclose(y.mean((2, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((2, 4)), 1, atol=1e-4)
    changed = normalise_groups(x.at[:, 2].multiply(5.0), 4)
    np.testing.assert_array_equal(changed[:, :2], normalise_groups(x, 4)[:, :2])


def test_depth_to_space_order_and_trim():
    x = jnp.arange(2 * 8 * 3).reshape(1, 2, 1, 1, 24)
    y = depth_to_space(x, (2, 2, 2))
    assert y.shape == (1, 3, 2, 2, 3)
    # Channels are (ft, fh, fw, C): the last half of the first frame's come first.
    np.testing.assert_array_equal(y[0, 0].reshape(-1), np.arange(12, 24))
    np.testing.assert_array_equal(y[0, 1:].reshape(-1), np.arange(24, 48))


def test_repeat_to_keeps_the_first_frame_single():
    z = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
    y = repeat_to(z, (5, 2, 2))
    np.testing.assert_array_equal(y[0, :, 1, 1, 0], [0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 16, 16, 3), r"16 frames .* 1 \+ 4n frames, such as 13 or 17"),
        ((1, 9, 20, 16, 3), "20x16 .* multiples of 8, such as 16x16"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tiny, shape, message):
    with pytest.raises(UserError, match=message):
        tiny.encode(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_downsample": (True,)}, "temporal_downsample has 1 entries"),
        ({"num_res_blocks": (1, 1)}, "num_res_blocks has 2 entries"),
        ({"norm_groups": 5}, "norm_groups=5 does not divide"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        TokenizerConfig(**change)
