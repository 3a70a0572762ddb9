"""Generators with random weights, for the tests beside this file."""

import functools

import jax
import numpy as np

from walt_jax.generation import Generator
from walt_jax.models import TokenizerConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, network
from walt_jax.parallel import MeshConfig, make_mesh

TOKENIZER = TokenizerConfig(
    channels=8,
    multipliers=(1, 1, 1, 1),
    num_res_blocks=1,
    latent_channels=2,
    norm_groups=2,
    dtype="float32",
)


def drawn(shapes, seed):
    """Small random weights."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.float32(0.2 * rng.standard_normal(s.shape)), shapes)


def tokenizer(seed=1):
    """Of blocks of 4 x 8 x 8 pixels."""
    params = drawn(network(TOKENIZER).shapes(), seed)
    return FrozenTokenizer.create(TOKENIZER, params, np.zeros(2), np.ones(2))


@functools.cache
def generator(task, devices=1, seed=1, fps=8.0):
    """Of a task with this tokenizer, on so many devices."""
    params = drawn(jax.eval_shape(task.init, jax.random.key(0)), 0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return Generator(task, params, tokenizer(seed), (), fps, 0, mesh=mesh).placed()
