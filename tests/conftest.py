"""Eight CPU devices for every test, and a small dataset of sprite videos."""

import os

from jaxlib.version import __version_info__

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend their time in compilation, which is three times faster without LLVM's optimisations,
# and three times more with XLA's former code generator, while there is one.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if __version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from buckets import any_folder, bucket
from runs import copied, denoiser_run, denoiser_values, tokenizer_run

from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.sprites import SpriteConfig, write_sprites

__all__ = [
    "any_folder",
    "bucket",
    "copied",
    "denoiser_run",
    "denoiser_values",
    "sprite_records",
    "tokenizer_run",
]
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def sprite_records(tmp_path_factory):
    """A prepared dataset of 24 sprite videos with a short side of 32 pixels."""
    folder = tmp_path_factory.mktemp("sprites")
    manifest = write_sprites(folder / "videos", 24, SpriteConfig(short_side=32))
    prepare_dataset(manifest, folder / "records")
    return folder / "records"
