"""The judges of benchmarks/sprite_generation.py on real videos, and on such that are wrong."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import sprite_judges as judges
from benchmarks.sprite_generation import (
    ACTIONS,
    CAPTIONS,
    EVERY,
    FEW,
    FREE,
    HARD,
    HELD_OUT,
    HIDDEN,
    MODELS,
    spelt,
)
from benchmarks.sprite_runs import Results, make_records
from walt_jax.config import build, load
from walt_jax.data.records import open_dataset
from walt_jax.data.sprites import sprite_video
from walt_jax.demo import CONFIGS
from walt_jax.errors import UserError
from walt_jax.models import count
from walt_jax.training.experiment import Experiment

FPS = 8


def clips(config, number, frames=17, **changes):
    config = dataclasses.replace(config, fps=(FPS,), **changes)
    videos = [sprite_video(config, 3, i) for i in range(number)]
    cut = [{k: getattr(v, k)[:frames] for k in ("frames", "visible", "actions")} for v in videos]
    truths = [dataclasses.replace(v, **c) for v, c in zip(videos, cut)]
    return np.stack([t.frames for t in truths]), truths


def test_held_out_captions_are_never_told_and_their_words_are():
    told, left_out = set(), set()
    for i in range(6 * len(CAPTIONS.class_ids)):
        video = sprite_video(CAPTIONS, 0, i)
        caption = MODELS["captions"].caption(video.truth())
        (told if caption else left_out).add((video.label_name, video.background))
        assert caption in (None, video.caption)
    assert left_out == set(HELD_OUT) and ("green triangle up", "yellow") in left_out
    other = {"gray": "yellow", "yellow": "gray"}
    assert {(name, other[ground]) for name, ground in HELD_OUT} <= told
    assert len(CAPTIONS.class_ids) == 30 and not {name for name, _ in told} & set(HARD)


def test_attributes_are_right_of_real_videos_and_wrong_of_others():
    videos, truths = clips(EVERY, 12)
    right = judges.attributes(videos, truths, EVERY)
    assert right["all three"] == right["background"] == right["frames found"] == 1.0
    wrong = judges.attributes(videos, truths[1:] + truths[:1], EVERY)
    assert wrong["all three"] < 0.3
    # Backwards in time only the direction is wrong.
    back = judges.attributes(videos[:, ::-1], truths, EVERY)
    assert back["colour"] == back["shape"] == 1.0 and back["direction"] == 0.0


def test_continued_sees_other_given_frames_and_another_speed():
    videos, truths = clips(EVERY, 6)
    given = np.arange(17) < 5
    good = judges.continued(videos, videos, given, truths, FPS, EVERY)
    assert good["given worst"] > 60 and good["speed right"] == 1.0 and good["speed error"] < 0.1
    slow = videos.copy()
    slow[:, 5:] = videos[:, 5 + np.arange(12) // 2]
    bad = judges.continued(slow, videos, given, truths, FPS, EVERY)
    assert bad["given psnr"] == good["given psnr"] and bad["speed right"] == 0.0
    assert 0.35 < bad["speed error"] < 0.65
    other = judges.continued(videos[:, ::-1], videos, given, truths, FPS, EVERY)
    assert other["given psnr"] < 30


@pytest.mark.parametrize("scene", ["occluder", "away"])
def test_returned_wants_the_same_object_again(scene):
    videos, truths = clips(HIDDEN, 8, frames=19, scenes=(scene,))
    tails = [judges.in_sight_again(t.visible) for t in truths]
    use = [i for i, tail in enumerate(tails) if tail is not None]
    videos, truths, tails = videos[use], [truths[i] for i in use], [tails[i] for i in use]
    assert len(use) >= 4
    good = judges.returned(videos, truths, tails, FPS, FEW)
    assert good["back"] == good["colour"] == 1.0 and good["all"] == 1.0
    gone = videos.copy()
    for video, truth, tail in zip(gone, truths, tails):
        video[tail:] = video[truth.visible.argmin()]
    lost = judges.returned(gone, truths, tails, FPS, FEW)
    assert lost["back"] == lost["all"] == 0.0
    swapped = videos.copy()
    for video, tail in zip(swapped, tails):
        video[tail:] = video[tail:, ..., ::-1]  # red for blue
    assert judges.returned(swapped, truths, tails, FPS, FEW)["colour"] < 0.5


def test_in_sight_again_is_after_the_last_gap():
    assert judges.in_sight_again(np.array([1, 0.5, 0, 1, 1.0])) == 3
    assert judges.in_sight_again(np.array([1, 0, 1.0])) is None
    assert judges.in_sight_again(np.ones(3)) == 0


def test_followed_counts_steps():
    videos, truths = clips(FEW, 6, scenes=("actions",))
    actions = np.stack([t.actions for t in truths])
    good = judges.followed(videos, actions, FEW)
    assert good["steps seen"] > 0.6 and good["steps right"] > 0.95
    bad = judges.followed(videos, (actions + 1) % 4, FEW)
    assert bad["steps right"] < 0.05 and bad["videos right"] == 0.0


def test_records_have_a_letter_a_frame(tmp_path):
    spelling = lambda truth: spelt(truth["actions"])  # noqa: E731
    records = open_dataset(make_records(tmp_path, ACTIONS, 2, 5, spelling))
    for i in range(2):
        truth, record = sprite_video(ACTIONS, 5, i), records.read(i)
        assert record["num_frames"] == len(record["caption"]) == 9
        assert record["caption"] == spelt(truth.actions) and set(record["caption"]) <= set("lrud")
    again = make_records(tmp_path, ACTIONS, 2, 5, lambda truth: pytest.fail("made twice"))
    assert again == tmp_path / "records"


def test_whole_in_frame_tells_crops_from_native_videos():
    videos, _ = clips(FREE, 12, aspects=("5:3",))
    start = (videos.shape[2] - 64) // 2, (videos.shape[3] - 64) // 2
    cropped = videos[:, :, start[0] : start[0] + 64, start[1] : start[1] + 64]
    both = judges.whole_in_frame({"native": videos, "square": cropped}, FEW)
    assert both["whole in frame, native"] == 1.0 and both["whole in frame, square"] < 0.8


def test_results_go_on_and_refuse_other_options(tmp_path):
    results = Results(tmp_path, {"samples": 2})
    results.fill("table", "row", lambda: {"share": 0.5, "steps": 1000})
    again = Results(tmp_path, {"samples": 2})
    again.fill("table", "row", lambda: pytest.fail("measured twice"))
    again.fill("table", "other", lambda: {"share": 0.25})
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert lines[0] == "| table | share | steps |"
    assert lines[2:] == ["| row | 0.5 | 1,000 |", "| other | 0.25 | - |"]
    with pytest.raises(UserError, match="samples: 2 -> 3"):
        Results(tmp_path, {"samples": 3})


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_are_configs_that_fit_the_asset(name):
    """8 MB in bfloat16 hold the captions' denoiser and the tokenizer."""
    config = str(CONFIGS / "sprites_text.py")
    experiment = build(Experiment, load(config, MODELS[name].overrides))
    tokenizer = build(Experiment, load(f"{config}:tokenizer"))
    shapes = [jax.eval_shape(e.task.init, jax.random.key(0)) for e in (experiment, tokenizer)]
    assert 1e6 < sum(map(count, shapes)) < 4e6
