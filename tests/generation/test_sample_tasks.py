"""How each task lays what is given into clips, and what it makes of the samples."""

import dataclasses

import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.generation import Generator, Walt
from walt_jax.tasks import GivenConfig

T, FT, MADE = 9, 4, 200
RNG = np.random.default_rng(0)


@pytest.fixture
def fake(walt, monkeypatch):
    """A model whose samples have the value 200, or that of the stage; it keeps what it is asked."""
    calls = []

    def encode(self, clips):
        calls.append({"clips": clips})
        t = 1 + (clips.shape[1] - 1) // FT
        return np.zeros((len(clips), t, clips.shape[2] // 8, clips.shape[3] // 8, 8), np.float32)

    def sample(self, labels, **wishes):
        calls[-1].update(wishes) if calls and "count" not in calls[-1] else calls.append(wishes)
        t, h, w = wishes["grid"]
        value = MADE + len([c for c in calls if "count" in c]) - 1
        return np.full((wishes["count"], 1 + (t - 1) * FT, 8 * h, 8 * w, 3), value, np.uint8)

    monkeypatch.setattr(Generator, "encode", encode)
    monkeypatch.setattr(Generator, "sample", sample)
    return walt, calls


def video(frames, size=(32, 32)):
    """Every frame of one value: 1, 2, 3 ..."""
    return np.broadcast_to(
        np.arange(1, frames + 1, dtype=np.uint8)[:, None, None, None], (frames, *size, 3)
    )


def values(clips):
    """Of each frame."""
    clips = np.asarray(clips)
    assert (clips == clips[..., :1, :1, :1]).all()
    return clips[..., 0, 0, 0].tolist()


def given(call):
    """Which latent frames."""
    mask = call["given_mask"]
    assert (mask == mask[:1, :, :1, :1]).all()
    return np.flatnonzero(mask[0, :, 0, 0]).tolist()


def test_text_to_video(fake):
    walt, calls = fake
    out = walt.sample(["a", "b"], num=3, seed=5, steps=7, sampler="ddim", guidance=2.0)
    assert out.shape == (3, T, 32, 32, 3)
    (call,) = calls
    assert call["prompts"] == ("a", "b", "a") and call["seed"] == 5 and call["given"] is None
    assert call["sampler"].num_steps == 7 and call["guidance"].scale == 2.0
    assert call["negative_prompts"] is None
    walt.sample(["a", "b"], negative_prompt="c", guidance=2.0)
    assert calls[1]["negative_prompts"] == ("c", "c")
    assert walt.sample("a", size="4:2@40", seconds=4).shape == (1, 17, 32, 48, 3)
    assert walt.sample("a", fps=2).shape[1] == 5  # of every second frame
    assert walt.sample("a", task="text_to_image").shape == (1, 1, 32, 32, 3)


def test_image_to_video(fake):
    walt, calls = fake
    out = walt.sample("a", task="image_to_video", image=[video(1)[0], video(3)[2]], num=3)
    assert out.shape == (3, T, 32, 32, 3)
    assert values(calls[0]["clips"]) == [[1] * T, [3] * T, [1] * T]  # filled by the nearest
    assert given(calls[0]) == [0]


def test_extend_forwards_in_clips(fake):
    walt, calls = fake
    out = walt.sample(task="extend", video=video(6), seconds=3, num=2)  # 12 frames
    assert [given(c) for c in calls] == [[0, 1]] * 3
    assert values(calls[0]["clips"]) == [[2, 3, 4, 5, 6, 6, 6, 6, 6]]
    assert values(calls[1]["clips"][0]) == [6] + [200] * 8  # 4 are new in each clip
    assert values(out) == [[1, 2, 3, 4, 5, 6] + [200] * 4 + [201] * 4 + [202] * 4] * 2
    assert len({c["seed"] for c in calls}) == 3 and calls[0]["seed"] == 0
    calls.clear()
    one = walt.sample(task="extend", video=video(1))  # too short for two latent frames
    assert given(calls[0]) == [0] and values(one) == [[1] + [200] * 8]


def test_extend_backwards(fake):
    walt, calls = fake
    out = walt.sample(task="extend", video=video(9), seconds=1.5, direction="backward")
    assert [given(c) for c in calls] == [[2]] * 2  # with [1, 2] a clip would add one frame
    assert values(calls[0]["clips"]) == [[1, 1, 1, 1, 1, 1, 2, 3, 4]]
    assert values(out) == [[201] + [200] * 5 + [*range(1, 10)]]
    calls.clear()
    out = walt.sample(task="extend", video=video(3), direction="backward")
    assert given(calls[0]) == [2]  # the group of four: the first frame is held
    assert values(calls[0]["clips"]) == [[1] * 7 + [2, 3]]
    assert values(out) == [[200] * 5 + [1, 2, 3]]


def test_interpolate_connect_and_loop(fake):
    walt, calls = fake
    out = walt.sample(task="interpolate", image=[video(1)[0], video(2)[1]])
    assert given(calls[0]) == [0, 2] and out.shape == (1, T, 32, 32, 3)
    assert values(calls[0]["clips"]) == [[1, 1, 1, 2, 2, 2, 2, 2, 2]]
    calls.clear()
    ten = video(10)[4:]
    out = walt.sample(task="connect", video=[video(3), ten], num=2)
    assert values(calls[0]["clips"]) == [[3, 3, 3, 5, 5, 5, 6, 7, 8]]
    assert values(out) == [[1, 2, 3] + [200] * 4 + [5, 6, 7, 8, 9, 10]] * 2
    calls.clear()
    out = walt.sample(task="loop", video=video(5))
    assert values(calls[0]["clips"]) == [[5, 5, 5, 1, 1, 1, 2, 3, 4]]
    assert values(out) == [[1, 2, 3, 4, 5] + [200] * 4]
    calls.clear()
    out = walt.sample("a", task="loop", num=2)
    assert given(calls[1]) == [0, 2] and calls[0]["seed"] != calls[1]["seed"]
    assert values(out) == [[200] * 9 + [201] * 4] * 2


def test_inpaint_keeps_the_blocks_that_it_is_given(fake):
    walt, calls = fake
    source = RNG.integers(0, 256, (T + 1, 32, 32, 3), np.uint8)
    out = walt.sample(task="inpaint", video=source, mask=(0.0, 0.0, 0.5, 0.3))
    kept = np.ones((32, 32), bool)
    kept[:16, :16] = False  # 0.3 of 32 pixels lie in two blocks of 8
    assert (calls[0]["given_mask"][0, :, ::1, ::1].repeat(8, 1).repeat(8, 2) == kept).all()
    np.testing.assert_array_equal(out[0][:, kept], source[:T, kept])
    assert (out[0][:, ~kept] == 200).all()
    mask = np.zeros((16, 16), bool)
    mask[8:] = True
    half = walt.sample(task="inpaint", video=source, mask=mask)
    assert (half[0, :, 16:] == 201).all() and (half[0, :, :16] == source[:T, :16]).all()


def test_outpaint_paints_beside_the_video(fake):
    walt, calls = fake
    source = RNG.integers(0, 256, (T, 32, 16, 3), np.uint8)
    out = walt.sample(task="outpaint", video=source)
    np.testing.assert_array_equal(out[0, :, :, 8:24], source)
    assert (out[0, :, :, :8] == 200).all() and (out[0, :, :, 24:] == 200).all()
    assert calls[0]["given_mask"][0, :, :, 1:3].all()
    with pytest.raises(UserError, match="nothing is left to paint"):
        walt.sample(task="outpaint", video=video(T))


def test_edit_starts_from_the_video(fake):
    walt, calls = fake
    walt.sample("a", task="edit", video=video(T), strength=0.3, num=2)
    assert values(calls[0]["clips"]) == [list(range(1, T + 1))]
    assert calls[0]["start"].shape == (2, 3, 4, 4, 8) and calls[0]["strength"] == 0.3
    assert calls[0]["given"] is None


def test_what_the_checkpoint_was_not_trained_for_is_refused(walt, fake):
    def model(**given):
        task = dataclasses.replace(walt.generator.task, given=GivenConfig(**given))
        return Walt(dataclasses.replace(walt.generator, task=task, images=False))

    first = model(first=0.5)
    assert first.sample(task="extend", video=video(9)).shape[1] > 9
    with pytest.raises(
        UserError,
        match="The task connect gives latent frames 0, 2 of 0 to 2, and this checkpoint was "
        "trained to be given the first 1 or 2 of the latent frames",
    ):
        first.sample(task="connect", video=[video(9), video(9)])
    with pytest.raises(UserError, match=r"extend gives latent frames 2 of.*the first 1 or 2"):
        first.sample(task="extend", video=video(9), direction="backward")
    with pytest.raises(UserError, match="inpaint gives all but a region"):
        first.sample(task="inpaint", video=video(9), mask=(0, 0, 0.5, 0.5))
    with pytest.raises(UserError, match="text_to_image makes images, and this checkpoint was"):
        first.sample("a", task="text_to_image")
    with pytest.raises(UserError, match="trained to be given all but a region"):
        model(region=0.5).sample(task="image_to_video", image=video(1)[0])


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"task": "dream"}, "no task 'dream': choose one of text_to_video, text_to_image"),
        ({"task": "extend"}, "extend takes 1 of image and video together, got 0"),
        ({"task": "loop", "image": [video(1)[0]] * 2}, "loop takes 0 or 1 of image"),
        ({"task": "image_to_video"}, "takes 1 or more of image"),
        ({"task": "extend", "video": video(9), "strength": 0.5}, "extend reads no strength.*edit"),
        ({"mask": (0, 0, 1, 1)}, "text_to_video reads no mask.*take inpaint, outpaint"),
        ({"task": "edit", "video": video(9), "strength": 1.5}, "strength lies above 0"),
        ({"task": "extend", "video": video(9), "direction": "up"}, "forward or backward"),
        ({"task": "edit", "video": video(5)}, "has 5 frames at 4 fps.*takes clips of 9"),
        ({"task": "inpaint", "video": video(9)}, "needs a mask"),
        ({"task": "inpaint", "video": video(9), "mask": (0, 0, 1, 1)}, "paints all of the frame"),
        ({"task": "inpaint", "video": video(9), "mask": "0,0,2,1"}, "is no box"),
        ({"task": "inpaint", "video": video(9), "mask": "a,b"}, "is no box: write"),
        ({"task": "image_to_video", "image": np.zeros((4, 4, 3))}, "uint8 .H, W, 3.*got float64"),
        ({"task": "image_to_video", "image": "no.png"}, "no.png does not exist"),
        ({"label": "red"}, "has no classes: leave the labels out"),
        ({"sampler": "magic"}, "no sampler 'magic': choose one of ddim"),
        ({"fps": 3}, "3 fps do not fit"),
        ({"size": "31"}, "Frames of 31x31 do not fit"),
    ],
)
def test_bad_wishes_are_one_sentence(fake, wishes, sentence):
    with pytest.raises(UserError, match=sentence):
        fake[0].sample("a", **wishes)
