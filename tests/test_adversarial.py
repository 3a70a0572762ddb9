"""The adversarial losses: closed forms, whose gradient goes where, schedules and meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from walt_jax.errors import UserError
from walt_jax.models import Network
from walt_jax.models.discriminator import Discriminator, DiscriminatorConfig
from walt_jax.parallel import Layout, MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import batch_sharding, place
from walt_jax.tasks.adversarial import (
    AdversarialConfig,
    adversarial_losses,
    discriminator_loss,
    generator_loss,
    init_lecam,
    lecam_penalty,
    r1_penalty,
    update_lecam,
)

CONFIG = AdversarialConfig(
    generator_weight=0.5,
    lecam_weight=0.3,  # large enough to see
    discriminator=DiscriminatorConfig(
        channels=4, multipliers=(2,), clip=(3, 8, 8), dtype="float32"
    ),
)
STATS = {"lecam_real": jnp.float32(0.3), "lecam_fake": jnp.float32(-0.2)}


@functools.cache
def network_of(model):
    return Network.of(lambda rngs: Discriminator(model, rngs=rngs))


@functools.cache
def inputs():
    """Parameters (large enough for R1 to matter), real and generated clips, on the host."""
    params = jax.jit(network_of(CONFIG.discriminator).init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = (8, *CONFIG.discriminator.clip, 3)
    real = rng.uniform(-1, 1, shape).astype(np.float32)
    fake = 0.5 * rng.normal(size=shape).astype(np.float32)
    return jax.tree.map(lambda p: 1.5 * np.asarray(p), params), real, fake


@functools.cache
def gradients(config, layout=Layout()):  # noqa: B008
    """Jitted: loss, metrics, stats and the gradients at the parameters and generated clips."""

    def loss_fn(params, fake, real, stats, step):
        network = network_of(config.discriminator)
        loss, metrics, stats = adversarial_losses(
            config, network, params, real, fake, stats, step, layout
        )
        return loss, (metrics, stats)

    @jax.jit
    def run(params, real, fake, stats, step):
        (loss, (metrics, stats)), grads = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(
            params, fake, real, stats, step
        )
        return {"loss": loss, "metrics": metrics, "stats": stats, "grads": grads}

    return run


@functools.cache
def reference():
    """Of CONFIG on one device."""
    return jax.device_get(gradients(CONFIG)(*inputs(), STATS, jnp.int32(0)))


def close(a, b, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), a, b)


def test_losses_in_closed_form():
    real, fake = np.array([0.5, -2.0, 40.0]), np.array([1.0, -1.0, -40.0])

    def nll(p):
        return -np.log(p).mean()

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    assert generator_loss(fake) == pytest.approx(nll(sigmoid(fake)), rel=1e-6)
    expected = nll(sigmoid(real)) + nll(1 - sigmoid(fake))
    assert discriminator_loss(real, fake) == pytest.approx(expected, rel=1e-6)
    far = jnp.array([-1e4])
    assert generator_loss(far) == 1e4 and jax.grad(generator_loss)(far) == -1.0  # saturates never


def test_r1_of_a_linear_discriminator():
    x = jax.random.normal(jax.random.key(0), (4, 2, 3))
    w = jax.random.normal(jax.random.key(1), (2, 3))

    def r1(w):
        return r1_penalty(lambda x: jnp.einsum("btc,tc->b", x, w) + 7.0, x)

    assert r1(w) == pytest.approx(float((w**2).sum()), rel=1e-5)
    np.testing.assert_allclose(jax.grad(r1)(w), 2 * w, rtol=1e-5)


def test_r1_is_a_mean_over_clips_and_a_sum_within():
    x = jax.random.normal(jax.random.key(0), (4, 2, 3), jnp.bfloat16)
    penalty = r1_penalty(lambda x: (1.5 * x**2).sum((1, 2)), x)
    assert penalty.dtype == jnp.float32
    exact = np.square(3.0 * np.asarray(x, np.float32)).sum((1, 2)).mean()
    assert penalty == pytest.approx(exact, rel=1e-5)


def test_lecam_by_hand():
    real, fake = jnp.array([1.0, -1.0]), jnp.array([0.5, 3.0])
    penalty = lecam_penalty(real, fake, jnp.float32(2.0), jnp.float32(-0.5))
    assert penalty == pytest.approx((1.5**2 + 0) / 2 + (1.5**2 + 0) / 2)
    stats = update_lecam(init_lecam(), real, fake, 0.75)
    assert stats == {"lecam_real": 0.0, "lecam_fake": pytest.approx(0.25 * 1.75)}
    stats = update_lecam(stats, real + 4.0, fake, 0.75)
    assert stats["lecam_real"] == pytest.approx(1.0)
    assert stats["lecam_fake"] == pytest.approx(0.75 * 0.4375 + 0.4375)


def test_each_network_gets_the_gradient_of_its_own_loss():
    params, real, fake = inputs()
    network = network_of(CONFIG.discriminator)

    def generators(fake):
        return 0.5 * generator_loss(network.bind(params)(fake))

    def discriminators(params):
        discriminate = network.bind(params)
        r, f = discriminate(real), discriminate(fake)
        lecam = lecam_penalty(r, f, STATS["lecam_real"], STATS["lecam_fake"])
        penalty = r1_penalty(discriminate, real)
        return discriminator_loss(r, f) + 10.0 * penalty + 0.3 * lecam, (r, f, lecam, penalty)

    ours = reference()
    value, to_clips = jax.jit(jax.value_and_grad(generators))(fake)
    (rest, (r, f, lecam, penalty)), to_params = jax.jit(
        jax.value_and_grad(discriminators, has_aux=True)
    )(params)
    close(ours["grads"], (to_params, to_clips), atol=1e-5)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(to_params)) > 1e-3
    assert float(jnp.abs(to_clips).max()) > 1e-4
    expected = {
        "generator_adversarial": value / 0.5,
        "discriminator": discriminator_loss(r, f),
        "r1": penalty,
        "lecam": lecam,
        "discriminator_accuracy_real": np.mean(r > 0),
        "discriminator_accuracy_fake": np.mean(f < 0),
        "logit_real": np.mean(r),
        "logit_fake": np.mean(f),
    }
    close(ours["metrics"], expected, rtol=1e-4)
    assert ours["loss"] == pytest.approx(float(value + rest), rel=1e-5)
    assert lecam > 0.01 and penalty > 0.01
    close(ours["stats"], update_lecam(STATS, r, f, 0.999), rtol=1e-5)


def test_start_step_and_r1_every():
    config = dataclasses.replace(CONFIG, start_step=3, r1_every=4)
    run = functools.partial(gradients(config), *inputs(), STATS)
    before = jax.device_get(run(jnp.int32(2)))
    assert all(np.all(g == 0) for g in jax.tree.leaves(before["grads"]))
    assert before["loss"] == 0 and before["stats"] == STATS
    without, due = jax.device_get((run(jnp.int32(3)), run(jnp.int32(8))))
    assert without["metrics"]["r1"] == 0
    ours = reference()
    close(due["metrics"], ours["metrics"], rtol=1e-5)
    close(due["stats"], ours["stats"], rtol=1e-5)
    # The penalty comes with four times its weight.
    expected = jax.tree.map(lambda a, b: a + 4 * (b - a), without["grads"], ours["grads"])
    close(due["grads"], expected, atol=1e-4)
    r1 = 10.0 * ours["metrics"]["r1"]
    assert due["loss"] == pytest.approx(without["loss"] + 4 * r1, rel=1e-4) and r1 > 0.01


def test_eight_devices_equal_one():
    """Pixels divided too; XLA must sum the gradients of both networks and of R1 rightly."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    params, real, fake = inputs()
    params = place(params, state_shardings(params, mesh))
    real, fake = (place(x, batch_sharding(mesh)) for x in (real, fake))
    with jax.set_mesh(mesh):
        run = gradients(CONFIG, Layout(mesh))
        ours = jax.device_get(run(params, real, fake, STATS, jnp.int32(0)))
    expected = reference()
    close(ours, expected, rtol=1e-4, atol=1e-5)
    assert min(np.abs(g).max() for g in jax.tree.leaves(expected["grads"])) > 1e-4


