"""What a generator runs on the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from walt_jax.diffusion import Sampler, Scale
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import Layout
from walt_jax.parallel.sharding import batch_sharding, place
from walt_jax.tasks import DenoiserTask, Wanted, to_unit
from walt_jax.tasks.given import Grid

PyTree = Any


@jax.jit
def encode(tokenizer: FrozenTokenizer, clips: jax.Array) -> jax.Array:
    """Pixels, uint8 (B, T, H, W, 3), to latents."""
    return tokenizer.encode(to_unit(clips))


@jax.jit
def decode(tokenizer: FrozenTokenizer, latents: jax.Array) -> jax.Array:
    """Latents to pixels in [-1, 1]."""
    return tokenizer.decode(latents)


@functools.lru_cache(maxsize=8)
def program(
    task: DenoiserTask,
    mesh: Mesh,
    sampler: Sampler,
    guidance: Scale,
    given_guidance: Scale,
    low_noise: float | None,
    grid: Grid,
    strength: float,
    decode: bool,
) -> Callable[..., jax.Array]:
    """What samples: (params, tokenizer, wanted, numbers, seed) -> pixels, lying as a batch does.

    Kept, so that the next checkpoint of a run is not compiled again.
    """
    alone = mesh.shape["data"] == mesh.size  # every device then has all weights

    def sample(clips: PyTree, shared: PyTree, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        (wanted, numbers), (params, tokenizer, seed) = clips, shared
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(numbers)
        return task.sample(
            params,
            tokenizer,
            wanted,
            keys,
            sampler,
            guidance,
            given_guidance=given_guidance,
            low_noise=low_noise,
            grid=grid,
            strength=strength,
            decode=decode,
            layout=layout,
        )

    def run(
        params: PyTree,
        tokenizer: FrozenTokenizer,
        wanted: Wanted,
        numbers: jax.Array,
        seed: jax.Array,
    ) -> jax.Array:
        clips, shared = (wanted, numbers), (params, tokenizer, seed)
        if alone:
            return Layout(mesh).by_clip(sample, clips, shared)
        return sample(clips, shared, Layout(mesh))

    return jax.jit(run, out_shardings=batch_sharding(mesh))


def shards(mesh: Mesh) -> int:
    """Over how many devices a batch is divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """Host arrays on the devices; what lies there already stays."""
    return tree if isinstance(jax.tree.leaves(tree)[0], jax.Array) else place(tree, shardings)


def mine(videos: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a batch that lie on this process, rising, and what they hold.

    What several devices hold alike counts once, on the first of them.
    """
    shards = [s for s in videos.addressable_shards if s.replica_id == 0]
    shards.sort(key=lambda s: s.index[0].start or 0)
    rows = [np.arange(len(s.data)) + (s.index[0].start or 0) for s in shards]
    values = [np.asarray(s.data) for s in shards]
    if not shards:
        return np.zeros(0, int), np.zeros((0, *videos.shape[1:]), videos.dtype)
    return np.concatenate(rows), np.concatenate(values)
