"""Small denoisers with random weights, for the tests beside this file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.models import Conditions, Denoiser, DenoiserConfig, Network

SMALL = DenoiserConfig(
    grid=(3, 4, 4),
    width=32,
    num_heads=4,
    num_layers=2,
    windows=((1, 0, 0), (0, 2, 2)),
    remat=False,
    dtype="float32",
)


@functools.cache
def network_of(config):
    """The network and the shapes of its parameters."""
    network = Network.of(lambda rngs: Denoiser(config, rngs=rngs))
    return network, network.shapes()


def random_params(config, seed=0):
    """Random everywhere: fresh ones start with zero gates and output."""
    rng, (_, shapes) = np.random.default_rng(seed), network_of(config)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), shapes)


def evaluate(config, params, z, t, **conditions):
    """One evaluation, compiled as a whole."""
    network, _ = network_of(config)

    def run(params, z, t, conditions):
        return network.bind(params)(z, t, conditions)

    return jax.jit(run)(params, z, jnp.asarray(t), Conditions(**conditions))


def build(config, seed=0):
    """`model(z, t, **conditions)` with random weights."""
    params, (network, _) = random_params(config, seed), network_of(config)

    @jax.jit
    def run(z, t, conditions):
        return network.bind(params)(z, t, conditions)

    return lambda z, t, **conditions: run(z, jnp.asarray(t), Conditions(**conditions))


def latents(batch=1, config=SMALL, seed=2):
    shape = (batch, *config.grid, config.latent_channels)
    return jax.random.normal(jax.random.key(seed), shape)


def reached(model, z, t, at, **conditions):
    """Where of z the gradient of an output token arrives: bool (B, T, H, W)."""
    grad = jax.grad(lambda z: jnp.square(model(z, t, **conditions)[at]).sum())(z)
    return np.abs(np.asarray(grad)).sum(-1) > 0
