"""Clips of a stream of frames: scene cuts, lengths, frame rates."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from walt_jax.data import video
from walt_jax.data.curation.config import CutConfig
from walt_jax.data.curation.cutting import cut_clips
from walt_jax.errors import UserError

CLIPS = Path(os.environ.get("WALT_TEST_DATA", Path(__file__).parents[4] / "shared" / "clips"))


def stream(seconds, fps, scene=0, start=0.0):
    """A textured picture that slides; another picture for every scene."""
    rng = np.random.default_rng(scene)
    picture = cv2.resize(rng.integers(0, 255, (12, 24, 3), np.uint8), (192, 96))
    for i in range(round(seconds * fps)):
        yield start + i / fps, np.ascontiguousarray(picture[:64, i % 64 : i % 64 + 96])


def scenes(*lengths, fps=30):
    start = 0.0
    for i, seconds in enumerate(lengths):
        yield from stream(seconds, fps, i, start)
        start += seconds


def shape(clips):
    return [(c.scene, round(c.times[0], 3), len(c.times), c.kept) for c in clips]


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_no_clip_goes_over_a_cut(detector):
    pytest.importorskip("scenedetect", reason="needs PySceneDetect (the extra `data`)")
    clips = list(cut_clips(scenes(2.0, 1.5, 1.0), 0.0, CutConfig(detector=detector)))
    assert shape(clips) == [(0, 0.0, 60, True), (1, 2.0, 45, True), (2, 3.5, 30, True)]


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}")
def test_real_videos_one_after_the_other():
    """A bee, a flower and a car park are three scenes, though the bee's camera moves."""
    pytest.importorskip("scenedetect", reason="needs PySceneDetect (the extra `data`)")
    frames, starts, start = [], [], 0.0
    names = ("bee_1280x720_h264", "flower_960x540_h264", "car-detection_768x432_12.5fps_h264")
    for name in names:
        starts.append(start)
        for time, frame in video.iter_frames(CLIPS / f"{name}.mp4", short_side=72, end=3.0):
            frames.append((start + time, cv2.resize(frame, (128, 72))))
        start += 3.1
    clips = list(cut_clips(frames, 0.0, CutConfig(detector="adaptive")))
    assert [clip.times[0] for clip in clips] == starts


def test_a_scene_too_short_is_none_of_its_own():
    pytest.importorskip("scenedetect", reason="needs PySceneDetect (the extra `data`)")
    frames = list(scenes(2.0, 0.2, 2.0))
    config = CutConfig(detector="content")
    # The flash begins a scene, so the cut 0.2 s later does not count.
    assert [c.times[0] for c in cut_clips(frames, 0.0, config)] == [0.0, 2.0]
    config = CutConfig(detector="content", min_scene_seconds=0.1)
    assert len(list(cut_clips(frames, 0.0, config))) == 3


def test_a_threshold_nothing_reaches():
    pytest.importorskip("scenedetect", reason="needs PySceneDetect (the extra `data`)")
    config = CutConfig(detector="content", threshold=200.0)
    assert len(list(cut_clips(scenes(1.0, 1.0), 0.0, config))) == 1


def test_clips_of_a_length_and_what_is_left():
    config = CutConfig(clip_seconds=2.0, min_clip_seconds=1.5)
    clips = list(cut_clips(stream(5.0, 24), 5.0, config))
    assert shape(clips) == [(0, 0.0, 48, True), (0, 2.0, 48, True), (0, 4.0, 24, False)]
    assert [c.seconds for c in clips] == pytest.approx([2.0, 2.0, 1.0])
    # Equal pieces without a wanted length.
    clips = cut_clips(stream(5.0, 24), 5.0, CutConfig(max_seconds=2.0))
    assert [len(c.times) for c in clips] == [40, 40, 40]


@pytest.mark.parametrize("fps, expected", [(10, 10), (12, 12), (24, 24), (30, 30), (60, 30)])
def test_frames_nearest_in_time_and_none_twice(fps, expected):
    (clip,) = cut_clips(stream(3.0, 30), 3.0, CutConfig(fps=fps))
    assert len(set(clip.times)) == len(clip.times) == 3 * expected
    assert clip.fps == pytest.approx(expected, rel=0.02)
    grid = np.arange(len(clip.times)) / expected
    np.testing.assert_allclose(clip.times, grid, atol=0.5 / 30 + 1e-9)


def test_rate_of_uneven_frames():
    times = np.sort(np.random.default_rng(0).uniform(0, 4, 200))
    frame = np.zeros((8, 8, 3), np.uint8)
    (clip,) = cut_clips([(t, frame) for t in times], 4.0, CutConfig(fps=8))
    for k, time in enumerate(clip.times):
        wanted = times[0] + k / 8
        assert abs(time - wanted) == np.abs(times - wanted).min()


def test_frames_wait_for_the_detector_only():
    pytest.importorskip("scenedetect", reason="needs PySceneDetect (the extra `data`)")
    given = 0

    def counted():
        nonlocal given
        for item in stream(30.0, 30):
            given += 1
            yield item

    clips = cut_clips(counted(), 0.0, CutConfig(detector="adaptive", clip_seconds=1.0))
    next(clips)
    assert given < 40


def test_bad_values():
    for values in ({"fps": -1.0}, {"clip_seconds": -1.0}, {"max_seconds": 0.0}):
        with pytest.raises(UserError, match="give a larger one"):
            CutConfig(**values)
