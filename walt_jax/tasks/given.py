"""Which latents a clip in training is given: the unified mask (VDT, 2305.13311, section 3.3)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    """Shares of clips by what is given of them, clean; of the rest nothing is (generation).

    W.A.L.T's frame prediction is `first` alone; its share p_fp is not published.

    Attributes:
      first: the first latent frames: video prediction, image to video.
      last: the last ones: extension backwards.
      ends: the first and the last frame: interpolation, transitions.
      every_other: every second frame, from the first on.
      random: each frame by a coin.
      region: all but a random box, the same in every frame: in- and outpainting.
      first_frames: how many latent frames `first` gives, and `last` at the other end; each number
        as often as the others.
    """

    first: float = 0.0
    last: float = 0.0
    ends: float = 0.0
    every_other: float = 0.0
    random: float = 0.0
    region: float = 0.0
    first_frames: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        shares = [getattr(self, kind) for kind in _KINDS]
        if min(shares) < 0 or sum(shares) > 1 + 1e-6:
            raise UserError(
                f"The shares of config.task.given ({', '.join(_KINDS)}) must not be negative nor "
                f"sum to more than 1, got {shares}."
            )
        if not self.first_frames or min(self.first_frames) < 1:
            raise UserError(
                "config.task.given.first_frames must name numbers of latent frames, at least 1, "
                f"got {self.first_frames}."
            )

    @property
    def share(self) -> float:
        """Of clips of which something is given."""
        return sum(getattr(self, kind) for kind in _KINDS)

    def admits(self, mask: np.ndarray) -> bool:
        """Whether training gives latents as a mask does, bool (T, H, W); a region of any form."""
        if not mask.any() or mask.all():
            return not mask.any()
        frames = mask.any((1, 2))
        whole, places = bool((mask == frames[:, None, None]).all()), np.flatnonzero(frames)
        last, count = len(frames) - 1, len(places)
        counted = whole and count in self.first_frames
        drawn = {
            "first": counted and places[-1] == count - 1,
            "last": counted and places[0] == last - count + 1,
            "ends": whole and places.tolist() == [0, last],
            "every_other": whole and places.tolist() == list(range(0, last + 1, 2)),
            "random": whole,
            "region": bool((mask == mask[:1]).all()),
        }
        return any(drawn[kind] for kind in _KINDS if getattr(self, kind) > 0)

    def __str__(self) -> str:
        """What training gives, in words."""
        counts = " or ".join(map(str, sorted(self.first_frames)))
        words = {
            "first": f"the first {counts}",
            "last": f"the last {counts}",
            "ends": "the first and the last",
            "every_other": "every other",
            "random": "any",
            "region": "all but a region",
        }
        kinds = [words[kind] for kind in _KINDS if getattr(self, kind) > 0]
        return f"{', '.join(kinds)} of the latent frames" if kinds else "nothing"


def given_mistakes(config: GivenConfig, model: DenoiserConfig) -> list[tuple[bool, str]]:
    """What of a model and of what training gives does not go together, and the sentence for it."""
    return [
        (
            model.frame_times and (model.given == "none" or config.share > 0),
            "model.frame_times=True needs model.given, and config.task.frames says what is "
            "given: set model.given='channels' or its like, and no shares in config.task.given",
        ),
        (
            (model.given != "none") != (model.frame_times or config.share > 0),
            f"model.given={model.given!r}, but the shares of config.task.given sum to "
            f"{config.share:g}: set both, or neither",
        ),
    ]


def draw_masks(config: GivenConfig, keys: jax.Array, grid: Grid) -> jax.Array:
    """What is given of each clip.

    Args:
      config: shares of the kinds.
      keys: (B,), a key a clip.
      grid: (T, H, W) of the latents.

    Returns:
      bool (B, T, H, W), True where a latent is given.

    Raises:
      UserError: `first_frames` gives all of the clip.
    """
    if config.first + config.last > 0 and max(config.first_frames) >= grid[0]:
        raise UserError(
            f"config.task.given.first_frames={config.first_frames} gives all of clips of {grid[0]} "
            "latent frames: at least one must be left to generate."
        )
    corner, size = jnp.zeros(3, jnp.int32), jnp.asarray(grid)
    masks = jax.vmap(lambda key: _mask(config, key, corner, size, grid))(keys)
    # Of a clip that is given whole nothing would be learned.
    return masks & ~masks.all((1, 2, 3), keepdims=True)


def draw_block_masks(
    config: GivenConfig, keys: jax.Array, places: jax.Array, extents: jax.Array, block: Grid
) -> jax.Array:
    """What is given in blocks of clips, as `draw_masks` gives it; here also whole clips.

    Args:
      config: shares of the kinds.
      keys: (B,), a key a block: that of its clip.
      places: int32 (B, 3), the first latent (t, h, w) of each block in its clip.
      extents: int32 (B, 3), latents (T, H, W) of its clip.
      block: (t, h, w), latents of a block.

    Returns:
      bool (B, t, h, w).
    """
    return jax.vmap(lambda *of: _mask(config, *of, block))(keys, places, extents)


class _Places(NamedTuple):
    """Where latents are in a clip: `at` int32 (t, 1, 1), (1, h, 1), (1, 1, w); `of` (T, H, W)."""

    at: tuple[jax.Array, ...]
    of: jax.Array


def _mask(
    config: GivenConfig, key: jax.Array, corner: jax.Array, size: jax.Array, block: Grid
) -> jax.Array:
    """What is given in a block that lies at a corner of a clip of a size; bool like the block."""
    at = tuple(x + c for x, c in zip(jnp.ogrid[tuple(slice(n) for n in block)], corner))
    shares = [getattr(config, kind) for kind in _KINDS]
    odds = jnp.asarray([max(0.0, 1.0 - sum(shares)), *shares])
    pick, draw = jax.random.split(key)
    masks = [kind(draw, _Places(at, size), config.first_frames) for kind in _KINDS.values()]
    masks = [jnp.zeros(block, bool), *(jnp.broadcast_to(mask, block) for mask in masks)]
    return jnp.stack(masks)[jax.random.choice(pick, len(masks), p=odds)]


def _first(key: jax.Array, places: _Places, counts: Sequence[int]) -> jax.Array:
    return places.at[0] < jax.random.choice(key, jnp.asarray(counts))


def _last(key: jax.Array, places: _Places, counts: Sequence[int]) -> jax.Array:
    return places.at[0] >= places.of[0] - jax.random.choice(key, jnp.asarray(counts))


def _ends(key: jax.Array, places: _Places, counts: Sequence[int]) -> jax.Array:
    return (places.at[0] == 0) | (places.at[0] == places.of[0] - 1)


def _every_other(key: jax.Array, places: _Places, counts: Sequence[int]) -> jax.Array:
    return places.at[0] % 2 == 0


def _random(key: jax.Array, places: _Places, counts: Sequence[int]) -> jax.Array:
    frames = places.at[0].reshape(-1)
    coins = jax.vmap(lambda frame: jax.random.bernoulli(jax.random.fold_in(key, frame)))(frames)
    return coins[:, None, None]


def _region(key: jax.Array, places: _Places, counts: Sequence[int]) -> jax.Array:
    """All but a box between two corners."""
    inside = []
    for axis, draw in zip((1, 2), jax.random.split(key)):
        corners = jax.random.randint(draw, (2,), 0, places.of[axis])
        inside.append((places.at[axis] >= corners.min()) & (places.at[axis] <= corners.max()))
    return ~(inside[0] & inside[1])


_KINDS: dict[str, Callable[[jax.Array, _Places, Sequence[int]], jax.Array]] = {
    "first": _first,
    "last": _last,
    "ends": _ends,
    "every_other": _every_other,
    "random": _random,
    "region": _region,
}
