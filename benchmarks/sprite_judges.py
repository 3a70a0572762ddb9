"""What is right in sampled sprite videos, by `walt_jax.data.sprite_readback`: shares and errors.

Judges look at pixels alone and name what they see; what was asked for is compared afterwards.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from walt_jax.data.sprite_readback import ReadBack, read_back
from walt_jax.data.sprites import COLOURS, SpriteConfig, SpriteVideo

TOLERANCE = 0.2  # of a speed that counts as right
Scores = dict[str, float]


def look(videos: np.ndarray, fps: float, config: SpriteConfig) -> list[ReadBack]:
    """What is seen in each of uint8 (N, T, H, W, 3), the nearest of the config's names."""
    names = {k: getattr(config, k) for k in ("shapes", "colours", "directions")}
    return [read_back(video, fps, **names, forced=True) for video in videos]


def background(video: np.ndarray, names: Sequence[str]) -> str:
    """The name of the colour along the border of a video, uint8 (T, H, W, 3), nearest in Lab."""
    ring = np.concatenate([video[:, [0, -1]].reshape(-1, 3), video[:, :, [0, -1]].reshape(-1, 3)])
    table = np.array([np.median(ring, axis=0), *(COLOURS[n] for n in names)], np.float32)
    lab = cv2.cvtColor(table[None] / 255, cv2.COLOR_RGB2LAB)[0]
    return names[int(np.argmin(np.linalg.norm(lab[1:] - lab[0], axis=1)))]


def attributes(videos: np.ndarray, truths: Sequence[SpriteVideo], config: SpriteConfig) -> Scores:
    """Shares of videos with the colour, shape, direction and background that were asked for.

    "all three" are colour, shape and direction; "frames found" is the mean share of frames that
    have the object.
    """
    seen = look(videos, 1.0, config)
    right = np.array(
        [
            (s.colour == t.colour, s.shape == t.shape, s.direction == t.direction)
            for s, t in zip(seen, truths)
        ]
    )
    grounds = [background(v, config.backgrounds) == t.background for v, t in zip(videos, truths)]
    return {
        **dict(zip(("colour", "shape", "direction"), right.mean(0).tolist())),
        "all three": float(right.all(1).mean()),
        "background": float(np.mean(grounds)),
        "frames found": float(np.mean([s.persistence for s in seen])),
    }


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """dB of each of two stacks of uint8 videos (N, T, H, W, 3), float64 (N,)."""
    error = np.square(a.astype(np.float64) - b).mean((1, 2, 3, 4))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-3))


def speeds(seen: Sequence[ReadBack], truths: Sequence[float]) -> Scores:
    """How the objects' speeds, px/s, compare with the true ones.

    "speed error" is the median of |speed / truth - 1|; "speed right" the share within `TOLERANCE`,
    an object whose speed cannot be told being wrong.
    """
    errors = np.array([abs(s.speed / t - 1) for s, t in zip(seen, truths)])
    known = errors[np.isfinite(errors)]
    return {
        "speed error": float(np.median(known)) if len(known) else float("nan"),
        "speed right": float((errors <= TOLERANCE).mean()),
    }


def continued(
    videos: np.ndarray,
    reconstructions: np.ndarray,
    given: np.ndarray,
    truths: Sequence[SpriteVideo],
    fps: float,
    config: SpriteConfig,
) -> Scores:
    """Of videos of which some frames were given: do these reappear, do the others go on from them?

    Args:
      videos, reconstructions: uint8 (N, T, H, W, 3), samples and the originals through the
        tokenizer.
      given: bool (T,), the frames that were given.

    Returns:
      "given psnr": mean dB of the given frames against the reconstruction, "given worst" the least;
      shares and speeds of `attributes` and `speeds` on the frames that were not given.
    """
    db = psnr(videos[:, given], reconstructions[:, given])
    made = videos[:, ~given]
    # Not given frames are consecutive, so that speeds are those of whole stretches.
    seen = look(made, fps, config)
    right = attributes(made, truths, config)
    return {
        "given psnr": float(db.mean()),
        "given worst": float(db.min()),
        **right,
        **speeds(seen, [t.speed for t in truths]),
    }


