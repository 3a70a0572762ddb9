"""What the denoiser's task makes of a batch, and how it samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.diffusion import (
    Constant,
    Ddim,
    Ddpm,
    Diffusion,
    EpsSigma,
    Euler,
    Linear,
    RectifiedFlow,
    Velocity,
    standard_normal,
)
from walt_jax.errors import UserError
from walt_jax.models import Conditions, DenoiserConfig
from walt_jax.models.text import ByteEncoderConfig, to_bytes
from walt_jax.parallel import Layout
from walt_jax.tasks import DenoiserTask, GivenConfig, Wanted, sample_keys
from walt_jax.tasks.frozen import Frozen

MODEL = DenoiserConfig(
    grid=(3, 4, 4),
    latent_channels=2,
    width=16,
    num_heads=2,
    num_layers=2,
    windows=((1, 0, 0), (0, 2, 2)),
    remat=False,
    dtype="float32",
)
TASK = DenoiserTask(tokenizer="", model=MODEL)
BATCH = {
    "latents": np.random.default_rng(0).normal(size=(4, 3, 4, 4, 2)).astype(np.float16),
    "label": np.arange(4, dtype=np.int32),
}
TEXT = ByteEncoderConfig(width=8, num_layers=1, num_heads=2, max_bytes=12, dtype="float32")
STEP = np.zeros((), np.int32)


class Pixels:
    """Stands for a tokenizer: latents are pixels, the first two channels of blocks of 8 x 8."""

    def encode(self, x, layout):
        return x[:, ::4, ::8, ::8, :2]

    def decode(self, z, layout):
        return z


def change(task=TASK, *, model=None, **fields):
    return dataclasses.replace(
        task, model=dataclasses.replace(task.model, **(model or {})), **fields
    )


@functools.cache
def random_params(task):
    """Random everywhere: fresh ones start with zero gates and output."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), shapes)


def loss(task, batch=BATCH, params=None, key=3):
    params = random_params(task) if params is None else params

    @jax.jit
    def run(params, batch):
        return task.loss(params, {}, Frozen(Pixels()), batch, jax.random.key(key), STEP, Layout())[
            0
        ]

    value = run(params, batch)
    return value if isinstance(value, jax.core.Tracer) else float(value)


def by_hand(task, predict, frames=slice(None)):
    """The loss of `BATCH` where the network's answer is `predict(params, x_t, t)`."""
    keys = sample_keys(jax.random.key(3), 4)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    t, x0 = task.diffusion.process.draw_times(fold(keys, 0)), BATCH["latents"].astype(np.float32)
    eps = standard_normal(fold(keys, 2), x0.shape[1:])
    x_t = task.diffusion.add_noise(x0, eps, t)
    v = task.diffusion.target.of(x0, eps, *task.diffusion.process.levels(t, x0))
    return jnp.square(predict(x_t, t) - v)[:, frames].mean()


def test_self_conditioning_tells_the_networks_own_estimate_without_its_gradient():
    task = change(model={"self_conditioning": True}, self_conditioning=1.0)
    params = random_params(task)

    def expected(params, fixed):
        def predict(x_t, t):
            guess = task.network.bind(fixed)(x_t, t)
            estimate = task.diffusion.read(guess, x_t, t).x0
            return task.network.bind(params)(x_t, t, Conditions(estimate=estimate))

        return by_hand(task, predict)

    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(task, params=p)))(params)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(expected))(params, params)
    value = float(value)
    assert value == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), grads, wanted_grads
    )
    without = change(task, self_conditioning=0.0)
    once = float(by_hand(task, lambda x_t, t: task.network.bind(params)(x_t, t)))
    assert loss(without, params=params) == pytest.approx(once, rel=1e-5)
    some = change(task, self_conditioning=0.5)  # a coin a clip: between the two
    assert loss(some, params=params) not in (pytest.approx(value), pytest.approx(once))


@pytest.mark.parametrize("how", ["channels", "in_place"])
def test_given_frames_are_clean_and_count_in_no_loss(how):
    given = GivenConfig(first=1.0, first_frames=(2,))
    task = change(model={"given": how}, given=given)
    params, x0 = random_params(task), BATCH["latents"].astype(np.float32)
    mask = np.zeros((4, 3, 4, 4), bool)
    mask[:, :2] = True
    told = Conditions(given=jnp.asarray(x0), given_mask=jnp.asarray(mask))
    expected = by_hand(task, lambda x, t: task.network.bind(params)(x, t, told), slice(2, None))
    assert loss(task) == pytest.approx(float(expected), rel=1e-5)


