"""A feature network for tests: a random projection of small frames, with stand-in weights."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.evaluation.features import Extractor

DIMS, FRAMES, SIDE = 6, 4, 8


def load(weights=None, *, resize=None, mesh=None, allow=()):
    """The weights' name is their seed."""
    seed = int(weights or 0)
    shape = (FRAMES * SIDE * SIDE * 3, DIMS)
    params = np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 50

    def apply(params, clips):
        x = clips[:, :FRAMES].astype(jnp.float32) / 127.5 - 1
        x = jax.image.resize(x, (*x.shape[:2], SIDE, SIDE, 3), "linear", antialias=False)
        return jnp.tanh(x.reshape(len(x), -1) @ params)

    return Extractor(
        name="tiny",
        weights="fixture",
        weights_hash=hashlib.sha256(params.tobytes()).hexdigest(),
        trained=False,
        dims=DIMS,
        min_frames=FRAMES,
        resize=resize or "half-pixel",
        apply=apply,
        params=params,
        mesh=mesh,
    )