def in_sight_again(visible: np.ndarray, share: float = 0.98) -> int | None:
    """The first of the last frames in which the object is wholly in sight, or None.

    Args:
      visible: float (T,), the share of the object that is seen.
      share: of it that counts as whole.
    """
    hidden = np.flatnonzero(visible < share)
    tail = int(hidden[-1]) + 1 if len(hidden) else 0
    return tail if len(visible) - tail >= 2 else None


def returned(
    videos: np.ndarray,
    truths: Sequence[SpriteVideo],
    tails: Sequence[int],
    fps: float,
    config: SpriteConfig,
) -> Scores:
    """Of objects that were out of sight: do they come back as they were?

    Args:
      videos: uint8 (N, T, H, W, 3).
      tails: the first frame of each after which the object is to be in sight again, whole.

    Returns:
      "back": share in which it is found in all of these frames; "colour", "shape", "all" (with
      the speed) of what came back; and `speeds` over the frames in which the object is clear,
      before and after, which are far apart.
    """
    options = {k: getattr(config, k) for k in ("shapes", "colours", "directions")}
    rows, whole = [], []
    for video, truth, tail in zip(videos, truths, tails):
        after = read_back(video[tail:], fps, **options, forced=True)
        seen = read_back(video, fps, **options, forced=True)
        speed_right = abs(seen.speed / truth.speed - 1) <= TOLERANCE
        same = after.colour == truth.colour, after.shape == truth.shape
        back = bool(seen.found[tail:].all())  # of its colour in the whole video
        rows.append((back, *same, seen.direction == truth.direction, speed_right))
        whole.append(seen)
    rows = np.array(rows)
    return {
        **dict(zip(("back", "colour", "shape", "direction"), rows[:, :4].mean(0).tolist())),
        **speeds(whole, [t.speed for t in truths]),
        "all": float(rows.all(1).mean()),
    }


def followed(videos: np.ndarray, actions: np.ndarray, config: SpriteConfig) -> Scores:
    """Do objects move as the actions say?

    Args:
      videos: uint8 (N, T, H, W, 3).
      actions: int (N, T), the movement from each frame to the next, indices of the config's
        directions.

    Returns:
      "steps seen": share of the steps between frames whose direction can be told; "steps right":
      of these, the share that is as asked; "videos right": of the videos, those in which at least
      nine in ten are.
    """
    shares, known = [], []
    for seen, wanted in zip(look(videos, 1.0, config), actions):
        told = [d for d in zip(seen.directions[:-1], wanted[:-1]) if d[0] is not None]
        known.append(len(told) / (len(wanted) - 1))
        shares.append(np.mean([d == config.directions[a] for d, a in told]) if told else 0.0)
    weights = np.array(known)
    return {
        "steps seen": float(weights.mean()),
        "steps right": float(np.average(shares, weights=weights)) if weights.any() else 0.0,
        "videos right": float(np.mean(np.array(shares) >= 0.9)),
    }


def whole_in_frame(videos: Mapping[str, np.ndarray], config: SpriteConfig) -> Scores:
    """Share of videos whose object is found in every frame and never touches the border.

    Args:
      videos: aspect -> uint8 (N, T, H, W, 3).

    Returns:
      The share by aspect, and over all as "whole in frame".
    """
    shares, out = [], {}
    for name, clips in videos.items():
        seen = look(clips, 1.0, config)
        inside = [bool(s.found.all()) and s.wholly_inside for s in seen]
        out[f"whole in frame, {name}"] = float(np.mean(inside))
        shares += inside
    return {"whole in frame": float(np.mean(shares)), **out}
