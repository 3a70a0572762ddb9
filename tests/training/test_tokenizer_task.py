"""The tokenizer's training: every loss in one step, images beside videos, a 2D start."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import TokenizerConfig
from walt_jax.models.discriminator import DiscriminatorConfig
from walt_jax.models.tokenizer.quantizers import Kl, Lfq
from walt_jax.parallel import Layout
from walt_jax.tasks import TokenizerTask
from walt_jax.tasks.adversarial import AdversarialConfig
from walt_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from walt_jax.training.state import TrainState, train_step

MODEL = TokenizerConfig(
    channels=8,
    multipliers=(1, 2),
    num_res_blocks=(0, 1),
    temporal_downsample=(True,),
    latent_channels=10,
    norm_groups=4,
    dtype="float32",
)
GAN = AdversarialConfig(
    discriminator=DiscriminatorConfig(
        channels=8, multipliers=(1, 1), clip=(5, 16, 16), dtype="float32"
    )
)
rng = np.random.default_rng(0)
BATCH = {
    "video": rng.integers(0, 256, (4, 5, 16, 16, 3), np.uint8),
    "image/video": rng.integers(0, 256, (8, 1, 16, 16, 3), np.uint8),
    "label": np.zeros((4,), np.int32),
    "fps": np.ones((4,), np.float32),
}


def run(task, batch, steps, rate=1e-3):
    """Metrics of each step, and the last state."""
    config = OptimizerConfig(
        learning_rate=rate, warmup_steps=1, b1=0.0, grad_clip=0.0, ema_decay=0.9
    )
    optimizer = make_optimizer(config, 10_000, task.starts)
    state = jax.jit(functools.partial(TrainState.create, task, optimizer))(jax.random.key(0))
    step = jax.jit(
        functools.partial(
            train_step,
            task=task,
            optimizer=optimizer,
            schedule=make_schedule(config, 10_000),
            config=config,
            layout=Layout(),
        )
    )
    history = []
    for _ in range(steps):
        state, metrics = step(state, {}, batch, jax.random.key(1))
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state)


def losses(task, batch):
    """Loss and metrics at the start, without an update."""
    params, extra = task.init(jax.random.key(0)), task.init_extra()

    @jax.jit
    def loss(params, batch):
        key, step = jax.random.key(1), np.zeros((), np.int32)
        value, (metrics, _) = task.loss(params, extra, {}, batch, key, step, Layout())
        return metrics | {"loss": value}

    return jax.device_get(loss(params, batch))


def test_every_loss_in_one_step():
    task = TokenizerTask(
        model=dataclasses.replace(MODEL, quantizer=Lfq()),
        adversarial=dataclasses.replace(GAN, start_step=2),
    )
    history, state = run(task, BATCH, 4)
    assert all(np.isfinite(v) for metrics in history for v in metrics.values())
    norms = ["encoder", "decoder", "discriminator"]
    assert {f"grad_norm/{k}" for k in norms} <= history[0].keys()
    assert [m["grad_norm/discriminator"] > 0 for m in history] == [False, False, True, True]
    assert history[0]["r1"] == 0 < history[3]["r1"]
    assert history[3]["code_perplexity"] > 1 and 0 < history[3]["code_use"] <= 1
    assert state.extra["code_counts"].sum() == pytest.approx(4 * 3 * 8 * 8, rel=1e-3)
    assert state.extra["lecam_real"] != 0
    assert {"image/mse", "commitment", "discriminator_accuracy_real"} <= history[0].keys()


def test_a_late_discriminator_starts_as_small_as_an_early_one():
    """Steps before it count for the learning rate, and not for Adam's bias correction."""
    task = TokenizerTask(model=MODEL, adversarial=dataclasses.replace(GAN, start_step=3))
    assert task.starts == {"discriminator": 3}
    assert TokenizerTask(model=MODEL, adversarial=GAN).starts == {}
    config = OptimizerConfig(1.0, warmup_steps=10, b1=0.0, weight_decay=0.1, grad_clip=0.0)
    optimizer = make_optimizer(config, 100, task.starts)
    params = {name: {"kernel": np.full((3,), 2.0)} for name in ("encoder", "discriminator")}
    gradient, state = {"kernel": np.array([-3.0, 0.1, 4.0])}, optimizer.init(params)
    for step in range(5):
        rate = float(make_schedule(config, 100)(step))
        late = {"kernel": np.zeros((3,))} if step < 3 else gradient
        grads = {"encoder": gradient, "discriminator": late}
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        expected = -rate * (np.sign(gradient["kernel"]) + 0.1 * 2.0)
        np.testing.assert_allclose(updates["encoder"]["kernel"], expected, rtol=1e-5)
        expected = expected if step >= 3 else 0 * expected
        np.testing.assert_allclose(updates["discriminator"]["kernel"], expected, rtol=1e-5)


def test_images_weigh_as_much_as_clips():
    """The reconstruction loss of a joint batch is the mean over all its clips and images."""
    task = TokenizerTask(model=MODEL)
    joint = losses(task, BATCH)
    alone = losses(task, {k: v for k, v in BATCH.items() if k != "image/video"})
    mean = (4 * alone["mse"] + 8 * joint["image/mse"]) / 12
    assert joint["mse"] == pytest.approx(alone["mse"], rel=1e-5)
    assert joint["loss"] == pytest.approx(5 * mean, rel=1e-5)


def test_kl_draws_its_latents_and_pays_for_them():
    task = TokenizerTask(model=dataclasses.replace(MODEL, quantizer=Kl(weight=1.0)))
    videos = {"video": BATCH["video"]}
    priced = losses(task, videos)
    assert priced["kl"] > 0
    assert priced["loss"] == pytest.approx(5 * priced["mse"] + priced["kl"], rel=1e-5)
    again = task.evaluate(task.init(jax.random.key(0)), {}, {}, videos, jax.random.key(1), Layout())
    assert not np.isclose(again["mse"].mean(), priced["mse"], rtol=1e-4)  # the mean, not a draw


@pytest.mark.parametrize("frames", [1, 5])
def test_evaluation_gives_each_frame(frames):
    task = TokenizerTask(model=MODEL)
    params = task.init(jax.random.key(0))
    batch = BATCH | {"video": BATCH["video"][:, :frames]}
    metrics = task.evaluate(params, {}, {}, batch, jax.random.key(0), Layout())
    each = [metrics[f"psnr_db/frame_{t:02d}"] for t in range(frames)]
    errors = np.mean([10 ** (-np.asarray(v) / 10) for v in each], axis=0)
    np.testing.assert_allclose(-10 * np.log10(errors), metrics["psnr_db"], rtol=1e-5)
    assert all(v.shape == (4,) for v in metrics.values())


def test_a_clip_of_another_size_than_the_discriminators_is_one_sentence():
    task = TokenizerTask(model=MODEL, adversarial=GAN)
    with pytest.raises(UserError, match="discriminator"):
        losses(task, {"video": BATCH["video"][:, :3]})
