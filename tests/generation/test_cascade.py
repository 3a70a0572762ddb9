"""Cascades: each stage enlarges what the one before made."""

import dataclasses

import numpy as np
import pytest
from tiny_generators import generator

from walt_jax.diffusion import Constant, Ddim
from walt_jax.errors import UserError
from walt_jax.generation.cascade import Cascade
from walt_jax.models import DenoiserConfig
from walt_jax.tasks import DenoiserTask, Wanted

BASE = DenoiserTask(
    tokenizer="",
    model=DenoiserConfig(
        grid=(2, 2, 2),
        latent_channels=2,
        width=16,
        num_heads=2,
        num_layers=2,
        windows=((1, 0, 0), (0, 0, 0)),
        num_classes=3,
        remat=False,
        dtype="float32",
    ),
)


def enlarging(grid, **change):
    model = dataclasses.replace(BASE.model, grid=grid, upsampling=(1, 2, 2), **change)
    return dataclasses.replace(BASE, model=model)


LARGER, LARGEST = enlarging((2, 4, 4), num_classes=0), enlarging((2, 8, 8))
LABELS = np.array([0, 2, 1], np.int32)
QUICK = {"sampler": Ddim(num_steps=2)}


def seed_of(stage, seed=4):
    return int(np.random.SeedSequence((seed, stage)).generate_state(1)[0])


@pytest.fixture(scope="module")
def stages():
    return generator(BASE), generator(LARGER), generator(LARGEST, seed=2)


@pytest.fixture(scope="module")
def videos(stages):
    cascade = Cascade(stages)
    assert cascade.video_shape == (5, 64, 64) and cascade.fps == 8.0
    return cascade.sample(LABELS, seed=4, progress=False, batch_size=3, **QUICK)


@pytest.mark.slow
def test_stages_by_hand(stages, videos):
    """The same tokenizer hands latents on; another one encodes the pixels."""
    base, larger, largest = stages
    rows = np.arange(3)
    options = {"per_device": 3, **QUICK}
    ((_, small),) = base.stream(
        rows, lambda _: Wanted(label=LABELS), seed=seed_of(0), decode=False, **options
    )
    ((_, middle),) = larger.stream(
        rows, lambda _: Wanted(low=small), seed=seed_of(1), decode=False, **options
    )
    low = largest.encode(larger.decode(middle))
    ((_, found),) = largest.stream(
        rows, lambda _: Wanted(label=LABELS, low=low), seed=seed_of(2), **options
    )
    assert videos.shape == (3, 5, 64, 64, 3)
    np.testing.assert_array_equal(videos, found)
    assert np.abs(videos[0].astype(int) - videos[1]).max() > 8


def test_clips_of_ones_own_are_enlarged(stages):
    clips = np.random.default_rng(0).integers(0, 255, (2, 5, 16, 16, 3), np.uint8)
    ((rows, found),) = Cascade(stages[:2]).stream(
        np.array([1]), LABELS, videos=clips, seed=4, **QUICK
    )
    low = stages[1].encode(clips[1:])
    ((_, expected),) = stages[1].stream(rows, lambda _: Wanted(low=low), seed=seed_of(1), **QUICK)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="clips of 5x16x16, not of 1x16x16"):
        next(Cascade(stages[:2]).stream(rows, LABELS, videos=clips[:, :1], **QUICK))


@pytest.mark.slow
def test_a_video_is_the_same_in_other_batches_of_the_stages(stages, videos):
    streamed = Cascade(stages).stream(
        np.array([2, 0]), LABELS, seed=4, per_device=(2, 2, 1), **QUICK
    )
    found = {number: video for numbers, batch in streamed for number, video in zip(numbers, batch)}
    assert sorted(found) == [0, 2]
    for number, video in found.items():
        assert np.abs(video.astype(int) - videos[number]).max() <= 1


@pytest.mark.slow
def test_stages_have_samplers_guidance_and_noise_of_their_own(stages, videos):
    found = Cascade(stages[:2]).sample(
        LABELS[:1],
        seed=4,
        progress=False,
        sampler=[Ddim(num_steps=2), Ddim(num_steps=3)],
        guidance=[Constant(2.0), Constant(1.0)],
        low_noise=[0.2],
    )
    assert found.shape == (1, 5, 32, 32, 3)


@pytest.mark.parametrize(
    "chosen, words",
    [
        ((LARGER, LARGEST), "first model of the cascade makes clips larger"),
        ((BASE, BASE), "Model 2 of the cascade takes no smaller clips"),
        (
            (BASE, LARGEST),
            "Model 2 of the cascade enlarges clips of 5x32x32, but model 1 makes 5x16x16",
        ),
    ],
)
def test_stages_that_do_not_follow_are_one_sentence(chosen, words):
    with pytest.raises(UserError, match=words):
        Cascade(tuple(generator(task) for task in chosen))


def test_other_mistakes_are_one_sentence(stages):
    cascade = Cascade(stages)
    with pytest.raises(UserError, match="4 frames a second, but model 1 at 8"):
        Cascade((stages[0], generator(LARGER, fps=4.0)))
    with pytest.raises(UserError, match="has classes: give labels"):
        cascade.sample(count=1, progress=False)
    with pytest.raises(UserError, match="takes 3 samplers, got 2"):
        cascade.sample(LABELS, sampler=[Ddim(), Ddim()], progress=False)
    with pytest.raises(UserError, match="one number of videos, got none"):
        cascade.sample()
