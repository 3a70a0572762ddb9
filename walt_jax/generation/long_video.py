"""Videos longer than what the network sees at a time, in memory that does not grow with them.

A plan (`walt_jax.tasks.plans`) says in which steps the latent frames come about. They lie on the
host, and as soon as the first ones are there without a gap they are decoded, chunk by chunk, by the
causal decoder that remembers the frames before (`models/tokenizer/streaming.py`): one stream has no
seams, in whatever order its latents were made.

A network that is told where its frames lie (`frame_times`) follows any plan. One that is not goes
on from the last frames alone, W.A.L.T's repeated frame prediction (2312.06662, section 3.4): it has
only seen clips that begin with a causal tokenizer's first latent, so that the last frames are
decoded, and encoded again as the beginning of the next clip.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from walt_jax.diffusion import Ddim, Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.generation.generator import Generator
from walt_jax.models.tokenizer.streaming import decode_chunks, encode_chunks, split_frames
from walt_jax.parallel import Layout
from walt_jax.progress import bar as progress_bar
from walt_jax.tasks import Wanted, to_uint8, to_unit
from walt_jax.tasks.denoiser import NONE
from walt_jax.tasks.plans import Step, plan, window_of

# (latent frames (n, h, w, C), one of them (h, w, C)) -> their distances (n,).
LatentDistance = Callable[[np.ndarray, np.ndarray], np.ndarray]
_CHUNK = 4  # latent frames that are decoded, or encoded, at a time


def latent_distance(frames: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean squared differences of latent frames (n, h, w, C) from another (h, w, C): (n,)."""
    return np.square(frames - other).mean((1, 2, 3))


