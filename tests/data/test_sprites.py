"""The sprite generator: determinism, balance, and that the truth it tells is what it draws."""

import collections
import json

import av
import numpy as np
import pytest

from walt_jax.data import sprites
from walt_jax.data.sprites import COLOURS, DIRECTIONS, SpriteConfig, sprite_video, write_sprites
from walt_jax.errors import UserError

CONFIG = SpriteConfig()


def _at(video, t, dx=0.0, dy=0.0):
    """The pixel of frame t at the sprite's centre, moved by (dx, dy)."""
    x, y = np.round(video.centres[t] + (dx, dy)).astype(int)
    return video.frames[t, y, x].astype(int)


def test_a_video_depends_on_seed_and_index_only():
    video, again = sprite_video(CONFIG, 3, 50), sprite_video(CONFIG, 3, 50)
    np.testing.assert_array_equal(video.frames, again.frames)
    assert video.truth() == again.truth()
    for other in (sprite_video(CONFIG, 3, 51), sprite_video(CONFIG, 4, 50)):
        assert other.truth() != video.truth()


def test_classes_are_balanced_and_the_rest_varies():
    videos = [sprite_video(CONFIG, 0, i) for i in range(96)]
    assert len(CONFIG.class_names) == 48 and CONFIG.class_names[0] == "red square left"
    assert set(collections.Counter(v.label for v in videos).values()) == {2}
    assert {v.aspect for v in videos} == set(CONFIG.aspects)
    assert {v.fps for v in videos} == set(CONFIG.fps)
    assert {v.background for v in videos} == set(COLOURS)
    assert [v.label for v in videos[:48]] != [v.label for v in videos[48:]]


@pytest.mark.parametrize("central", [True, False])
def test_the_truth_is_what_is_drawn(central):
    config = SpriteConfig(central=central)
    outside_square = 0
    for index in range(64):
        video = sprite_video(config, 1, index)
        colour, shape, direction = video.label_name.split()
        assert video.label_name == config.class_names[video.label]
        assert (colour, shape, direction) == (video.colour, video.shape, video.direction)
        assert video.caption == (
            f"a {colour} {shape} moves {direction} over a {video.background} background"
        )
        assert colour != video.background
        frames, (height, width) = video.frames, video.frames.shape[1:3]
        assert frames.dtype == np.uint8 and min(height, width) == 64
        assert height % 2 == 0 and width % 2 == 0
        ratio = np.divide(*(int(n) for n in video.aspect.split(":")))
        assert width / height == pytest.approx(ratio, rel=0.02)

        # Straight, steady, visible in any 2 seconds, and long enough for 17 frames at 8 fps.
        steps = np.diff(video.centres, axis=0) * video.fps
        truth = np.array(DIRECTIONS[direction]) * video.speed
        np.testing.assert_allclose(steps, np.broadcast_to(truth, steps.shape), atol=0.01)
        assert video.speed * 2 >= 64 / 5
        assert 2.2 <= (len(frames) - 1) / video.fps <= 4 + 1 / video.fps

        # The pixels: its colour at the centre, the background along the border, in every frame.
        for t in (0, len(frames) - 1):
            assert tuple(_at(video, t)) == COLOURS[colour]
        border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, 0].reshape(-1, 3)])
        assert (border == COLOURS[video.background]).all()
        rows, columns = np.nonzero((frames != frames[0, 0, 0]).any(axis=(0, 3)))
        middle = (np.array([height, width]) - 1) / 2
        reach = np.abs(np.stack([rows, columns], axis=1) - middle).max()
        outside_square += reach > 32
    assert outside_square == 0 if central else outside_square > 5


def test_motion_is_smooth_below_a_pixel():
    config = SpriteConfig(shapes=("square",), colours=("red",), backgrounds=("black",), fps=(30,))
    video = sprite_video(config, 0, 0)
    red = video.frames[..., 0].astype(float) - 20
    axis = 2 if video.direction in ("left", "right") else 1
    profile = red.sum(axis=3 - axis)
    centre = (profile * np.arange(profile.shape[1])).sum(1) / profile.sum(1)
    truth = video.centres[:, 0 if axis == 2 else 1]
    np.testing.assert_allclose(centre, truth, atol=0.08)


def test_occluder_hides_the_sprite_and_gives_it_back():
    config = SpriteConfig(scenes=("occluder",))
    for index in range(24):
        video = sprite_video(config, 2, index)
        assert video.visible[0] > 0.97 and video.visible[-1] > 0.97 and video.visible.min() < 0.1
        hidden = int(video.visible.argmin())
        assert tuple(_at(video, hidden)) != COLOURS[video.colour]
        bar = video.caption.rsplit(" ", 2)[1]
        assert video.caption.endswith(f"and passes behind a {bar} bar")
        assert tuple(_at(video, hidden)) == COLOURS[bar]
        assert len({bar, video.colour, video.background}) == 3


