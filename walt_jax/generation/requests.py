"""What videos are asked for, and what of them is given, as masks over pixels and latents.

A task (see `tasks.py`) lays the pixels that it has into a clip and says which they are. The latents
of a causal tokenizer stand for one frame, the first, and for groups of frames after it; those are
given to the network whose whole group is given, in every pixel of their block. What is not given is
filled before encoding, so that what the encoder sees beside and before the given pixels is sane: a
frame of which nothing is given repeats the nearest of which something is, and other pixels take the
nearest given one's colour.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np

from walt_jax.data.buckets import Size
from walt_jax.errors import UserError
from walt_jax.generation.generator import Generator
from walt_jax.generation.sizes import Sizes
from walt_jax.generation.sources import Source, read_source
from walt_jax.tasks import GivenConfig

Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Request:
    """N videos of one task.

    Attributes:
      generator: what samples.
      task: its name, for messages.
      count: N.
      frames: of a clip, pixels; size: height and width.
      labels: int32 (N,), prompts: N texts, negative_prompts: likewise; None where the model takes
        none.
      sources: pictures and videos.
      mask: where to paint, as `read_mask` takes it.
      seconds: how long, None for a clip.
      direction: in which time goes on.
      strength: share of the process's time at which an edit starts.
      scheme: in which order the frames of a long video come about.
      seed: of the noise.
      options: of `Generator.sample`: sampler, guidance and the like.
    """

    generator: Generator
    task: str
    count: int
    frames: int
    size: Size
    labels: np.ndarray | None = None
    prompts: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    sources: tuple[Source, ...] = ()
    mask: Any = None
    seconds: float | None = None
    direction: Direction = "forward"
    strength: float = 0.6
    scheme: str = "frame_prediction"
    seed: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def factors(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels of a latent."""
        return self.generator.tokenizer.config.factors

    @property
    def sizes(self) -> Sizes:
        """What the model admits."""
        return self.generator.sizes

    def read(self, number: int) -> np.ndarray:
        """A picture or video, uint8 (T, H, W, 3) of the clip's size at the model's rate."""
        return read_source(self.sources[number], self.generator.fps, self.size)

    def draw(
        self,
        frames: np.ndarray | None = None,
        known: np.ndarray | None = None,
        *,
        start: np.ndarray | None = None,
        image: bool = False,
        stage: int = 0,
    ) -> np.ndarray:
        """Samples N clips.

        Args:
          frames: uint8 (N or 1, T, H, W, 3), clips with what is given of them; known: bool (T, H,
            W), where that is.
          start: uint8 (1, T, H, W, 3), a clip to start from.
          image: one frame instead of clips.
          stage: of a task of several: each has noise of its own.

        Returns:
          uint8 (N, T, H, W, 3).

        Raises:
          UserError: the model was not trained to be given this.
        """
        grid = self.sizes.latents(1 if image else self.frames, self.size)
        given = mask = None
        if known is not None:
            mask = latent_mask(known, self.factors)
            self._check(mask)
            given = self._rows(self.generator.encode(filled(frames, known)))
            mask = np.repeat(mask[None], self.count, axis=0)
        if start is not None:
            start = self._rows(self.generator.encode(start))
        seed = self.seed
        if stage:
            seed = int(np.random.SeedSequence((self.seed, stage)).generate_state(1)[0])
        return self.generator.sample(
            self.labels,
            prompts=self.prompts,
            negative_prompts=self.negative_prompts,
            given=given,
            given_mask=mask,
            start=start,
            strength=self.strength,
            count=self.count,
            grid=grid,
            seed=seed,
            **self.options,
        )

    def head(self, available: int) -> int:
        """How many latent frames to give at a clip's start, of so many frames: as many as training
        gives and there are."""
        return max(self._counts(available, lambda n: 1 + (n - 1) * self.factors[0]), default=1)

    def tail(self, available: int) -> int:
        """How many latent frames to give at a clip's end, of so many frames, likewise; if it can
        be, more than the first is left, which is one frame alone."""
        counts = self._counts(available, lambda n: n * self.factors[0])
        more = [n for n in counts if n < self._latents - 1]
        return max(more or counts, default=1)

    def _counts(self, available: int, pixels: Callable[[int], int]) -> list[int]:
        counts = self.generator.task.given.first_frames
        return [n for n in counts if n < self._latents and pixels(n) <= available]

    @property
    def _latents(self) -> int:
        return 1 + (self.frames - 1) // self.factors[0]

    def _rows(self, encoded: np.ndarray) -> np.ndarray:
        return np.repeat(encoded, self.count, axis=0) if len(encoded) == 1 else encoded

    def _check(self, mask: np.ndarray) -> None:
        """Refuses what training did not give."""
        task, whole = self.generator.task, (mask == mask[:, :1, :1]).all()
        config = GivenConfig(random=1.0) if task.model.frame_times else task.given
        if config.share and config.admits(mask):
            return
        places = ", ".join(map(str, np.flatnonzero(mask.any((1, 2)))))
        what = f"latent frames {places} of 0 to {len(mask) - 1}" if whole else "all but a region"
        raise UserError(
            f"The task {self.task} gives {what}, and this checkpoint was trained to be given "
            f"{config}: choose another task, or train with such shares of config.task.given."
        )


def latent_mask(known: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """The latents whose pixels are all known: bool (1 + ft n, H, W) to (1 + n, h, w)."""
    ft, fh, fw = factors
    t, h, w = known.shape
    blocks = known.reshape(t, h // fh, fh, w // fw, fw).all((2, 4))
    groups = blocks[1:].reshape((t - 1) // ft, ft, *blocks.shape[1:]).all(1)
    return np.concatenate([blocks[:1], groups])


def pixel_mask(mask: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """The pixels of latents: bool (1 + n, h, w) to (1 + ft n, H, W)."""
    ft, fh, fw = factors
    frames = np.concatenate([mask[:1], np.repeat(mask[1:], ft, axis=0)])
    return frames.repeat(fh, axis=1).repeat(fw, axis=2)


def filled(frames: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Clips, uint8 (N, T, H, W, 3), with sane pixels where nothing is known, bool (T, H, W)."""
    some = np.flatnonzero(known.any((1, 2)))
    nearest = some[np.abs(np.arange(len(known))[:, None] - some).argmin(axis=1)]
    out, known = frames[:, nearest].copy(), known[nearest]
    for t, mask in enumerate(known):
        if not mask.all():
            rows, columns = _nearest(mask)
            out[:, t] = out[:, t, rows, columns]
    return out


def _nearest(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the known pixel nearest to each, int (H, W)."""
    _, labels = cv2.distanceTransformWithLabels(
        np.uint8(~known), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    rows, columns = np.nonzero(known)
    table = np.zeros((2, labels.max() + 1), int)
    table[:, labels[rows, columns]] = rows, columns
    return table[0][labels], table[1][labels]
