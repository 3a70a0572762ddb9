"""Which frames of long clips training is made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig
from walt_jax.parallel import Layout
from walt_jax.tasks import DenoiserTask, GivenConfig
from walt_jax.tasks.base import sample_keys
from walt_jax.tasks.frames import FramesConfig, pick_frames
from walt_jax.tasks.plans import plan, window_of

LONG, WINDOW, DRAWS = 33, 6, 400
KEYS = sample_keys(jax.random.key(1), DRAWS)
LATENTS = jnp.broadcast_to(
    jnp.arange(LONG, dtype=jnp.float32)[:, None, None, None], (1, LONG, 1, 1, 1)
)
MODEL = DenoiserConfig(
    grid=(4, 4, 4),
    latent_channels=2,
    width=16,
    num_heads=2,
    num_layers=2,
    windows=((1, 0, 0), (0, 2, 2)),
    given="channels",
    frame_times=True,
    relative_bias=False,
    remat=False,
    dtype="float32",
)
TASK = DenoiserTask(tokenizer="", model=MODEL, frames=FramesConfig(planned=0.0))


def draw(**options):
    """Places and given (N, K) of many clips."""
    config = FramesConfig(**options)
    latents = jnp.broadcast_to(LATENTS, (DRAWS, *LATENTS.shape[1:]))
    picked, places, given = jax.jit(lambda k, x: pick_frames(config, k, x, WINDOW))(KEYS, latents)
    np.testing.assert_array_equal(picked[..., 0, 0, 0], places)
    return np.asarray(places), np.asarray(given)


@pytest.mark.parametrize("planned", [0.0, 0.5, 1.0])
def test_frames_rise_within_the_clip_and_some_are_to_be_generated(planned):
    places, given = draw(planned=planned)
    assert places.min() >= 0 and places.max() < LONG
    assert (np.diff(places) > 0).all()
    assert (~given).any(axis=1).all()


def test_groups_are_dense_and_wide_and_are_given_or_not():
    places, given = draw(planned=0.0)
    spans = places[:, -1] - places[:, 0]
    assert (spans == WINDOW - 1).any() and (spans > 0.8 * LONG).any()
    shares = given.mean(axis=1)
    assert (shares == 0).any() and (shares > 0.5).any() and 0.2 < shares.mean() < 0.5
    assert len(np.unique(places)) == LONG


def test_planned_clips_are_steps_of_the_plans():
    schemes = ("autoregressive", "hierarchy2")
    places, given = draw(planned=1.0, schemes=schemes, first=0.25)
    steps = {
        tuple(map(tuple, window_of(step, WINDOW)))
        for scheme in schemes
        for step in plan(scheme, LONG, WINDOW)
    }
    found = {(tuple(p), tuple(g)) for p, g in zip(places, given)}
    assert found <= steps and len(found) > 0.8 * len(steps)
    assert (~given).all(axis=1).mean() == pytest.approx(0.25, abs=0.06)


def test_a_clips_frames_depend_on_its_key_alone():
    many, _ = draw()
    few = jax.jit(lambda k, x: pick_frames(FramesConfig(), k, x, WINDOW)[1])
    few = few(KEYS[7:9], jnp.tile(LATENTS, (2, 1, 1, 1, 1)))
    np.testing.assert_array_equal(few, many[7:9])


def test_the_network_is_told_the_frames_and_errs_on_the_others_alone():
    rng = np.random.default_rng(0)
    batch = {
        "latents": rng.normal(size=(8, 12, 4, 4, 2)).astype(np.float16),
        "label": np.zeros(8, np.int32),
    }
    shapes = jax.eval_shape(TASK.init, jax.random.key(0))
    params = jax.tree.map(
        lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), shapes
    )

    def loss(params, batch):
        return TASK.loss(params, {}, None, batch, jax.random.key(0), 0, Layout())[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert np.isfinite(value)
    assert np.abs(grads["frame_times"]["dense"]["kernel"]).max() > 0
    scores = jax.jit(lambda p, b: TASK.evaluate(p, {}, None, b, jax.random.key(0), Layout()))
    assert scores(params, batch)["loss"].shape == (8,)


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match=r"3 latent frames.*takes 6"):
        pick_frames(FramesConfig(), KEYS[:1], LATENTS[:, :3], WINDOW)
    with pytest.raises(UserError, match=r"'adaptive'.*training draws from"):
        FramesConfig(schemes=("adaptive",))
    with pytest.raises(UserError, match="schemes is empty"):
        FramesConfig(schemes=())
    with pytest.raises(UserError, match="must lie in 0 to 1"):
        FramesConfig(planned=1.5)
    with pytest.raises(UserError, match=r"no shares in config.task.given"):
        dataclasses.replace(TASK, given=GivenConfig(first=0.5))