def test_a_panning_camera_moves_the_background():
    for index in range(8):
        video = sprite_video(SpriteConfig(scenes=("pan",)), 2, index)
        plain = sprite_video(SpriteConfig(), 2, index)
        assert "while the camera pans" in video.caption and video.label == plain.label
        columns = video.frames[0, :, 0].astype(int)
        assert np.ptp(columns, axis=0).max() > 10  # a texture along the border, not a flat colour
        assert (video.frames[0, 0] != video.frames[-1, 0]).any()
        assert (video.visible > 0.97).all()


def test_a_camera_that_looks_away_comes_back():
    for index in range(8):
        video = sprite_video(SpriteConfig(scenes=("away",)), 2, index)
        assert video.visible[len(video.visible) // 2] == 0
        assert video.visible[0] > 0.97 and video.visible[-1] > 0.97
        moved = video.centres[-1] - video.centres[0]
        seconds = (len(video.frames) - 1) / video.fps
        along = moved @ DIRECTIONS[video.direction]
        assert along == pytest.approx(video.speed * seconds, rel=1e-3)


def test_actions_say_where_the_sprite_goes_next():
    config = SpriteConfig(scenes=("actions",), seconds=(8, 8), fps=(8, 30))
    for index in range(16):
        video = sprite_video(config, 2, index)
        assert video.actions.shape == (len(video.frames),) and len(set(video.actions)) > 1
        assert config.directions[video.actions[0]] == video.direction
        assert (video.visible > 0.97).all()
        moves = np.array([DIRECTIONS[config.directions[a]] for a in video.actions[:-1]])
        steps = np.diff(video.centres, axis=0)
        np.testing.assert_allclose(steps, moves * video.speed / video.fps, atol=0.01)


def test_held_out_classes_are_not_drawn_and_ids_stay():
    held_out = ("green triangle up", "red square left")
    config = SpriteConfig(exclude=held_out)
    videos = [sprite_video(config, 0, i) for i in range(46)]
    assert len({v.label for v in videos}) == 46
    assert not {v.label_name for v in videos} & set(held_out)
    asked = sprite_video(CONFIG, 0, 0, label=CONFIG.class_names.index(held_out[0]))
    assert asked.label_name == held_out[0]


def test_files_hold_the_frames_and_manifest_the_words(tmp_path):
    config = SpriteConfig(scenes=sprites.SCENES)
    manifest = write_sprites(tmp_path / "videos", 12, config, seed=5)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    truths = [
        json.loads(line) for line in (manifest.parent / "truth.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len(truths) == len(list(manifest.parent.glob("*.mp4"))) == 12
    psnrs = []
    for index, (row, truth) in enumerate(zip(rows, truths)):
        video = sprite_video(config, 5, index)
        assert (row["caption"], row["label"]) == (video.caption, video.label_name)
        assert truth == {"path": row["path"], **video.truth()}
        with av.open(str(manifest.parent / row["path"])) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and stream.average_rate == video.fps
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
        assert frames.shape == video.frames.shape
        error = np.mean((frames.astype(float) - video.frames) ** 2)
        psnrs.append(10 * np.log10(255**2 / error))
        # Flat colours come back to within a few levels.
        difference = np.abs(frames.astype(int) - video.frames)
        assert np.median(difference) <= 3 and np.percentile(difference, 75) <= 8
    # Chroma at half resolution blurs the edges between saturated colours, at any crf.
    assert np.mean(psnrs) > 30 and min(psnrs) > 24


def test_command_line(tmp_path, capsys):
    out = tmp_path / "videos"
    sprites.main(["--output", str(out), "--num", "2", "--short-side", "32", "--aspects", "1:1"])
    assert "walt_jax.prepare --input" in capsys.readouterr().out
    with av.open(str(next(out.glob("*.mp4")))) as container:
        assert container.streams.video[0].width == container.streams.video[0].height == 32
    with pytest.raises(UserError, match="not empty"):
        sprites.main(["--output", str(out), "--num", "2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("hexagon",)}, "shapes has 'hexagon'.*triangle"),
        ({"exclude": ("pink square left",)}, "exclude has 'pink square left'"),
        ({"aspects": ("wide",)}, "aspect 'wide'"),
        ({"aspects": ()}, "aspects is empty"),
        ({"colours": ()}, "no class is left"),
        ({"backgrounds": ("red",)}, "no background is clear of red"),
        ({"short_side": 65}, "short side of 65"),
        ({"seconds": (2.2, 30.0)}, "30.0 seconds; at most"),
        ({"seconds": (0.0, 2.0)}, "must be positive"),
        ({"sizes": (0.5, 0.8)}, "sizes"),
        ({"scenes": ("actions",), "directions": ("left", "up")}, "opposite pairs"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(UserError, match=message):
        SpriteConfig(**change)


@pytest.mark.parametrize(("num", "seed"), [(0, 0), (1, -1)])
def test_wrong_numbers_are_named(tmp_path, num, seed):
    with pytest.raises(UserError, match="num >= 1 and seed >= 0"):
        write_sprites(tmp_path, num, CONFIG, seed)
