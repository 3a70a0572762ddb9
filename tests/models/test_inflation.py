"""Inflation: a still video through the 3D tokenizer is the frame through the 2D one."""

import dataclasses

import jax
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import Network, Tokenizer, TokenizerConfig
from walt_jax.models.tokenizer.inflation import inflate
from walt_jax.models.tokenizer.quantizers import Kl

TINY = TokenizerConfig(
    channels=8,
    multipliers=(1, 2, 2),
    temporal_downsample=(True, True),
    num_res_blocks=(1, 1, 0),
    latent_channels=4,
    norm_groups=4,
    dtype="float32",
)
FLAT = dataclasses.replace(TINY, dimensions=2, temporal_downsample=(False, False))
HOWS = ("last", "central", "average")


def network(config):
    return Network.of(lambda rngs: Tokenizer(config, rngs=rngs))


@pytest.fixture(scope="module")
def params_2d():
    """Of a 2D tokenizer, biases and norms not at their initial 0 and 1."""
    draw = np.random.default_rng(0)
    params = jax.jit(network(FLAT).init)(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.2 * draw.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def through_2d(params_2d):
    """Latents and reconstructions of nine frames, each by itself."""
    frames = jax.random.uniform(jax.random.key(2), (9, 1, 16, 16, 3), minval=-1.0)
    return frames, *run(FLAT)(params_2d, frames)


def run(config):
    @jax.jit
    def encode_and_decode(params, x):
        model = network(config).bind(params)
        z = model.encode(x)
        return z, model.decode(z)

    return encode_and_decode


@pytest.fixture(scope="module")
def run_3d():
    return run(TINY)


@pytest.mark.parametrize("how", HOWS)
def test_a_still_video_is_its_frame(params_2d, through_2d, run_3d, how):
    frames, z_2d, y_2d = through_2d
    params = inflate(params_2d, network(TINY).shapes(), how)
    z, y = run_3d(params, np.repeat(frames[:1], 9, axis=1))
    assert z.shape[1] == 3 and y.shape[1] == 9
    np.testing.assert_allclose(z, np.repeat(z_2d[:1], 3, axis=1), atol=5e-5)
    np.testing.assert_allclose(y, np.repeat(y_2d[:1], 9, axis=1), atol=5e-5)
    assert np.std(y_2d) > 0.1


def test_with_last_a_moving_video_is_its_frames(params_2d, through_2d, run_3d):
    """Latent n is that of frame 4n, and what is decoded up to frame 4n is its reconstruction."""
    frames, z_2d, y_2d = through_2d
    params = inflate(params_2d, network(TINY).shapes())
    z, y = run_3d(params, frames.swapaxes(0, 1))
    np.testing.assert_allclose(z[0], z_2d[::4, 0], atol=5e-5)
    of_latent = [0, *[4] * 4, *[8] * 4]
    np.testing.assert_allclose(y[0], y_2d[of_latent, 0], atol=5e-5)


@pytest.mark.parametrize("how", HOWS)
def test_where_the_kernel_goes(params_2d, how):
    """A kernel of four taps, and one whose eight features become sixteen: (ft, fh, fw, C)."""
    params = inflate(params_2d, network(TINY).shapes(), how)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
        lambda x: x.shape, network(TINY).shapes()
    )
    flat, kernel = (p["encoder"]["stages"][1]["kernel"] for p in (params_2d, params))
    weights = {"last": [0, 0, 0, 1], "central": [0, 0, 1, 0], "average": [0.25] * 4}[how]
    np.testing.assert_array_equal(kernel, np.stack([w * flat[0] for w in weights]))

    flat, grown = (p["decoder"]["levels"][0]["upsample"] for p in (params_2d, params))
    weights = {"last": [0, 0, 1], "central": [0, 1, 0], "average": [1 / 3] * 3}[how]
    for copy in np.split(np.asarray(grown["kernel"]), 2, axis=-1):
        np.testing.assert_allclose(copy, np.stack([w * flat["kernel"][0] for w in weights]))
    np.testing.assert_array_equal(grown["bias"], np.tile(flat["bias"], 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 16}, r"parameter \S+kernel of shape \(1, .* same channels"),
        ({"latent_channels": 8}, r"parameter \S+ of shape .* latent_channels"),
        ({"quantizer": Kl()}, r"encoder/conv_out/kernel of shape \(1, 1, 1, 16, 4\)"),
        ({"num_res_blocks": (1, 2, 0)}, r"Only one .* has the parameter \S+/blocks/"),
    ],
)
def test_trees_that_do_not_fit_are_one_sentence(params_2d, change, message):
    shapes = network(dataclasses.replace(TINY, **change)).shapes()
    with pytest.raises(UserError, match=message):
        inflate(params_2d, shapes)