def test_sampling_keeps_what_is_given_and_guides_by_it():
    task = change(model={"given": "channels"}, given=GivenConfig(first=0.5))
    given = np.random.default_rng(1).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    mask = np.zeros((2, 3, 4, 4), bool)
    mask[:, 0] = True

    params = random_params(task)

    @functools.partial(jax.jit, static_argnums=1)
    def sample(given, scale):
        return task.sample(
            params,
            Pixels(),
            Wanted(given=given, given_mask=mask),
            jax.random.split(jax.random.key(0), 2),
            Ddim(num_steps=2),
            given_guidance=Constant(scale),
        )

    z = np.asarray(sample(given, 1.0))
    np.testing.assert_array_equal(z[:, 0], given[:, 0])
    hidden = given.copy()
    hidden[:, 1:] = 7.0  # what is not given is not looked at
    np.testing.assert_array_equal(sample(hidden, 1.0), z)
    other = given.copy()
    other[:, 0] += 1.0
    assert np.abs(sample(other, 1.0) - z)[:, 1:].max() > 1e-3
    assert np.abs(sample(given, 3.0) - z)[:, 1:].max() > 1e-3


def test_the_network_sees_given_latents_as_noisy_as_in_training(monkeypatch):
    task = change(model={"given": "channels"}, given=GivenConfig(first=0.5))
    given = np.random.default_rng(1).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    mask = np.zeros((2, 3, 4, 4), bool)
    mask[:, 0] = True
    seen = []

    def predict(self, params, x, t, conditions, layout):
        jax.debug.callback(lambda *now: seen.append(now), x, t, ordered=True)
        return jnp.zeros_like(x)

    monkeypatch.setattr(DenoiserTask, "_predict", predict)
    keys = jax.random.split(jax.random.key(0), 2)
    wanted = Wanted(given=given, given_mask=mask)
    task.sample({}, Pixels(), wanted, keys, Ddim(num_steps=3))
    noise = standard_normal(keys, given.shape[1:])
    assert len(seen) == 3
    for x, t in seen:
        expected = task.diffusion.add_noise(given, noise, jnp.asarray(t))
        np.testing.assert_allclose(x[:, 0], expected[:, 0], atol=1e-6)
        assert np.abs(x - expected)[:, 1:].max() > 0.01 or t[0] == 999


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(label=np.zeros(2, np.int32)), "takes no 'label'"),
        (Wanted(low=np.zeros((2, 3, 2, 2, 2), np.float32)), "takes no 'low'"),
        (Wanted(text=np.zeros((2, 4), np.uint8)), "takes no 'text'"),
        (Wanted(given=np.zeros((2, 3, 4, 4, 2), np.float32)), "takes no 'given'"),
    ],
)
def test_what_a_model_was_not_built_for_is_one_sentence(wanted, message):
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(UserError, match=message):
        TASK.sample({}, Pixels(), wanted, keys, Ddim(num_steps=1))
    given = change(model={"given": "channels"}, given=GivenConfig(first=0.5))
    alone = Wanted(given=np.zeros((2, 3, 4, 4, 2), np.float32))
    with pytest.raises(UserError, match="together: give both"):
        given.sample({}, Pixels(), alone, keys, Ddim(num_steps=1))


def test_guidance_goes_from_nothing_said_to_all():
    wanted = Wanted(
        label=jnp.array([1, 2]),
        text=jnp.ones((2, 3), np.uint8),
        given=jnp.ones((2, 1, 1, 1, 1)),
        given_mask=jnp.ones((2, 1, 1, 1), bool),
    )
    steps, scales = wanted.steps(5, Constant(2.0), Constant(3.0))
    assert scales == [Constant(3.0), Constant(2.0)]
    assert [bool(s.given_mask.any()) for s in steps] == [False, True, True]
    assert [s.label.tolist() for s in steps] == [[5, 5], [5, 5], [1, 2]]
    assert [int(s.text.sum()) for s in steps] == [0, 0, 6]
    assert Wanted(low=jnp.ones(2)).steps(0, Constant(2.0), Constant(2.0))[1] == []


