"""Latents of the sprite records by a tiny tokenizer, for tests of what is cached."""

import jax
import numpy as np
import pytest

from walt_jax.data.latents import encode_dataset
from walt_jax.data.pipeline import DataConfig
from walt_jax.models import TokenizerConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, network
from walt_jax.models.tokenizer.quantizers import Identity


def make_tokenizer(quantizer, latent_channels, seed=0):
    config = TokenizerConfig(
        channels=8,
        multipliers=(1, 1, 1),
        num_res_blocks=0,
        temporal_downsample=(False, True),
        latent_channels=latent_channels,
        norm_groups=2,
        quantizer=quantizer,
        dtype="float32",
    )
    params = jax.device_get(network(config).init(jax.random.key(seed)))
    mean = np.linspace(-0.5, 0.5, latent_channels, dtype=np.float32)
    return FrozenTokenizer.create(config, params, mean, mean**2 + 0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(Identity(), 4)


@pytest.fixture(scope="module")
def data(sprite_records):
    # 24 videos: with 5 clips a batch 5 batches an epoch, the last one with one clip of its own.
    return DataConfig(path=str(sprite_records), num_frames=5, fps=4.0, sizes=((16, 16),))


@pytest.fixture(scope="module")
def encode(tokenizer, data):
    def encode(output, tokenizer=tokenizer, data=data, **options):
        options = {"batch_size": 5, "batches_per_shard": 3, "epochs": 2} | options
        return encode_dataset(tokenizer, data, output, progress=False, **options)

    return encode


@pytest.fixture(scope="module")
def straight(encode, tmp_path_factory):
    """Two epochs of 5 batches in shards of 3, 3, 3 and 1."""
    return encode(tmp_path_factory.mktemp("latents") / "straight")
