"""Feature networks for tests: random projections of small frames, with stand-in weights."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.evaluation.features import Extractor

DIMS, FRAMES, SIDE = 6, 4, 8


def load(weights=None, *, resize=None, mesh=None, allow=(), frames=FRAMES, most=None):
    """The weights' name is their seed; 'trained' may be claimed of them."""
    seed = int(weights or 0)
    shape = (frames * SIDE * SIDE * 3, DIMS)
    params = np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 50

    def apply(params, clips):
        x = clips[:, :frames].astype(jnp.float32) / 127.5 - 1
        x = jax.image.resize(x, (*x.shape[:2], SIDE, SIDE, 3), "linear", antialias=False)
        return jnp.tanh(x.reshape(len(x), -1) @ params)

    return Extractor(
        name="tiny",
        weights="fixture",
        weights_hash=hashlib.sha256(params.tobytes()).hexdigest(),
        trained="trained" in allow,
        dims=DIMS,
        min_frames=frames,
        max_frames=most,
        resize=resize or "half-pixel",
        apply=apply,
        params=params,
        mesh=mesh,
    )


load_frames = functools.partial(load, frames=1, most=1)  # of single frames
load_exact = functools.partial(load, most=FRAMES)
