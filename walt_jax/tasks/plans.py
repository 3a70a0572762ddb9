"""In which order a long video comes about: FDM's sampling schemes as lists of indices (2205.11495).

A network that sees a window of K frames at a time makes N by steps: each generates n frames, given
at most K - n of those that are there. All indices count *latent* frames: of the causal tokenizer's
stream latent 0 is the first frame alone and every further one is `temporal factor` frames (4), so
that K = 5 latents are 17 frames and N = 129 are 513.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from walt_jax.errors import UserError

# (frames, other) -> their distances to the frame `other`, (len(frames),).
Distance = Callable[[Sequence[int], int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the network.

    Attributes:
      given: frames that are there and that it is given, rising.
      generate: frames that it generates, rising.
    """

    given: tuple[int, ...]
    generate: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a scheme is asked for; see `plan`."""

    num_frames: int
    window: int
    observed: int
    step: int
    distance: Distance | None

    @property
    def room(self) -> int:
        """For given frames."""
        return self.window - self.step


def plan(
    scheme: str,
    num_frames: int,
    window: int,
    observed: int = 0,
    step: int | None = None,
    distance: Distance | None = None,
) -> Iterator[Step]:
    """The steps that make a long video; every frame that is not observed is generated once.

    The schemes, as in the paper (section 4) and its code:

    - "frame_prediction": W.A.L.T's (2312.06662, section 3.4): given the last frames, the next ones.
      The same as "autoregressive", with 2 frames given where `step` says nothing.
    - "autoregressive": given the last K - n frames, the next n.
    - "long_range": half of the given frames are the last ones, half the last of the observed ones
      (without observed ones: of the first window), whatever has come since.
    - "hierarchy2": n frames evenly over all that is to come, given frames evenly over the observed
      ones; then, from left to right, n missing frames at a time, given those between, before and
      after them.
    - "hierarchy3": with a level in between, every s-th frame, s the square root of the first
      level's distance.
    - "adaptive": generates as "hierarchy2". Given are the frames between, the nearest on both
      sides and one more before; the rest are chosen to differ most, one after the other the one
      farthest from all that are given.

    Without observed frames the first step generates a whole window: the first K frames, or in the
    hierarchies K frames evenly over the video; both then count as observed.

    Args:
      scheme: a name from `SCHEMES`.
      num_frames: N, latent frames of the video.
      window: K, latent frames that the network sees.
      observed: how many of the first frames are there before.
      step: n, frames generated at a time; half of the window where None (K - 2 in
        "frame_prediction").
      distance: of frames that are there, for "adaptive" (the paper's is LPIPS). It is asked while
        the steps are taken: each step must be carried out before the next is asked for.

    Yields:
      Steps in order. Only "adaptive" depends on anything but the arguments.

    Raises:
      UserError: no such scheme, or numbers that do not go together.
    """
    if scheme not in SCHEMES:
        raise UserError(f"No scheme {scheme!r} for long videos: choose {', '.join(SCHEMES)}.")
    least = 2 if scheme in ("hierarchy2", "hierarchy3", "adaptive") else 1
    if step is None:
        step = max(1, window - 2) if scheme == "frame_prediction" else max(least, window // 2)
    if not least <= step < window:
        raise UserError(
            f"The scheme {scheme} generates {step} frames at a time in windows of {window}: take "
            f"from {least} to {window - 1}."
        )
    if not 0 <= observed <= num_frames:
        raise UserError(f"{observed} frames are observed of a video of {num_frames}: not so many.")
    if scheme == "adaptive" and distance is None:
        raise UserError("The scheme adaptive chooses by how frames differ: give a distance.")
    distance = distance if scheme == "adaptive" else None
    return SCHEMES[scheme](_Request(num_frames, window, observed, step, distance))


def _autoregressive(asked: _Request) -> Iterator[Step]:
    done = asked.observed
    if not done:
        done = min(asked.window, asked.num_frames)
        yield Step((), tuple(range(done)))
    while done < asked.num_frames:
        end = min(done + asked.step, asked.num_frames)
        yield Step(tuple(range(max(0, done - asked.room), done)), tuple(range(done, end)))
        done = end


def _long_range(asked: _Request) -> Iterator[Step]:
    done = observed = asked.observed
    if not done:
        done = observed = min(asked.window, asked.num_frames)
        yield Step((), tuple(range(done)))
    while done < asked.num_frames:
        given = set(range(max(0, done - asked.room // 2), done))
        for frame in range(observed - 1, -1, -1):
            if len(given) == asked.room:
                break
            given.add(frame)
        end = min(done + asked.step, asked.num_frames)
        yield Step(tuple(sorted(given)), tuple(range(done, end)))
        done = end


def _hierarchy(asked: _Request, levels: int) -> Iterator[Step]:
    count, first = asked.num_frames, asked.observed
    done = set(range(first))
    if not first:
        start = Step((), _spread(0, count - 1, min(asked.window, count)))
        yield start
        done |= set(start.generate)
        first = len(done)
    elif first < count:
        start = Step(
            _spread(0, first - 1 + 0.999, min(asked.room, first)),
            _spread(first, count - 0.001, min(asked.step, count - first)),
        )
        yield start
        done |= set(start.generate)
    apart = max(1.0, (count - first) / (asked.step - 1))  # of the first level's frames
    for level in range(2, levels + 1):
        stride = max(1, int(apart ** ((levels - level) / (levels - 1))))
        place = min(set(range(count)) - done, default=count) - 1 + stride
        while frames := _missing(done, place, stride, count):
            step = _infill(asked, done, frames)
            yield step
            done |= set(step.generate)
            place = step.generate[-1] + stride


def _missing(done: set[int], start: int, stride: int, count: int) -> list[int]:
    """Frames that are not there, every `stride`-th; past one that is there by one."""
    frames, place = [], start
    while place < count:
        if place in done:
            place += 1
        else:
            frames.append(place)
            place += stride
    return frames


def _infill(asked: _Request, done: set[int], missing: Sequence[int]) -> Step:
    """The first of the missing frames, as many as leave room for two others around them."""
    for limit in range(asked.step, 0, -1):
        frames, room = missing[:limit], asked.window - limit
        between = [i for i in range(frames[0], frames[-1]) if i in done]
        around = room - len(between)
        if around >= 2:
            break
    after = [i for i in range(frames[-1] + 1, asked.num_frames) if i in done]
    before = [i for i in range(frames[0] - 1, -1, -1) if i in done]
    if asked.distance is not None:
        nearest = [*between, *before[:1], *after[:1], *before[1:2]][:room]
        given = _most_diverse(nearest, sorted(done), room, asked.distance)
    else:
        after = after[: around // 2]
        given = [*between, *after, *before[: around - len(after)]]
    return Step(tuple(sorted(given)), tuple(frames))


def _most_diverse(
    chosen: Sequence[int], frames: Sequence[int], number: int, distance: Distance
) -> list[int]:
    """Frames added to the chosen ones, each the farthest from all before it."""
    chosen = list(chosen)
    nearest = np.full(len(frames), np.inf)
    for frame in chosen:
        nearest = np.minimum(nearest, distance(frames, frame))
    while len(chosen) < min(number, len(frames)):
        nearest[[i for i, frame in enumerate(frames) if frame in chosen]] = -np.inf
        chosen.append(frames[int(np.argmax(nearest))])
        nearest = np.minimum(nearest, distance(frames, chosen[-1]))
    return chosen


def _spread(start: float, stop: float, number: int) -> tuple[int, ...]:
    """Whole numbers evenly from start to stop, rounded down."""
    return tuple(int(place) for place in np.linspace(start, stop, number))


SCHEMES: dict[str, Callable[[_Request], Iterator[Step]]] = {
    "frame_prediction": _autoregressive,
    "autoregressive": _autoregressive,
    "long_range": _long_range,
    "hierarchy2": lambda asked: _hierarchy(asked, 2),
    "hierarchy3": lambda asked: _hierarchy(asked, 3),
    "adaptive": lambda asked: _hierarchy(asked, 2),
}


def window_of(step: Step, window: int) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees in a step, which may have fewer frames than the window.

    The rest of the window are the frames that follow, of which what is generated is thrown away.

    Returns:
      places: int32 (K,), rising; given: bool (K,), which of them are given.
    """
    frames = sorted({*step.given, *step.generate})
    following = range(frames[-1] + 1, frames[-1] + 1 + window - len(frames))
    places = np.asarray([*frames, *following], np.int32)
    return places, np.isin(places, step.given)