def test_guidance_leads_away_from_what_is_negative():
    said, other = jnp.ones((2, 3), np.uint8), jnp.full((2, 3), 7, np.uint8)
    wanted = Wanted(text=said, negative=other, given=jnp.ones((2, 1, 1, 1, 1)))
    wanted = dataclasses.replace(wanted, given_mask=jnp.ones((2, 1, 1, 1), bool))
    steps, scales = wanted.steps(0, Constant(2.0), Constant(3.0))
    assert scales == [Constant(3.0), Constant(2.0)]
    assert [int(s.text[0, 0]) for s in steps] == [7, 7, 1]
    assert all(s.negative is None for s in steps)
    with pytest.raises(UserError, match="acts through guidance, which is 1, none: raise it"):
        wanted.steps(0, Constant(1.0), Constant(3.0))
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(UserError, match="takes 'negative' beside 'text' alone"):
        TASK.sample({}, Pixels(), Wanted(negative=said), keys, Ddim(num_steps=1))


@pytest.mark.slow
def test_samples_lead_away_from_negative_prompts():
    task = change(model={"text_features": 8}, text=TEXT)
    text = np.stack([to_bytes(t, 12) for t in ("red", "green")])
    params, keys = random_params(task), jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def sample(wanted):
        return task.sample(params, Pixels(), wanted, keys, Ddim(num_steps=1), Constant(3.0))

    plain = sample(Wanted(text=text))
    away = sample(Wanted(text=text, negative=np.stack([to_bytes("blue", 12), to_bytes("", 12)])))
    assert np.abs(away - plain)[0].max() > 1e-3
    np.testing.assert_allclose(away[1], plain[1], atol=1e-5)  # "" is nothing


def test_images_join_with_their_share():
    images = {"latents": BATCH["latents"][:2, :1] + 1, "label": BATCH["label"][:2]}
    joint = BATCH | {f"image/{name}": array for name, array in images.items()}
    task = change(model={"given": "channels", "num_classes": 4}, given=GivenConfig(first=0.5))

    params = random_params(task)

    @jax.jit
    def run(batch):
        return task.loss(params, {}, Frozen(Pixels()), batch, jax.random.key(3), STEP, Layout())

    total, (metrics, _) = jax.device_get(run(joint))
    assert metrics["loss/videos"] == pytest.approx(loss(task), rel=1e-5)
    assert total == pytest.approx(
        (4 * metrics["loss/videos"] + 2 * metrics["loss/images"]) / 6, rel=1e-5
    )
    moved = joint | {"image/latents": joint["image/latents"] + 1}
    assert run(moved)[1][0]["loss/images"] != pytest.approx(metrics["loss/images"])


def test_text_is_read_by_an_encoder_that_learns():
    task = change(model={"text_features": 8}, text=TEXT, text_dropout=0.0)
    text = np.stack([to_bytes(t, 12) for t in ("red", "green", "été", "")])
    assert text.dtype == np.uint8 and text[2].tolist() == [195, 169, 116, 195, 169] + [0] * 7
    other = np.stack([to_bytes(t, 12) for t in ("red", "blue", "été", "")])
    told, changed = BATCH | {"text": text}, BATCH | {"text": other}
    assert loss(task, told) != pytest.approx(loss(task, changed))
    silent = change(task, text_dropout=1.0)
    assert loss(silent, told) == pytest.approx(loss(silent, changed))
    grads = jax.grad(lambda p: loss(task, told, p))(random_params(task))["text"]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(UserError, match="caption_bytes is 0"):
        loss(task)
    with pytest.raises(UserError, match="Texts of 13 bytes do not fit"):
        loss(task, BATCH | {"text": np.zeros((4, 13), np.uint8)})