def test_bfloat16_follows_float32():
    model = dataclasses.replace(CONFIG.discriminator, dtype="bfloat16")
    config = dataclasses.replace(CONFIG, discriminator=model)
    ours, expected = gradients(config)(*inputs(), STATS, jnp.int32(0)), reference()
    assert all(x.dtype == np.float32 and np.all(np.isfinite(x)) for x in jax.tree.leaves(ours))
    assert ours["loss"] == pytest.approx(expected["loss"], rel=0.02)
    a, b = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(o["grads"][0])])
        for o in (ours, expected)
    )
    assert a @ b > 0.995 * np.linalg.norm(a) * np.linalg.norm(b)


def test_a_joint_step_separates_and_pulls():
    """The discriminator tells two colours apart; the generated one then moves to the real one."""
    config = dataclasses.replace(CONFIG, lecam_weight=0.001, r1_weight=0.1)
    params, _, _ = inputs()
    shape = (4, *config.discriminator.clip, 3)
    real, step = jnp.full(shape, 0.6), jnp.int32(0)
    optimizer = optax.adam(3e-3, b1=0.0, b2=0.99)

    @jax.jit
    def update(params, color, stats, opt_state, rate):
        def loss_fn(params, color):
            fake = jnp.broadcast_to(color, shape)
            loss, metrics, new = adversarial_losses(
                config, network_of(config.discriminator), params, real, fake, stats, step
            )
            return loss, (metrics, new)

        (_, (metrics, stats)), grads = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(
            params, color
        )
        updates, opt_state = optimizer.update(grads[0], opt_state)
        color = color - rate * jnp.sign(grads[1])
        return optax.apply_updates(params, updates), color, stats, opt_state, metrics

    color, stats, opt_state = jnp.full((3,), -0.6), init_lecam(), optimizer.init(params)
    for _ in range(40):
        params, color, stats, opt_state, metrics = update(params, color, stats, opt_state, 0.0)
    assert metrics["discriminator_accuracy_real"] == metrics["discriminator_accuracy_fake"] == 1.0
    assert metrics["discriminator"] < 0.3 < 2 * np.log(2)
    assert stats["lecam_real"] > 0 > stats["lecam_fake"]
    for _ in range(25):
        params, color, stats, opt_state, metrics = update(params, color, stats, opt_state, 0.02)
    assert np.all(color > -0.3)


def test_without_r1_the_penalty_is_not_computed():
    config = dataclasses.replace(CONFIG, r1_weight=0.0)
    arguments = (*inputs(), STATS, jnp.int32(0))

    def operations(config):
        return str(gradients(config).trace(*arguments).jaxpr).count("conv_general_dilated")

    assert operations(config) < 0.7 * operations(CONFIG)


def test_a_bad_r1_every_is_refused():
    with pytest.raises(UserError, match="r1_every=0 must be at least 1"):
        AdversarialConfig(r1_every=0)
