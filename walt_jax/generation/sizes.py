"""Which sizes, lengths and frame rates a model samples: pure functions of its numbers."""

import dataclasses
import logging
import math
import re
from collections.abc import Sequence

from walt_jax.data.buckets import Bucket, BucketsConfig, Size
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig
from walt_jax.tasks.given import Grid

logger = logging.getLogger(__name__)
_ASPECT = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)@(\d+)")
_PIXELS = re.compile(r"(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model admits.

    Attributes:
      grid: (T, H, W) of its latents.
      factors: frames, rows and columns of pixels of a latent; the first frame is one by itself.
      fps: frames a second of its videos.
      steps: other grids are multiples of these, along each axis; None where there are none.
      bounded: other grids are at most `grid` along each axis.
    """

    grid: Grid
    factors: tuple[int, int, int]
    fps: float
    steps: tuple[int, int, int] | None = None
    bounded: bool = False

    @classmethod
    def of(cls, model: DenoiserConfig, factors: tuple[int, int, int], fps: float) -> "Sizes":
        """Of a model: windows must tile other grids, and patches and upsampling divide them."""
        if not model.any_size:
            return cls(model.grid, factors, fps)
        windows = [*model.windows, model.cross_attention.window or (0, 0, 0)]
        tiles = (math.lcm(*(w[axis] or 1 for w in windows)) for axis in range(3))
        steps = (patch * tile for patch, tile in zip(model.patch_size, tiles))
        steps = tuple(math.lcm(a, b) for a, b in zip(steps, model.upsampling or (1, 1, 1)))
        return cls(model.grid, factors, fps, steps, model.positions == "factorised")

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the model's own videos."""
        return self.pixels(self.grid)

    def pixels(self, grid: Grid) -> tuple[int, int, int]:
        """Frames, height and width of latents (T, H, W)."""
        ft, fh, fw = self.factors
        return 1 + (grid[0] - 1) * ft, grid[1] * fh, grid[2] * fw

    def latents(self, frames: int, size: Size) -> Grid:
        """(T, H, W) of the latents of frames that fit."""
        ft, fh, fw = self.factors
        return 1 + (frames - 1) // ft, size[0] // fh, size[1] // fw

    def size(
        self, asked: str | Sequence[int] | int | None = None, like: Size | None = None
    ) -> Size:
        """Height and width to sample.

        Args:
          asked: `9:16@256`, width : height and the side of a square of at least as many pixels, as
            training's buckets count; `HEIGHTxWIDTH`, or a pair of these; a side, for a square.
            None is the model's own.
          like: with None, the size whose aspect to take, where the model admits others than its
            own.

        Raises:
          UserError: no size, or one that the model does not admit; the sentence says what fits.
        """
        own = self.video_shape[1:]
        if asked is None:
            if like is None or self.steps is None:
                return own
            size = self._nearest(like[1] / like[0], math.isqrt(own[0] * own[1]))
            return size if self._admits(size) else own
        if isinstance(asked, int):
            asked = asked, asked
        size = self._parse(asked) if isinstance(asked, str) else tuple(map(int, asked))
        if not self._admits(size):
            raise UserError(f"Frames of {_shown(size)} do not fit this model: {self._fitting()}.")
        if isinstance(asked, str) and ":" in asked:
            logger.info("The size %s is %s here.", asked, _shown(size))
        return size

    def frames(self, seconds: float | None = None) -> int:
        """Frames of a clip that lasts about so long, the model's own by default.

        Raises:
          UserError: the model does not admit the number of frames that is nearest.
        """
        own, ft = self.video_shape[0], self.factors[0]
        if seconds is None:
            return own
        if not seconds > 0:
            raise UserError(f"A video lasts longer than 0 seconds, got {seconds:g}: give more.")
        step = ft * (self.steps[0] if self.steps else 1)
        first = 1 + (step - ft)  # of as many latents as a step has
        frames = first + step * max(0, round((seconds * self.fps - first) / step))
        if frames == own or (self.steps and (not self.bounded or frames < own)):
            return frames
        most = "or less " if self.steps else ""
        raise UserError(
            f"{seconds:g} seconds are {frames} frames at {self.fps:g} fps, and a clip of this "
            f"model has {own} {most}({own / self.fps:.3g} s): leave seconds out, or take the task "
            "extend or long for more."
        )

    def fitting(self, frames: int) -> int:
        """The most frames, of so many, that the tokenizer takes."""
        return 1 + (frames - 1) // self.factors[0] * self.factors[0]

    def every(self, fps: float | None) -> int:
        """Of how many frames one is kept to get so many a second.

        Raises:
          UserError: the rate is no part of the model's.
        """
        keep = round(self.fps / fps) if fps and fps > 0 else 1
        if fps is not None and (not fps > 0 or keep < 1 or abs(self.fps / keep - fps) > 0.01 * fps):
            rates = ", ".join(f"{self.fps / k:.3g}" for k in (1, 2, 3, 4))
            raise UserError(
                f"{fps:g} fps do not fit this model, which makes {self.fps:g} and can leave frames "
                f"out: choose {rates} or another such part."
            )
        return keep

    def _admits(self, size: Size) -> bool:
        own = self.video_shape[1:]
        if self.steps is None:
            return tuple(size) == own
        multiples = self._multiples
        fits = all(n > 0 and n % m == 0 for n, m in zip(size, multiples))
        return fits and not (self.bounded and any(n > most for n, most in zip(size, own)))

    @property
    def _multiples(self) -> Size:
        return self.steps[1] * self.factors[1], self.steps[2] * self.factors[2]

    def _fitting(self) -> str:
        own = _shown(self.video_shape[1:])
        if self.steps is None:
            return f"it samples {own} alone, so leave size out"
        h, w = self._multiples
        most = f", at most {own}" if self.bounded else ""
        return f"heights are multiples of {h} pixels and widths of {w}{most}, such as {own}"

    def _parse(self, text: str) -> Size:
        if match := _ASPECT.fullmatch(text):
            width, height, resolution = float(match[1]), float(match[2]), int(match[3])
            if width > 0 and height > 0:
                return self._nearest(width / height, resolution)
        if match := _PIXELS.fullmatch(text):
            return int(match[1]), int(match[2])
        if text.isdecimal():
            return int(text), int(text)
        raise UserError(
            f"{text!r} is no size: write width:height@resolution such as 9:16@256, HEIGHTxWIDTH "
            "such as 128x224, or the side of a square."
        )

    def _nearest(self, aspect: float, resolution: int) -> Size:
        """The size of this aspect, width / height, with at most resolution^2 pixels."""
        if self.steps is None:
            own, root = self.video_shape[1:], math.sqrt(aspect)
            near = abs(resolution - math.sqrt(own[0] * own[1])) <= 1 or resolution == min(own)
            near = near and abs(own[1] / own[0] / aspect - 1) < 0.02
            return own if near else (round(resolution / root), round(resolution * root))
        multiple = math.lcm(*self._multiples)
        if multiple > resolution:
            raise UserError(
                f"A resolution of {resolution} is too small for this model: {self._fitting()}."
            )
        table = (Bucket(resolution=resolution, num_frames=1),)
        return BucketsConfig(table, aspects=(aspect,), multiple=multiple).sizes(resolution)[0]


def _shown(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