def test_padding_of_a_text_is_not_read():
    """The same caption, filled up to other lengths."""
    task = change(model={"text_features": 8}, text=TEXT, text_dropout=0.0)
    values = [
        loss(task, BATCH | {"text": np.stack([to_bytes("a red dot", n)] * 4)}) for n in (9, 12)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_super_resolution_reads_the_averaged_pixels():
    task = change(model={"upsampling": (1, 2, 2), "num_classes": 0}, low_noise=0.0)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, 9, 32, 32, 3), np.uint8)
    batch = {"video": video, "label": np.zeros(2, np.int32)}
    before = loss(task, batch)
    # Pixels that the stand-in does not take for latents, in a block that it does when averaged.
    changed = video.copy()
    changed[:, :, 1, 1] //= 2
    assert loss(task, batch | {"video": changed}) != pytest.approx(before)
    changed = video.copy()
    changed[:, :, 7, 7] //= 2
    assert loss(task, batch | {"video": changed}) == pytest.approx(before)
    assert loss(change(task, low_noise=1.0), batch) != pytest.approx(before)
    low, params = rng.normal(size=(2, 3, 2, 2, 2)).astype(np.float32), random_params(task)

    @jax.jit
    def sample(low, low_noise):
        return task.sample(
            params,
            Pixels(),
            Wanted(low=low),
            jax.random.split(jax.random.key(0), 2),
            Ddim(num_steps=2),
            low_noise=low_noise,
        )

    z = sample(low, 0.0)
    assert z.shape == (2, 3, 4, 4, 2)
    assert np.abs(sample(low + 1, 0.0) - z).max() > 1e-3
    assert np.abs(sample(low, 0.5) - z).max() > 1e-3


def test_an_image_is_sampled_by_a_model_of_videos():
    keys = jax.random.split(jax.random.key(0), 2)
    options = {"sampler": Ddim(num_steps=1), "grid": (1, 4, 4)}
    z = TASK.sample(random_params(TASK), Pixels(), Wanted(), keys, **options)
    assert z.shape == (2, 1, 4, 4, 2) and np.isfinite(z).all()
    start = Wanted(start=np.zeros((2, 3, 4, 4, 2), np.float32))
    with pytest.raises(UserError, match=r"grid of \(1, 4, 4\) latents takes 'start'.*not \(3, 4"):
        TASK.sample({}, Pixels(), start, keys, **options)


def test_sampling_starts_from_noised_latents():
    """The fewer steps are left, the nearer to the start; strength 1 is noise alone."""
    keys, params = jax.random.split(jax.random.key(0), 2), random_params(TASK)
    start = np.random.default_rng(1).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)

    def sample(strength, start=start):
        wanted, sampler = Wanted(start=start), Ddim(num_steps=10)
        return TASK.sample(params, Pixels(), wanted, keys, sampler, strength=strength)

    moved = [float(np.abs(sample(strength) - start).mean()) for strength in (0.1, 0.4, 0.8)]
    assert 0 < moved[0] < moved[1] < moved[2]
    np.testing.assert_allclose(sample(1.0), sample(1.0, None), atol=1e-5)  # zero terminal SNR
    with pytest.raises(UserError, match=r"leaves none of the 10 steps.*raise strength"):
        sample(0.01)


def test_a_learned_variance_and_flow_train_and_sample():
    sigma = change(
        model={"learned_sigma": True, "num_classes": 4},
        diffusion=Diffusion(process=Linear(zero_terminal_snr=False), target=EpsSigma()),
        sampler=Ddpm(num_steps=3, variance="learned"),
    )
    flow = change(
        diffusion=Diffusion(process=RectifiedFlow(), target=Velocity()), sampler=Euler(num_steps=3)
    )
    for task, guidance in ((sigma, Constant(2.0)), (flow, Constant(1.0))):
        assert np.isfinite(loss(task))
        wanted = Wanted(label=jnp.arange(2)) if task.model.num_classes else Wanted()
        keys = jax.random.split(jax.random.key(0), 2)
        z = task.sample(random_params(task), Pixels(), wanted, keys, task.sampler, guidance)
        assert z.shape == (2, 3, 4, 4, 2) and np.isfinite(z).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_dropout": 1.5}, "class_dropout must lie in 0 to 1"),
        ({"sampler": Ddim(num_steps=2000)}, "takes 1 to 1000 steps"),
        ({"model": {"num_heads": 0}}, "num_heads must be positive, got 0"),
        ({"model": {"windows": ((0, -8, 8),)}}, "windows must be 0 or more"),
        ({"model": {"learned_sigma": True}}, "belongs to eps_sigma"),
        ({"model": {"text_features": 4}}, "must be the width of config.task.text, 0"),
        ({"model": {"given": "in_place"}}, "sum to 0: set both"),
        ({"given": GivenConfig(first=0.5)}, "model.given='none'"),
        ({"diffusion": Diffusion(process=RectifiedFlow(), target=Velocity())}, "sampler ddim"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(fields, message):
    with pytest.raises(UserError, match=message):
        change(**fields)
