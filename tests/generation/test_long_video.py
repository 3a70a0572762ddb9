"""Long videos: the plans are followed, and what comes is a stream without seams."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_generators import generator

from walt_jax.diffusion import Ddim
from walt_jax.errors import UserError
from walt_jax.generation.long_video import generate_long
from walt_jax.models import DenoiserConfig
from walt_jax.tasks import DenoiserTask, GivenConfig, Wanted, to_uint8, to_unit

MODEL = DenoiserConfig(
    grid=(4, 2, 2),
    latent_channels=2,
    width=16,
    num_heads=2,
    num_layers=2,
    windows=((1, 0, 0), (0, 0, 0)),
    num_classes=3,
    given="channels",
    frame_times=True,
    relative_bias=False,
    remat=False,
    dtype="float32",
)
LONG = DenoiserTask(tokenizer="", model=MODEL)
CLIPS = dataclasses.replace(
    LONG,
    model=dataclasses.replace(MODEL, frame_times=False),
    given=GivenConfig(first=0.5, first_frames=(1, 2)),
)
QUICK = {"sampler": Ddim(num_steps=2), "progress": False}


@pytest.fixture(scope="module")
def of_stream():
    return generator(LONG)


@pytest.fixture(scope="module")
def of_clips():
    return generator(CLIPS)


def labels(*values):
    return Wanted(label=np.array(values, np.int32))


ONE = labels(0)


def make(generator, num_frames, wanted=ONE, **options):
    return np.concatenate(list(generate_long(generator, num_frames, wanted, **QUICK, **options)), 1)


@pytest.mark.parametrize(
    "scheme", ["frame_prediction", "long_range", "hierarchy2", "hierarchy3", "adaptive"]
)
def test_frames_are_those_of_the_latents_decoded_as_a_whole(of_stream, scheme):
    latents = np.full((1, 9, 2, 2, 2), np.nan, np.float32)
    video = make(of_stream, 33, scheme=scheme, latents=latents)
    assert video.shape == (1, 33, 16, 16, 3) and np.isfinite(latents).all()
    whole = to_uint8(jax.jit(lambda t, z: t.decode(z))(of_stream.tokenizer, latents))
    assert np.abs(video.astype(int) - whole).max() <= 1
    assert np.abs(latents[:, 1:] - latents[:, :-1]).max(axis=(2, 3, 4)).min() > 1e-3


def test_a_step_is_told_what_is_there_and_where(of_stream):
    """The second step by hand: latents 2 and 3 given, 4 and 5 generated, the rest thrown away."""
    latents = np.zeros((1, 6, 2, 2, 2), np.float32)
    make(of_stream, 21, labels(1), scheme="autoregressive", latents=latents, seed=5)
    given = np.zeros((1, 4, 2, 2, 2), np.float32)
    given[:, :2] = latents[:, 2:4]
    wanted = dataclasses.replace(
        labels(1),
        given=given,
        given_mask=np.broadcast_to(np.arange(4)[None, :, None, None] < 2, (1, 4, 2, 2)),
        times=np.arange(2, 6, dtype=np.int32)[None],
    )
    seed = int(np.random.SeedSequence((5, 1)).generate_state(1)[0])
    ((_, found),) = of_stream.stream(
        np.arange(1), lambda rows: wanted, seed=seed, decode=False, sampler=Ddim(num_steps=2)
    )
    np.testing.assert_array_equal(found[:, 2:], latents[:, 4:])
    np.testing.assert_array_equal(found[:, :2], latents[:, 2:4])


@pytest.mark.slow
def test_a_video_is_the_same_in_any_batch(of_stream):
    two = make(of_stream, 21, labels(0, 2), scheme="adaptive", seed=3)
    alone = make(of_stream, 21, scheme="adaptive", seed=3)
    other = make(of_stream, 21, scheme="adaptive", seed=4)
    assert np.abs(two[:1].astype(int) - alone).max() <= 1
    assert np.abs(two[0].astype(int) - two[1]).max() > 8
    assert np.abs(other.astype(int) - alone).max() > 8


@pytest.mark.slow
def test_a_video_is_the_same_on_any_devices(of_stream):
    options = {"scheme": "adaptive", "seed": 3}
    three = make(of_stream, 21, labels(0, 2, 1), batch_size=2, **options)
    spread = make(generator(LONG, devices=2), 21, labels(0, 2), **options)
    assert np.abs(three[:2].astype(int) - spread).max() <= 1


def test_memory_does_not_grow_with_the_length(of_stream):
    def peak(num_frames):
        live = []
        for _ in generate_long(of_stream, num_frames, labels(0), scheme="hierarchy2", **QUICK):
            live.append(sum(x.nbytes for x in jax.live_arrays()))
        return max(live)

    assert peak(513) <= peak(65)


def test_pieces_come_as_soon_as_they_can_be_decoded(of_stream):
    latents = np.full((1, 17, 2, 2, 2), np.nan, np.float32)
    pieces = generate_long(
        of_stream, 65, labels(0), scheme="autoregressive", latents=latents, **QUICK
    )
    assert next(pieces).shape == (1, 13, 16, 16, 3)  # 4 latents: a frame and three times four
    assert np.isnan(latents[:, 6:]).all()


@pytest.mark.slow
def test_a_start_is_gone_on_from(of_stream):
    start = np.random.default_rng(0).integers(0, 255, (1, 25, 16, 16, 3), np.uint8)
    latents = np.zeros((1, 9, 2, 2, 2), np.float32)
    video = make(of_stream, 33, labels(0), scheme="hierarchy2", start=start, latents=latents)
    whole = jax.jit(lambda t, x: t.encode(x))(of_stream.tokenizer, to_unit(start))
    np.testing.assert_allclose(latents[:, :7], whole, atol=1e-4)
    back = to_uint8(jax.jit(lambda t, z: t.decode(z))(of_stream.tokenizer, whole))
    assert np.abs(video[:, :25].astype(int) - back).max() <= 1


@pytest.mark.slow
def test_what_is_wanted_may_change_on_the_way(of_stream):
    asked = []

    def wanted(frame):
        asked.append(frame)
        return labels(0 if frame < 16 else 2)

    changed = make(of_stream, 33, wanted, scheme="autoregressive")
    assert max(asked) <= 32
    same = make(of_stream, 33, labels(0), scheme="autoregressive")
    np.testing.assert_array_equal(changed[:, :13], same[:, :13])
    assert np.abs(changed[:, 24:].astype(int) - same[:, 24:]).max() > 2


def test_clips_go_on_from_the_last_frames_encoded_anew(of_clips):
    """The second clip by hand."""
    video = make(of_clips, 29, labels(1), seed=7)
    assert video.shape == (1, 29, 16, 16, 3)
    given = np.zeros((1, 4, 2, 2, 2), np.float32)
    encode = jax.jit(lambda t, x: t.encode(x))
    given[:, :2] = encode(of_clips.tokenizer, to_unit(video[:, 8:13]))
    mask = np.broadcast_to(np.arange(4)[None, :, None, None] < 2, (1, 4, 2, 2))
    wanted = dataclasses.replace(labels(1), given=given, given_mask=mask)
    seed = int(np.random.SeedSequence((7, 1)).generate_state(1)[0])
    ((_, found),) = of_clips.stream(
        np.arange(1), lambda rows: wanted, seed=seed, sampler=Ddim(num_steps=2)
    )
    np.testing.assert_array_equal(video[:, 13:21], found[:, 5:])


@pytest.mark.slow
def test_clips_go_on_from_an_image(of_clips):
    start = np.full((1, 1, 16, 16, 3), 90, np.uint8)
    video = make(of_clips, 17, start=start)
    assert video.shape == (1, 17, 16, 16, 3)
    np.testing.assert_array_equal(video[:, :1], start)


@pytest.mark.parametrize(
    "task, num_frames, options, words",
    [
        (LONG, 32, {}, r"1 \+ 4n frames, not 32: take 29 or 33"),
        (LONG, 33, {"scheme": "spiral"}, "No scheme 'spiral'"),
        (LONG, 33, {"count": 3}, r"one number of them, got \[2, 3\]"),
        (
            LONG,
            33,
            {"latents": np.zeros((2, 8, 2, 2, 2), np.float32)},
            r"float32 \(2, 9, 2, 2, 2\)",
        ),
        (LONG, 33, {"start": np.zeros((2, 5, 8, 8, 3), np.uint8)}, "takes uint8"),
        (LONG, 33, {"start": np.zeros((2, 33, 16, 16, 3), np.uint8)}, "shorter than the video"),
        (CLIPS, 33, {"scheme": "hierarchy2"}, "frame_times=False: take frame_prediction"),
        (CLIPS, 33, {"step": 1}, "leave 3 given in clips of 4, but training gave 1 or 2"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_any_work(
    of_stream, of_clips, task, num_frames, options, words
):
    of = of_stream if task is LONG else of_clips
    with pytest.raises(UserError, match=words):
        generate_long(of, num_frames, labels(0, 1), **QUICK, **options)


def test_a_model_that_never_saw_given_frames_is_refused(of_clips):
    task = dataclasses.replace(CLIPS, given=GivenConfig(region=0.5))
    with pytest.raises(UserError, match="not trained to go on from given frames"):
        generate_long(dataclasses.replace(of_clips, task=task), 33, labels(0), **QUICK)