def generate_long(
    generator: Generator,
    num_frames: int,
    wanted: Wanted | Callable[[int], Wanted] = Wanted(),  # noqa: B008
    *,
    scheme: str = "frame_prediction",
    step: int | None = None,
    count: int | None = None,
    start: np.ndarray | None = None,
    seed: int = 0,
    sampler: Sampler = Ddim(),  # noqa: B008
    guidance: Scale = NONE,
    given_guidance: Scale = NONE,
    distance: LatentDistance = latent_distance,
    latents: np.ndarray | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Iterator[np.ndarray]:
    """N long videos, piece by piece.

    Video i depends on (seed, i) and what is wanted of it, not on the batch. Pieces come as soon as
    they can be decoded: with the hierarchies, when the gaps are filled.

    Args:
      generator: of a model with `frame_times`, or of one that was trained on frame prediction, for
        the schemes "frame_prediction" and "autoregressive".
      num_frames: of the videos, 1 + 4 n (with the default tokenizer).
      wanted: labels and texts of N videos; or, where these change over time, a function from a
        step's middle frame to them.
      scheme: in which order frames come about; see `walt_jax.tasks.plans.plan`.
      step: latent frames generated at a time; None as there, or what training gave.
      count: N, where `wanted` does not say it.
      start: uint8 (N, T, H, W, 3), frames to go on from, T = 1 + 4 n; they come first in what is
        yielded, in a stream as the tokenizer reconstructs them, and count to `num_frames`.
      seed: of the noise.
      sampler: with its number of steps.
      guidance, given_guidance: as in `Generator.sample`.
      distance: of latent frames, for "adaptive".
      latents: float32 (N, t, h, w, C) to keep a stream's latents in, a memmap for instance.
      batch_size: videos at a time, rounded up to the devices.
      progress: show a progress bar.

    Yields:
      uint8 (N, n, H, W, 3): all frames in order, some at a time.

    Raises:
      UserError: the model was not trained for the scheme, or sizes do not fit; before any work.
    """
    sampler.check(generator.task.diffusion)
    ask = wanted if callable(wanted) else lambda frame: wanted
    options = {"sampler": sampler, "guidance": guidance, "given_guidance": given_guidance}
    run = _Run(generator, ask, count, seed, batch_size, progress, options)
    total = run.latent_frames(num_frames)
    observed = 0 if start is None else run.check_start(start, num_frames)
    if generator.task.model.frame_times:
        steps = [
            plan(scheme, total, run.window, observed, step, run.between(v, distance))
            for v in range(run.count)
        ]
        run.keep(total, latents)
        there = run.stream(steps, total, start)
        return decode_latents(run.generator, run.latents, there, batch_size=run.rows)
    given = _given_in_clips(generator, scheme, step, observed)
    steps = plan("frame_prediction", total, run.window, observed, run.window - max(given))
    return run.clips(list(steps), given, start)


def _given_in_clips(
    generator: Generator, scheme: str, step: int | None, observed: int
) -> tuple[int, ...]:
    """How many latent frames may be given, of those that training gave."""
    task = generator.task
    window = task.model.grid[0]
    if scheme not in ("frame_prediction", "autoregressive"):
        raise UserError(
            f"The scheme {scheme} needs a model that is told where frames lie, and this one was "
            "built with frame_times=False: take frame_prediction, or train with "
            "config.task.model.frame_times=True."
        )
    trained = [n for n in task.given.first_frames if n < window] if task.given.first > 0 else []
    if not trained:
        raise UserError(
            "This model was not trained to go on from given frames: train it with "
            "config.task.given.first above 0."
        )
    gave = " or ".join(map(str, sorted(trained)))
    given = max(trained) if step is None else window - step
    if given not in trained:
        raise UserError(
            f"{step} new latent frames at a time leave {given} given in clips of {window}, but "
            f"training gave {gave}: take a step of "
            f"{' or '.join(str(window - n) for n in sorted(trained))}."
        )
    if 0 < observed < min(trained):
        raise UserError(
            f"The frames to go on from are {observed} latent frames, but training gave {gave}: "
            "give more of them."
        )
    return tuple(n for n in trained if n <= given)


class _Run:
    """The videos of one call: their latents, and how steps are carried out."""

    def __init__(
        self,
        generator: Generator,
        wanted: Callable[[int], Wanted],
        count: int | None,
        seed: int,
        batch_size: int,
        progress: bool,
        options: dict[str, Any],
    ) -> None:
        if jax.process_count() > 1:
            raise UserError("Long videos are made by one process: start one, on its own devices.")
        leaves = [len(leaf) for leaf in jax.tree.leaves(wanted(0))]
        counts = {*leaves, *([count] if count else [])}
        if len(counts) != 1:
            raise UserError(
                f"Long videos need one number of them, got {sorted(counts) or 'none'}: give what "
                "is wanted of each, or say count."
            )
        self.generator, self.wanted, self.count = generator.placed(), wanted, counts.pop()
        wanted(0).check(generator.task.model, generator.task.model.grid)
        shards = self.generator.mesh.shape["data"] * self.generator.mesh.shape["fsdp"]
        per_device = -(-min(batch_size, self.count) // shards)
        self.options, self.rows = options | {"per_device": per_device}, per_device * shards
        self.seed, self.progress = seed, progress
        self.window = generator.task.model.grid[0]
        self.factors = generator.tokenizer.config.factors

    def latent_frames(self, num_frames: int) -> int:
        """Of so many frames."""
        factor = self.factors[0]
        if num_frames < 1 or (num_frames - 1) % factor:
            below = 1 + (max(num_frames, 1) - 1) // factor * factor
            raise UserError(
                f"A long video has 1 + {factor}n frames, not {num_frames}: take {below} or "
                f"{below + factor}."
            )
        return 1 + (num_frames - 1) // factor

    def check_start(self, start: np.ndarray, num_frames: int) -> int:
        """Latent frames of the frames to go on from."""
        _, height, width = self.generator.video_shape
        if start.dtype != np.uint8 or start.shape[2:] != (height, width, 3):
            raise UserError(
                f"The frames to go on from are {start.dtype} {start.shape}: this model takes uint8 "
                f"({self.count}, T, {height}, {width}, 3)."
            )
        if len(start) != self.count or start.shape[1] >= num_frames:
            raise UserError(
                f"{len(start)} starts of {start.shape[1]} frames for {self.count} videos of "
                f"{num_frames}: give each video one, shorter than the video."
            )
        return self.latent_frames(start.shape[1])

    def keep(self, total: int, latents: np.ndarray | None) -> None:
        """Where latents are kept."""
        model = self.generator.task.model
        shape = (self.count, total, *model.grid[1:], model.latent_channels)
        if latents is not None and (latents.shape != shape or latents.dtype != np.float32):
            raise UserError(
                f"The latents are kept in float32 {shape}, not in {latents.dtype} {latents.shape}."
            )
        self.latents = np.zeros(shape, np.float32) if latents is None else latents

    def between(
        self, video: int, distance: LatentDistance
    ) -> Callable[[Sequence[int], int], np.ndarray]:
        """Distances of frames of a video that are there."""
        return lambda frames, other: distance(
            self.latents[video, list(frames)], self.latents[video, other]
        )

    def bar(self, total: int) -> Any:
        """Counts latent frames."""
        return progress_bar(
            total=total, what="long video", unit="latent", disable=not self.progress
        )

    def sample(
        self, number: int, frame: int, places: np.ndarray | None = None, **given: Any
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Step `number` of all videos: (videos, latents or pixels of their windows)."""
        wanted = dataclasses.replace(self.wanted(frame), **given, times=places)
        # Each step has noise of its own; a video's depends on its number as in every call.
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        yield from self.generator.stream(
            np.arange(self.count),
            lambda rows: jax.tree.map(lambda leaf: np.asarray(leaf)[rows], wanted),
            seed=seed,
            decode=places is None,
            **self.options,
        )

    # One stream of latents

    def stream(
        self, plans: Sequence[Iterator[Step]], total: int, start: np.ndarray | None
    ) -> Iterator[int]:
        """Carries plans out, a step of all videos at a time; yields how many of the first latent
        frames are there."""
        there = np.zeros(total, bool)
        if start is not None:
            known = encode_pixels(self.generator, start)
            self.latents[:, : known.shape[1]] = known
            there[: known.shape[1]] = True
        with self.bar(total) as bar:
            bar.update(int(there.sum()))
            for number, steps in enumerate(zip(*plans)):
                self._step(number, steps)
                there[list(steps[0].generate)] = True
                bar.update(len(steps[0].generate))
                yield total if there.all() else int(there.argmin())

    def _step(self, number: int, steps: Sequence[Step]) -> None:
        """Plans differ between videos in what is given, not in what is generated."""
        windows = [window_of(step, self.window) for step in steps]
        places, known = (np.stack(arrays) for arrays in zip(*windows))
        given = np.zeros((*places.shape, *self.latents.shape[2:]), np.float32)
        rows, slots = np.nonzero(known)
        given[rows, slots] = self.latents[rows, places[rows, slots]]
        mask = np.broadcast_to(known[..., None, None], given.shape[:-1])
        generate = list(steps[0].generate)
        frame = self.factors[0] * generate[len(generate) // 2]
        for videos, found in self.sample(
            number, frame, places, given=given, given_mask=np.array(mask)
        ):
            for video, window in zip(videos, found):
                slots = np.isin(places[video], generate) & ~known[video]
                self.latents[video, generate] = window[slots]

    # Clip after clip

    def clips(
        self, steps: Sequence[Step], given: Sequence[int], start: np.ndarray | None
    ) -> Iterator[np.ndarray]:
        """Frame prediction by a model of clips: each goes on from the end of the one before."""
        model, factor = self.generator.task.model, self.factors[0]
        tail = start
        if start is not None:
            yield start
        with self.bar(sum(len(step.generate) for step in steps)) as bar:
            for number, step in enumerate(steps):
                clean = np.zeros((self.count, *model.grid, model.latent_channels), np.float32)
                mask, old = np.zeros(clean.shape[:-1], bool), 0
                if tail is not None:
                    there = 1 + (tail.shape[1] - 1) // factor
                    known = max(n for n in given if n <= there)
                    old = 1 + (known - 1) * factor
                    clean[:, :known] = self.generator.encode(tail[:, -old:])
                    mask[:, :known] = True
                frame = factor * step.generate[len(step.generate) // 2]
                found = self.sample(number, frame, given=clean, given_mask=mask)
                video = np.concatenate([pixels for _, pixels in found])
                new = factor * len(step.generate) - (0 if old else factor - 1)
                tail = video[:, : old + new]
                yield tail[:, old:]
                bar.update(len(step.generate))


def encode_pixels(generator: Generator, videos: np.ndarray) -> np.ndarray:
    """Latents of uint8 videos (N, 1 + 4n, H, W, 3), chunk by chunk: float32 (N, 1 + n, h, w, C)."""
    tokenizer = generator.tokenizer
    factor = tokenizer.config.factors[0]

    def encode(video: np.ndarray) -> np.ndarray:
        pieces = split_frames(video[None], _CHUNK * factor, 1 + (_CHUNK - 1) * factor)
        found = encode_chunks(tokenizer, map(to_unit, pieces))
        return np.concatenate([np.asarray(latents) for latents in found], axis=1)

    return np.concatenate([encode(video) for video in videos])


def decode_latents(
    generator: Generator,
    latents: np.ndarray,
    there: Iterable[int] | None = None,
    *,
    batch_size: int = 16,
) -> Iterator[np.ndarray]:
    """Pixels of long latents on the host, chunk by chunk.

    Args:
      generator: decodes.
      latents: float32 (N, t, h, w, C).
      there: how many of the first ones are there, rising to t; by default all.
      batch_size: videos at a time.

    Yields:
      uint8 (N, n, H, W, 3), in all 1 + 4 (t - 1) frames.
    """
    count, total = latents.shape[:2]
    tokenizer, layout = generator.tokenizer, Layout(generator.mesh)
    # Every group of videos has a decoder that remembers its frames; the last group is filled up.
    groups = [np.arange(i, i + batch_size) for i in range(0, count, batch_size)]
    queues = [collections.deque() for _ in groups]
    decoders = [decode_chunks(tokenizer, _taken(queue), layout) for queue in queues]
    done, left = 0, 1 + (total - 1) * tokenizer.config.factors[0]
    for number in [total] if there is None else there:
        while done < total and (done + _CHUNK <= number or number == total):
            # So is the last chunk: what follows does not change what was before.
            places = np.minimum(np.arange(done, done + _CHUNK), total - 1)
            pieces = []
            for rows, queue, decoder in zip(groups, queues, decoders):
                queue.append(latents[np.minimum(rows, count - 1)[:, None], places])
                pieces.append(to_uint8(next(decoder)[:, :left]))
            piece = np.concatenate(pieces)[:count]
            done, left = done + _CHUNK, left - piece.shape[1]
            yield piece


def _taken(queue: collections.deque) -> Iterator[np.ndarray]:
    while True:
        yield queue.popleft()
