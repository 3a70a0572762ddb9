"""The read-back: right on the truth and on degraded truth, and silent on garbage."""

import functools

import cv2
import numpy as np
import pytest

from walt_jax.data.sprite_readback import read_back
from walt_jax.data.sprites import SpriteConfig, shape_mask, sprite_video

CONFIG = SpriteConfig()


def _each(frames, fn):
    return np.stack([fn(frame) for frame in frames])


def _clip(video, side=64):
    """What a model trains on: 17 frames at 8 fps, centre-cropped to a square, resized."""
    latest = (len(video.frames) - 1) / video.fps - 2
    start = latest * (video.label / len(CONFIG.class_names))
    frames = video.frames[np.round((start + np.arange(17) / 8) * video.fps).astype(int)]
    height, width = frames.shape[1:3]
    top, left = (height - min(height, width)) // 2, (width - min(height, width)) // 2
    square = frames[:, top : height - top, left : width - left]
    return _each(square, lambda f: cv2.resize(f, (side, side), interpolation=cv2.INTER_AREA))


@functools.cache
def _truth(count):
    """(video, its clip) of so many videos."""
    videos = [sprite_video(CONFIG, 11, i) for i in range(count)]
    return [(video, _clip(video)) for video in videos]


def _right(read, video):
    return (
        read.shape == video.shape,
        read.colour == video.colour,
        read.direction == video.direction,
    )


def _blur(sigma):
    return lambda frames: _each(frames, lambda f: cv2.GaussianBlur(f, (0, 0), sigma))


def _noise(sigma):
    rng = np.random.default_rng(0)
    return lambda frames: np.uint8(np.clip(frames + rng.normal(0, sigma, frames.shape), 0, 255))


def _jpeg(quality):
    def squeeze(frame):
        code = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1]

    return lambda frames: _each(frames, squeeze)


def _down_up(factor):
    def squeeze(frame):
        small = cv2.resize(frame, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, frame.shape[1::-1], interpolation=cv2.INTER_LINEAR)

    return lambda frames: _each(frames, squeeze)


def test_clips_of_the_truth():
    reads = [(read_back(clip, 8), video) for video, clip in _truth(304)]
    assert np.mean([_right(*pair) for pair in reads], axis=0).min() >= 0.99
    assert np.mean([read.persistence == 1 and read.wholly_inside for read, _ in reads]) >= 0.99
    assert np.mean([read.label_name == video.label_name for read, video in reads]) >= 0.99


def test_whole_videos_with_centres_areas_and_speed():
    right = []
    for video, _ in _truth(304)[:48]:
        read = read_back(video.frames, video.fps)
        right.append(_right(read, video))
        np.testing.assert_allclose(read.centres, video.centres, atol=0.3)
        assert read.speed == pytest.approx(video.speed, rel=0.02)
        ideal = shape_mask(video.shape, np.array([40, 40]), video.diameter, (80, 80)).sum()
        np.testing.assert_allclose(read.areas, ideal, rtol=0.15)
    assert np.mean(right, axis=0).min() >= 0.99


@pytest.mark.parametrize(
    "degrade",
    [_blur(1.5), _noise(15), _jpeg(30), _down_up(2), _down_up(3), _down_up(4)],
    ids=["blur 1.5", "noise 15", "jpeg 30", "down-up 2", "down-up 3", "down-up 4"],
)
def test_degraded_clips(degrade):
    right = [_right(read_back(degrade(clip), 8), video) for video, clip in _truth(304)[:96]]
    assert np.mean(right, axis=0).min() >= 0.95


@pytest.mark.parametrize("scene", ["occluder", "pan", "away"])
def test_scenes(scene):
    config, right = SpriteConfig(scenes=(scene,)), []
    for index in range(24):
        video = sprite_video(config, 7, index)
        read = read_back(video.frames, video.fps)
        right.append(_right(read, video))
        assert read.found[video.visible > 0.5].mean() > 0.98
        assert not read.found[video.visible < 0.05].any()
        assert read.speed == pytest.approx(video.speed, rel=0.05)
        np.testing.assert_allclose(read.centres[read.clear], video.centres[read.clear], atol=1.0)
        if scene != "pan":  # the object as it comes back, judged alone
            assert read.persistence < 1
            last_gone = np.flatnonzero(~read.found)[-1]
            back = read_back(video.frames[last_gone + 1 :], video.fps)
            assert back.colour == video.colour
    assert np.mean(right, axis=0).min() == 1


