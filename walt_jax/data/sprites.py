"""Built-in videos: one coloured shape that moves over a plain background, from a seed.

    python -m walt_jax.data.sprites --output videos --num 480 --seed 0

Every video is a function of (config, seed, index) alone. A class is a (shape, colour, direction)
triple, "red square left"; classes are balanced, all else varies freely within a class. What there
is besides the sprite is the *scene*:

  plain     nothing.
  occluder  a bar across the middle, wide enough to hide the sprite wholly as it passes behind.
  pan       a steady camera pan, seen in a textured background; directions are as in the picture.
  away      the camera swings away over a textured background until the sprite has left the
            picture, and back; the sprite moves on meanwhile, in its own direction.
  actions   the sprite turns every half second; `actions` says where it goes after each frame. The
            class names the first direction.

Coordinates are (x, y) in px, x to the right and y down, (0, 0) the centre of the top left pixel.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import cv2
import numpy as np

from walt_jax import cli
from walt_jax.errors import UserError
from walt_jax.media import write_mp4
from walt_jax.progress import bar

_CORNERS = np.linspace(0, 2 * np.pi, 64, endpoint=False)
# Outlines for a diameter of 1, as vertices (K, 2) around the centre of gravity.
SHAPES: dict[str, np.ndarray] = {
    "square": 0.44 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "circle": 0.5 * np.stack([np.cos(_CORNERS), np.sin(_CORNERS)], axis=1),
    "triangle": np.array([[0, -2], [1.5, 1], [-1.5, 1]]) / [3, 2 * math.sqrt(3)],
}
# sRGB. The first four are sprites by default, and all are backgrounds.
COLOURS: dict[str, tuple[int, int, int]] = dict(
    red=(220, 40, 40), green=(20, 150, 50), blue=(50, 80, 220), yellow=(240, 205, 40),
    black=(20, 20, 20), white=(235, 235, 235), gray=(140, 140, 140), purple=(130, 50, 160)
)  # fmt: skip
DIRECTIONS: dict[str, tuple[int, int]] = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))
SCENES = ("plain", "occluder", "pan", "away", "actions")

_MIN_CONTRAST = 110.0  # RGB distance between things that touch; keeps blue off purple
_MARGIN = 0.03  # least distance of the sprite from the edge of its box, of the short side
_MIN_SPEED = 0.11  # short sides a second: a fifth of the short side within 2 seconds
_BAR = 1.1  # width of the occluder, of the sprite's extent
_OCCLUDED_SIZE = 0.65  # smaller sprites there: one is to fit on either side of the bar
_ACTION_SECONDS = 0.5
_ACTION_SPEED = (0.25, 0.5)  # short sides a second; at most half of the room in one action
_PAN_SPEED = (0.2, 0.5)  # short sides a second
_TEXTURE = 40.0  # amplitude of the background texture, in 8-bit levels
_WAVE = 0.45  # its wave length, of the short side
_SUPERSAMPLING = 8


@dataclasses.dataclass(frozen=True)
class SpriteConfig:
    """What the videos vary over; each is drawn evenly from its choices.

    Attributes:
      shapes, colours, directions: names of the sprite's attributes; their product is the list of
        classes, in this order with directions fastest.
      backgrounds: names of colours; only those clear of the sprite's colour are drawn with it.
      aspects: "width:height".
      short_side: pixels of the shorter side, even; the other is rounded to an even number.
      seconds: least and greatest time between the first and last frame. 17 frames at 8 fps need 2.
      fps: frame rates.
      sizes: least and greatest diameter of the sprite, of the short side.
      central: the path keeps to the square that a centre crop keeps, not the whole frame.
      crossing: the sprite goes all the way that there is, not a part of it.
      scenes: names from `SCENES`; repeat one to draw it more often.
      exclude: class names that are never drawn (held out of training); class ids stay the same.
    """

    shapes: tuple[str, ...] = ("square", "circle", "triangle")
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow")
    directions: tuple[str, ...] = ("left", "right", "up", "down")
    backgrounds: tuple[str, ...] = tuple(COLOURS)
    aspects: tuple[str, ...] = ("16:9", "9:16", "1:1", "4:3")
    short_side: int = 64
    seconds: tuple[float, float] = (2.2, 4.0)
    fps: tuple[int, ...] = (8, 12, 16, 24, 30)
    sizes: tuple[float, float] = (0.28, 0.4)
    central: bool = True
    crossing: bool = False
    scenes: tuple[str, ...] = ("plain",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for names that do not exist and sizes that do not fit."""
        known = dict(shapes=SHAPES, colours=COLOURS, directions=DIRECTIONS, backgrounds=COLOURS)
        known.update(scenes=SCENES, exclude=self.class_names)
        for field, names in known.items():
            for name in getattr(self, field):
                if name not in names:
                    raise UserError(f"sprites: {field} has {name!r}; known: {', '.join(names)}.")
        for field in ("aspects", "fps", "scenes"):
            if not getattr(self, field):
                raise UserError(f"sprites: {field} is empty; name at least one.")
        if not self.class_ids:
            raise UserError("sprites: no class is left to draw; name more, or exclude fewer.")
        lost = [colour for colour in self.colours if not _contrasting(self.backgrounds, colour)]
        if lost:
            raise UserError(f"sprites: no background is clear of {lost[0]}; add another.")
        for aspect in self.aspects:
            frame_size(aspect, self.short_side)
        if not (min(self.fps) > 0 and 0 < self.seconds[0] <= self.seconds[1]):
            raise UserError(f"sprites: fps {self.fps} and seconds {self.seconds} must be positive.")
        if not 0.1 <= self.sizes[0] <= self.sizes[1] <= 0.45:
            raise UserError(f"sprites: sizes {self.sizes} must rise and lie within 0.1 and 0.45.")
        if "actions" in self.scenes and np.any(np.sum([DIRECTIONS[d] for d in self.directions], 0)):
            raise UserError("sprites: the scene 'actions' needs directions in opposite pairs.")
        longest = (1 - 2 * _MARGIN - self.sizes[1]) / _MIN_SPEED
        if set(self.scenes) != {"actions"} and self.seconds[1] > longest:
            raise UserError(
                f"sprites: a sprite of size {self.sizes[1]} leaves the frame in {self.seconds[1]} "
                f"seconds; at most {longest:.1f} fit, or any number in the scene 'actions'."
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id, such as "red square left"."""
        triples = itertools.product(self.shapes, self.colours, self.directions)
        return tuple(f"{colour} {shape} {direction}" for shape, colour, direction in triples)

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The class ids that are drawn: all but the excluded ones."""
        return tuple(i for i, name in enumerate(self.class_names) if name not in self.exclude)


@dataclasses.dataclass(frozen=True)
class SpriteVideo:
    """One video and the truth about it.

    Attributes:
      frames: uint8 (T, H, W, 3), sRGB.
      fps: frames a second.
      label, label_name: the class id and its name.
      caption: a sentence, such as "a red square moves left over a blue background".
      shape, colour, direction, background, aspect, scene: names, as in the config.
      diameter: of the sprite, px; the width of a circle or a triangle.
      speed: of the sprite, px/s.
      centres: float32 (T, 2), the sprite's centre of gravity; outside the frame while out of sight.
      visible: float32 (T,) in [0, 1], the share of the sprite's area that is seen, to 0.02.
      actions: int32 (T,), the index in `config.directions` of the movement from this frame to the
        next (the last is repeated).
    """

    frames: np.ndarray
    fps: int
    label: int
    label_name: str
    caption: str
    shape: str
    colour: str
    direction: str
    background: str
    aspect: str
    scene: str
    diameter: float
    speed: float
    centres: np.ndarray
    visible: np.ndarray
    actions: np.ndarray

    def truth(self) -> dict:
        """Everything but the frames, as JSON values."""
        arrays = {k: getattr(self, k).round(3).tolist() for k in ("centres", "visible", "actions")}
        return {k: v for k, v in vars(self).items() if k != "frames"} | arrays


def frame_size(aspect: str, short_side: int) -> tuple[int, int]:
    """(height, width) in px, both even, of an aspect such as "16:9"; UserError if there is none."""
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", aspect) or short_side < 16 or short_side % 2:
        raise UserError(
            f"sprites: no frame has the aspect {aspect!r} and a short side of {short_side}; write "
            "the aspect like 16:9 and take an even short side of at least 16."
        )
    width, height = (int(part) for part in aspect.split(":"))
    scale = short_side / min(width, height)
    return 2 * round(height * scale / 2), 2 * round(width * scale / 2)


def shape_mask(
    shape: str, centre: np.ndarray, diameter: float, size: tuple[int, int]
) -> np.ndarray:
    """Anti-aliased coverage of a shape, float32 (H, W) in [0, 1]; centre (x, y) and size in px."""
    k = _SUPERSAMPLING
    fine = np.zeros((size[0] * k, size[1] * k), np.uint8)
    outline = (SHAPES[shape] * diameter + np.asarray(centre) + 0.5) * k - 0.5
    cv2.fillPoly(fine, [np.round(outline * 16).astype(np.int32)], 255, shift=4)
    return cv2.resize(fine, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _contrasting(names: tuple[str, ...], *others: str) -> list[str]:
    """Those of the colour names that are clear of all others."""
    rgb = {name: np.array(COLOURS[name], float) for name in (*names, *others)}
    return [
        name
        for name in names
        if all(np.linalg.norm(rgb[name] - rgb[other]) >= _MIN_CONTRAST for other in others)
    ]


def _wander(
    rng: np.random.Generator, names: tuple[str, ...], first: str, times: np.ndarray, speed: float,
    room: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """A path in [0, room] that turns at times: positions (T, 2) in px, actions int32 (T,)."""
    moves = {name: np.array(DIRECTIONS[name]) * speed * _ACTION_SECONDS for name in names}
    corners = [rng.uniform(np.maximum(-moves[first], 0), room - np.maximum(moves[first], 0))]
    choices = [first]
    for _ in range(math.floor(times[-1] / _ACTION_SECONDS) + 1):
        corners.append(corners[-1] + moves[choices[-1]])
        ends = {name: corners[-1] + moves[name] for name in names}
        fits = [n for n in names if np.all(ends[n] >= 0) and np.all(ends[n] <= room)]
        choices.append(str(rng.choice([n for n in fits if n != choices[-1]] or fits)))
    knots = np.arange(len(corners)) * _ACTION_SECONDS
    path = np.stack([np.interp(times, knots, axis) for axis in np.array(corners).T], axis=1)
    # The action of a frame is the one under way half a frame later; the last repeats.
    middles = (times[:-1] + times[1:]) / 2
    segments = (np.append(middles, middles[-1]) / _ACTION_SECONDS).astype(int)
    return path, np.array([names.index(choices[s]) for s in segments], np.int32)


def _texture(
    colour: np.ndarray, camera: np.ndarray, size: tuple[int, int], wave: float
) -> np.ndarray:
    """A soft plaid, float32 (H, W, 3) in [0, 255], seen from a camera at (x, y); wave in px."""
    y, x = (2 * np.pi / wave * (np.arange(n) + c) for n, c in zip(size, camera[::-1]))
    plaid = 0.5 + 0.25 * (np.sin(x)[None, :] + np.sin(y)[:, None])
    # Bright colours get darker and dark ones brighter, so that none is clipped away.
    sign = 1 if colour.mean() < 110 else -1
    return np.clip(colour + sign * _TEXTURE * plaid[..., None], 0, 255).astype(np.float32)


def sprite_video(
    config: SpriteConfig, seed: int, index: int, label: int | None = None
) -> SpriteVideo:
    """Draws video `index` of the data set `seed`.

    Args:
      config: what to vary.
      seed, index: non-negative; with the config they fix every pixel.
      label: draws this class in place of the one that is the index's turn.
    """
    if label is None:  # classes come in a new order each time that all have been drawn
        round_, place = divmod(index, len(config.class_ids))
        order = np.random.default_rng((0, seed, round_)).permutation(config.class_ids)
        label = int(order[place])
    colour, shape, direction = config.class_names[label].split()
    rng = np.random.default_rng((1, seed, index))
    scene, aspect, fps = (
        values[rng.integers(len(values))] for values in (config.scenes, config.aspects, config.fps)
    )
    background = str(rng.choice(_contrasting(config.backgrounds, colour)))
    side = config.short_side
    size = frame_size(aspect, side)
    times = np.arange(math.ceil(rng.uniform(*config.seconds) * fps) + 1) / fps
    diameter = side * rng.uniform(*config.sizes) * (_OCCLUDED_SIZE if scene == "occluder" else 1)

    # The box that holds the sprite, then the room [low, low + room] that this leaves its centre.
    frame = np.array(size[::-1], float)
    box = np.full(2, side, float) if config.central else frame
    reach_low, reach_high = SHAPES[shape].min(0) * diameter, SHAPES[shape].max(0) * diameter
    low = (frame - box) / 2 - 0.5 + _MARGIN * side - reach_low
    room = box - 2 * _MARGIN * side - (reach_high - reach_low)

    step = np.array(DIRECTIONS[direction], float)
    axis = int(np.argmax(np.abs(step)))
    if scene == "actions":
        speed = min(side * rng.uniform(*_ACTION_SPEED), room.min())
        path, actions = _wander(rng, config.directions, direction, times, speed, room)
    else:
        fastest = room[axis] / times[-1]
        # Behind an occluder the sprite needs the whole way: in sight, hidden, in sight again.
        whole = config.crossing or scene == "occluder"
        slowest = fastest if whole else min(_MIN_SPEED * side, fastest)
        speed = rng.uniform(slowest, fastest)
        travel = step * speed * times[-1]
        start = np.maximum(-travel, 0) + rng.uniform(size=2) * np.maximum(room - abs(travel), 0)
        path = start + step * speed * times[:, None]
        actions = np.full(len(times), config.directions.index(direction), np.int32)
    centres = low + path
    turning = " and turns again and again" if scene == "actions" else ""
    words = f"moves {direction}{turning} over a {background} background"

    camera = np.zeros((len(times), 2))
    if scene in ("pan", "away"):
        heading = str(rng.choice(list(DIRECTIONS)))
        if scene == "pan":
            swing = rng.uniform(*_PAN_SPEED) * side * times
            words += f" while the camera pans {heading}"
        else:
            # Out between 25 % and 40 % of the time, back between 60 % and 75 %.
            clock = times / times[-1]
            ramp = np.clip(np.minimum(clock - 0.25, 0.75 - clock) / 0.15, 0, 1)
            swing = (frame @ np.abs(DIRECTIONS[heading]) + 1) * ramp**2 * (3 - 2 * ramp)
            words += " while the camera looks away and comes back"
        camera = swing[:, None] * np.array(DIRECTIONS[heading])
        centres -= camera * (scene == "away")

    bar, bar_rgb = np.zeros(size, np.float32), np.zeros(3, np.float32)
    if scene == "occluder":
        bar_colour = str(rng.choice(_contrasting(tuple(COLOURS), colour, background)))
        bar_rgb[:] = COLOURS[bar_colour]
        from_middle = np.abs(np.arange(frame[axis]) + 0.5 - frame[axis] / 2)
        line = np.clip(_BAR * (reach_high - reach_low)[axis] / 2 + 0.5 - from_middle, 0, 1)
        bar += line if axis == 0 else line[:, None]
        words += f" and passes behind a {bar_colour} bar"

    sprite_rgb, ground_rgb = np.array([COLOURS[colour], COLOURS[background]], np.float32)
    whole = shape_mask(shape, frame / 2, diameter, size).sum()
    frames = np.empty((len(times), *size, 3), np.uint8)
    visible = np.empty(len(times), np.float32)
    for t, centre in enumerate(centres):
        ground = ground_rgb
        if scene in ("pan", "away"):
            ground = _texture(ground_rgb, camera[t], size, _WAVE * side)
        mask = shape_mask(shape, centre, diameter, size)
        visible[t] = min(1.0, (mask * (1 - bar)).sum() / whole)
        picture = ground + mask[..., None] * (sprite_rgb - ground)
        frames[t] = np.round(picture + bar[..., None] * (bar_rgb - picture))
    return SpriteVideo(
        frames, fps, label, config.class_names[label], f"a {colour} {shape} {words}",
        shape, colour, direction, background, aspect, scene, float(diameter), float(speed),
        centres.astype(np.float32), visible, actions,
    )  # fmt: skip


def write_sprites(
    directory: str | Path, num: int, config: SpriteConfig, seed: int = 0, *, crf: int = 12
) -> Path:
    """Writes videos 0 ... num-1 as H.264 files, with their captions and the truth about them.

    Args:
      directory: made if missing, empty. Receives `<class>_<index>.mp4`, `truth.jsonl` (a line of
        `SpriteVideo.truth()` a video) and, last, `manifest.jsonl` (path relative to the manifest,
        caption, label): a directory with a manifest is complete.
      num, config, seed: how many videos, of what kind, of which data set.
      crf: quality of the files, as in `walt_jax.media.write_mp4`.

    Returns:
      The path of the manifest. Raises UserError if num < 1, seed < 0 or the folder is not empty.
    """
    if num < 1 or seed < 0:
        raise UserError(f"sprites: num is {num} and seed {seed}; take num >= 1 and seed >= 0.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):  # files of another seed would mix with these
        raise UserError(f"sprites: {directory} is not empty; name a new folder, or delete it.")
    rows, truths = [], []
    for index in bar(range(num), what="sprites", unit="video"):
        video = sprite_video(config, seed, index)
        path = f"{video.label_name.replace(' ', '_')}_{index:05d}.mp4"
        write_mp4(directory / path, video.frames, video.fps, crf=crf)
        rows.append({"path": path, "caption": video.caption, "label": video.label_name})
        truths.append({"path": path, **video.truth()})
    (directory / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truths))
    manifest, partial = directory / "manifest.jsonl", directory / "manifest.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(manifest)
    return manifest


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = cli.Parser(
        description="Writes sprite videos and a manifest that walt_jax.prepare reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--num", type=int, default=480, help="number of videos")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data set")
    parser.add_argument("--short-side", type=int, default=SpriteConfig.short_side, help="px, even")
    parser.add_argument("--central", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--crossing", action=argparse.BooleanOptionalAction, default=False)
    for name in ("backgrounds", "scenes", "aspects", "fps", "seconds", "sizes", "exclude"):
        value = getattr(SpriteConfig, name)
        kind, nargs = type((*value, "")[0]), 2 if name in ("seconds", "sizes") else "*"
        about = f"as SpriteConfig.{name}"
        parser.add_argument(f"--{name}", type=kind, nargs=nargs, default=value, help=about)
    args = vars(parser.parse_args(argv))
    output, num, seed = (args.pop(key) for key in ("output", "num", "seed"))
    lists = {key: tuple(value) for key, value in args.items() if isinstance(value, list)}
    manifest = write_sprites(output, num, SpriteConfig(**{**args, **lists}), seed)
    print(f"{num} videos; next: python -m walt_jax.prepare --input {manifest} --output records")


if __name__ == "__main__":
    cli.run(main)
