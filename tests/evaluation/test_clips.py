"""Clips: the same whoever reads them, and mistakes told in a sentence."""

import dataclasses

import numpy as np
import pytest

from walt_jax.data.pipeline import DataConfig
from walt_jax.errors import UserError
from walt_jax.evaluation.clips import Clips, check_pair, compared
from walt_jax.evaluation.protocols import Protocol
from walt_jax.media import write_mp4

PROTOCOL = Protocol(num_frames=6, size=(16, 16), crop="random", any_fps=True)


def video(frames=8, size=(32, 48), seed=0):
    """Smooth frames that all differ."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (frames, 4, 4, 3), np.uint8)
    return small.repeat(size[0] // 4, 1).repeat(size[1] // 4, 2)


@pytest.fixture
def folder(tmp_path):
    """Four videos of 8 frames and 32x48 at 8 fps, and a picture that is none of them."""
    path = tmp_path / "videos"
    path.mkdir()
    for i in range(4):
        write_mp4(path / f"{i}.mp4", video(seed=i), 8)
    (path / "grid.png").write_bytes(b"a picture")
    return path


def all_of(clips, order=None, batch=3):
    numbers = np.arange(len(clips)) if order is None else order
    parts = list(clips.batches(numbers, batch))
    assert np.concatenate([n for n, _ in parts]).tolist() == list(numbers)
    return dict(zip(numbers.tolist(), np.concatenate([v for _, v in parts])))


@pytest.mark.parametrize("kind", ["folder", "prepared"])
def test_a_clip_depends_on_its_number_and_seed_alone(kind, folder, sprite_records):
    source = folder if kind == "folder" else sprite_records
    clips = Clips(source, PROTOCOL)
    first = all_of(clips)
    backwards = all_of(Clips(source, PROTOCOL), np.arange(len(clips))[::-1], batch=1)
    assert all(np.array_equal(first[i], backwards[i]) for i in first)
    assert first[0].shape == (6, 16, 16, 3) and first[0].dtype == np.uint8
    other = all_of(Clips(source, PROTOCOL, seed=1))
    assert any(not np.array_equal(first[i], other[i]) for i in first)
    assert clips.record["seed"] == 0 and clips.record["clips"] == len(clips)


def test_even_clips_lie_from_the_first_to_the_last_start(folder):
    p = Protocol(num_frames=6, size=(16, 16), clips="even", temporal_clips=2, spatial_clips=3)
    clips = Clips(folder, p)
    assert len(clips) == 24 and "seed" not in clips.record
    found = all_of(clips)
    whole = Clips(folder, dataclasses.replace(p, temporal_clips=1, spatial_clips=1, num_frames=8))
    middle = whole.read(0)
    np.testing.assert_array_equal(found[1], middle[:6])
    np.testing.assert_array_equal(found[4], middle[2:])
    left, centre, right = found[0], found[1], found[2]
    assert not np.array_equal(left, centre) and not np.array_equal(centre, right)


def test_stride_takes_every_other_frame(folder):
    p = Protocol(num_frames=3, stride=2, clips="even", size=(16, 16))
    all_frames = Protocol(num_frames=5, clips="even", size=(16, 16))
    np.testing.assert_array_equal(Clips(folder, p).read(0), Clips(folder, all_frames).read(0)[::2])


def test_a_rate_of_its_own(folder):
    """At 4 fps the frames lie two apart."""
    p = Protocol(num_frames=4, fps=4.0, clips="even", size=(16, 16))
    frames = Clips(folder, dataclasses.replace(p, fps=0.0, num_frames=8)).read(0)
    found = Clips(folder, p).read(0)
    shifts = [np.abs(frames[i : i + 7 : 2][:4].astype(int) - found).sum() for i in range(2)]
    assert min(shifts) == 0


def test_samples_give_their_first_frames(folder):
    clips = Clips(folder, Protocol(num_frames=6), samples=True)
    whole = Clips(folder, Protocol(num_frames=8), samples=True)
    np.testing.assert_array_equal(clips.read(2), whole.read(2)[:6])


def test_real_videos_are_drawn_without_replacement(folder):
    p = dataclasses.replace(PROTOCOL, num_real=3)
    names = [[Clips(folder, p, seed=s).name(i) for i in range(3)] for s in range(8)]
    assert all(len(set(n)) == 3 for n in names) and len({tuple(n) for n in names}) > 1


def test_parts_are_those_of_training(sprite_records):
    data = DataConfig(str(sprite_records), num_frames=5, fps=4.0, eval_fraction=0.25)
    parts = {
        part: Clips(sprite_records, PROTOCOL, part=part, data=data)
        for part in ("train", "eval", "all")
    }
    names = {k: {c.name(i) for i in range(len(c))} for k, c in parts.items()}
    assert names["train"] | names["eval"] == names["all"] and len(names["eval"]) == 6
    assert not names["train"] & names["eval"]


def test_both_sides_are_resized_and_compressed_alike():
    frames = video(size=(16, 16))
    p = Protocol(compare_size=(8, 8), compare_resize="bilinear")
    np.testing.assert_array_equal(compared(frames, p), frames[:, ::2, ::2])  # of 4x4 blocks
    coded = compared(frames, Protocol(jpeg_quality=95))
    assert 0 < np.abs(coded.astype(int) - frames).mean() < 20


def bad(path, **sizes):
    write_mp4(path, video(**sizes), 8)


@pytest.mark.parametrize(
    "spoil, protocol, words",
    [
        (lambda f: bad(f / "9.mp4", frames=4), {}, r"9.mp4 has 4 frames, too few for a clip of 6"),
        (
            lambda f: bad(f / "9.mp4", size=(16, 16)),
            {"size": None},
            r"mixes videos of 32x48.*16x16",
        ),
        (
            lambda f: write_mp4(f / "9.mp4", video(), 12),
            {"any_fps": False},
            r"mixes videos of 8 fps.*0.mp4.*12 fps.*--protocol.fps",
        ),
        (lambda f: [x.unlink() for x in f.glob("*.mp4")], {}, "holds no video"),
        (lambda f: None, {"num_real": 5}, "gives 4 clips.*of 5 real ones"),
        (lambda f: (f / "2.mp4").write_bytes(b"nothing"), {}, "2.mp4 cannot be decoded"),
    ],
)
def test_mistakes_are_one_sentence(folder, spoil, protocol, words):
    spoil(folder)
    with pytest.raises(UserError, match=words):
        all_of(Clips(folder, dataclasses.replace(PROTOCOL, **protocol)))


@pytest.mark.parametrize(
    "protocol, words",
    [
        ({"num_samples": 3}, "holds 4 videos, but the protocol custom is of 1 x 3 samples"),
        ({"folds": 3}, "folds=3 does not divide"),
        ({"size": (16, 16)}, "is 32x48, but the protocol custom is of samples of 16x16"),
        ({"size": None, "num_frames": 9}, "has 8 frames, too few"),
    ],
)
def test_samples_that_do_not_fit(folder, protocol, words):
    with pytest.raises(UserError, match=words):
        all_of(Clips(folder, Protocol(**({"num_frames": 6} | protocol)), samples=True))


def test_the_two_sides_must_be_alike(folder, tmp_path):
    other = tmp_path / "samples"
    other.mkdir()
    write_mp4(other / "0.mp4", video(size=(16, 16)), 12)
    p = Protocol(num_frames=6)
    pair = Clips(folder, p), Clips(other, p, samples=True)
    with pytest.raises(UserError, match=r"real videos are 32x48 and the samples 16x16"):
        check_pair(*pair)
    p = Protocol(num_frames=6, size=(16, 16))
    with pytest.raises(UserError, match=r"real clips have 8 fps and the samples 12"):
        check_pair(Clips(folder, p), Clips(other, p, samples=True))