def test_actions_are_read_frame_by_frame():
    config, right = SpriteConfig(scenes=("actions",), fps=(8, 16)), []
    for index in range(24):
        video = sprite_video(config, 7, index)
        read = read_back(video.frames, video.fps)
        assert (read.shape, read.colour) == (video.shape, video.colour)
        right += [
            seen == config.directions[action]
            for seen, action in zip(read.directions, video.actions)
        ]
    # A step that contains a turn may look slanted.
    assert np.mean(right) > 0.9


def test_large_and_off_centre_videos():
    config = SpriteConfig(short_side=160, central=False)
    for index in range(12):
        video = sprite_video(config, 7, index)
        frames = video.frames[:: video.fps // 8]
        read = read_back(frames, 8)
        assert read.label_name == video.label_name
        np.testing.assert_allclose(read.centres, video.centres[:: video.fps // 8], atol=0.8)


def test_another_class_is_not_taken_for_the_right_one():
    # Chance level: the reading of one video against the truth of the next.
    reads = [(read_back(clip, 8), video) for video, clip in _truth(304)[:96]]
    names = [video.label_name for _, video in reads]
    wrong = [read.label_name == names[i - 1] for i, (read, _) in enumerate(reads)]
    assert np.mean(wrong) < 0.08
    for read, video in reads:
        assert read.label_name in (video.label_name, None)


def test_an_object_that_leaves_or_touches_the_border():
    colour = np.array([220, 40, 40])
    masks = [shape_mask("circle", np.array([30 + 4.0 * t, 32]), 20, (64, 64)) for t in range(17)]
    frames = np.uint8(np.stack(masks)[..., None] * colour)
    read = read_back(frames)
    assert (read.shape, read.colour, read.direction) == ("circle", "red", "right")
    assert 0.4 < read.persistence < 0.8 and not read.wholly_inside
    assert read.inside[0] and not read.inside[7] and not read.found[-1]
    assert np.isnan(read.centres[-1]).all() and read.areas[-1] == 0
    # A frame of another colour is not the object.
    frames[3] = np.uint8(masks[3][..., None] * np.array([50, 80, 220]))
    assert not read_back(frames).found[3]


def test_an_object_at_rest_or_aslant_has_no_direction():
    still = _truth(304)[0][1][:1].repeat(17, axis=0)
    assert read_back(still).direction is None and read_back(still).shape is not None
    assert read_back(still[:1]).direction is None
    masks = [shape_mask("square", np.array([16.0 + t, 16 + t]), 20, (64, 64)) for t in range(17)]
    aslant = read_back(np.uint8(np.stack(masks)[..., None] * np.array([240, 205, 40])))
    assert (aslant.shape, aslant.colour, aslant.direction) == ("square", "yellow", None)
    assert aslant.directions == (None,) * 17


def test_garbage_is_read_as_nothing():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 17, 64, 64, 3), dtype=np.uint8)
    flat = [np.full((17, 64, 64, 3), level, np.uint8) for level in (0, 77, 255)]
    grainy = [_noise(20)(frames) for frames in flat]
    split = np.zeros((17, 64, 64, 3), np.uint8)
    split[:, :, :32] = 255
    for frames in [*noise, *flat, *grainy, split, split[:1], noise[0, :1], noise[0, :2]]:
        read = read_back(frames)
        assert (read.shape, read.colour, read.direction) == (None, None, None)
        assert len(read.found) == len(read.directions) == len(frames)
    smooth = [_blur(6)(frames) for frames in noise]
    stretched = [cv2.normalize(frames, None, 0, 255, cv2.NORM_MINMAX) for frames in smooth]
    assert all(read_back(frames).label_name is None for frames in stretched)
    read_back(noise[0, :, :8, :8])


def test_a_forced_choice_names_the_nearest():
    """Truth stays right; what is too blurred to tell is named all the same, but not nothing."""
    named_only_when_forced = 0
    for video, clip in _truth(48):
        assert all(_right(read_back(clip, 8.0, forced=True), video))
        smeared = _blur(6.0)(clip)
        free, forced = read_back(smeared, 8.0), read_back(smeared, 8.0, forced=True)
        assert (forced.shape is not None) == forced.found.any()
        named_only_when_forced += free.shape is None and forced.shape is not None
    assert named_only_when_forced > 5
    empty = read_back(np.full((4, 32, 32, 3), 90, np.uint8), forced=True)
    assert (empty.shape, empty.colour, empty.direction) == (None, None, None)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="uint8"):
        read_back(np.zeros((17, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        read_back(np.zeros((0, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="8x8"):
        read_back(np.zeros((17, 4, 64, 3), np.uint8))
