"""Chunks of a long video and tiles of a large one equal the whole."""

import functools

import jax
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import TokenizerConfig
from walt_jax.models.tokenizer import streaming, tiling
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, network
from walt_jax.parallel import Layout, MeshConfig, make_mesh

SMALL = {"channels": 8, "norm_groups": 4, "dtype": "float32"}
CONFIGS = {
    "causal": TokenizerConfig(
        multipliers=(1, 1, 2), num_res_blocks=(0, 1, 1), temporal_downsample=(True, True), **SMALL
    ),
    "frames alone": TokenizerConfig(
        multipliers=(1, 2),
        num_res_blocks=(0, 1),
        temporal_downsample=(False,),
        dimensions=2,
        **SMALL,
    ),
}
VIDEO = np.random.default_rng(0).uniform(-1, 1, (1, 13, 16, 24, 3)).astype(np.float32)


@functools.cache
def whole(name):
    """A tokenizer with its latents and pixels of the whole video."""
    config = CONFIGS[name]
    params = jax.device_get(network(config).init(jax.random.key(0)))
    # Biases and norms start at 0 and 1, where a mistake could hide.
    params = jax.tree.map(
        lambda x: x + np.random.default_rng(1).normal(0, 0.1, x.shape).astype(np.float32), params
    )
    moments = np.linspace(-1, 1, 8, dtype=np.float32), np.linspace(2, 3, 8, dtype=np.float32)
    tokenizer = FrozenTokenizer.create(config, params, *moments)
    z = jax.jit(tokenizer.encode)(VIDEO)
    return tokenizer, np.asarray(z), np.asarray(jax.jit(tokenizer.decode)(z))


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_equal_the_whole(name):
    tokenizer, z, pixels = whole(name)
    factor = tokenizer.config.factors[0]
    chunks = streaming.split_frames(VIDEO, size=4, first=1 + 4)
    ours = np.concatenate(list(streaming.encode_chunks(tokenizer, chunks)), axis=1)
    np.testing.assert_allclose(ours, z, atol=2e-5)
    chunks = streaming.split_frames(z, size=4 // factor, first=1)
    ours = np.concatenate(list(streaming.decode_chunks(tokenizer, chunks)), axis=1)
    np.testing.assert_allclose(ours, pixels, atol=2e-5)


@pytest.mark.parametrize(("name", "tiles"), [("causal", (2, 2)), ("frames alone", (1, 5))])
def test_tiles_equal_the_whole(name, tiles):
    tokenizer, z, pixels = whole(name)
    np.testing.assert_allclose(tiling.encode_tiled(tokenizer, VIDEO, tiles), z, atol=2e-5)
    np.testing.assert_allclose(tiling.decode_tiled(tokenizer, z, tiles), pixels, atol=2e-5)


def test_devices_sharing_frames_equal_one():
    """Rows over context, columns over tensor: the compiler exchanges what convolutions reach."""
    tokenizer, z, pixels = whole("causal")
    mesh = make_mesh(MeshConfig(data=1, tensor=2, context=2), jax.devices()[:4])
    layout = Layout(mesh)
    with jax.set_mesh(mesh):
        encoded = jax.jit(lambda t, x: t.encode(x, layout))(tokenizer, VIDEO)
        decoded = jax.jit(lambda t, z: t.decode(z, layout))(tokenizer, z)
    np.testing.assert_allclose(encoded, z, atol=2e-5)
    np.testing.assert_allclose(decoded, pixels, atol=2e-5)


def test_one_compilation_for_all_later_chunks():
    tokenizer, z, _ = whole("causal")
    before = streaming._decode._cache_size()
    for _ in streaming.decode_chunks(tokenizer, np.split(np.repeat(z, 3, axis=1), 12, axis=1)):
        pass
    assert streaming._decode._cache_size() - before <= 2


def test_a_chunk_of_another_length_is_one_sentence():
    tokenizer, _, _ = whole("causal")
    with pytest.raises(UserError, match=r"Chunk 1 has 3 frames: it must have 4n"):
        list(streaming.encode_chunks(tokenizer, [VIDEO[:, :5], VIDEO[:, 5:8]]))
    with pytest.raises(UserError, match=r"tiles: a tile holds at least one latent"):
        tiling.encode_tiled(tokenizer, VIDEO, (7, 1))


def test_pixels_out_of_range_are_one_sentence():
    tokenizer, _, _ = whole("causal")
    for run in (tokenizer.encode, lambda x: list(streaming.encode_chunks(tokenizer, [x]))):
        with pytest.raises(UserError, match=r"Pixels lie in \[-?\d.*, 255\].*in \[-1, 1\]"):
            run(np.where(VIDEO > 0.5, 255, VIDEO))
    with pytest.raises(UserError, match="has no codes: its latents are continuous"):
        tokenizer.codes(VIDEO)
