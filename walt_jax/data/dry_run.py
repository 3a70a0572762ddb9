"""What buckets make of a dataset, before anything is trained; and a table that would suit it."""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data import buckets
from walt_jax.data.assignment import longest_clips
from walt_jax.data.buckets import Bucket, BucketsConfig
from walt_jax.data.pipeline import Pipeline
from walt_jax.data.records import Dataset, open_dataset
from walt_jax.errors import UserError
from walt_jax.kernels import resolve_window
from walt_jax.models import DenoiserConfig
from walt_jax.tasks import DenoiserTask
from walt_jax.training.experiment import Experiment

_RESOLUTIONS = tuple(2**i for i in range(5, 12))
_FRAMES = (5, 9, 17, 33, 65, 129, 257)
_ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0, 21 / 9)


class Line(NamedTuple):
    """One bucket in an epoch.

    Attributes:
      name: its shape; batch_size: clips a step.
      videos, batches: in the first epoch.
      tokens: of a clip.
      padding: share of the rows that fill up the last batch with clips it has had.
      crop: share of the videos' pixels cut off; None for cached latents.
      cost: of a step, in tokens, attention counted as so many more.
    """

    name: str
    batch_size: int
    videos: int
    batches: int
    tokens: int
    padding: float
    crop: float | None
    cost: float


def clip_cost(tokens: Sequence[int], model: DenoiserConfig | None) -> float:
    """Work of a clip in tokens, where attention counts as the tokens that would cost as much.

    A layer has 12 D^2 products a token in its matrices and 2 L D in attention among L tokens.

    Args:
      tokens: the grid (T, H, W).
      model: windows and width; None counts tokens alone.
    """
    total = math.prod(tokens)
    if model is None:
        return float(total)
    lengths = [math.prod(_covered(tokens, window)) for window in model.windows]
    return total * (1.0 + float(np.mean(lengths)) / (6.0 * model.width))


def _covered(tokens: Sequence[int], window: Sequence[int]) -> Sequence[int]:
    try:
        return resolve_window(tokens, window)
    except UserError:  # an image, say, is less than a window of several frames
        return [n if w == 0 else min(n, w) for n, w in zip(tokens, window)]


def survey(pipeline: Pipeline, token: BucketsConfig, model: DenoiserConfig | None) -> list[Line]:
    """A line for each bucket that some record may go to, in the first epoch.

    Args:
      pipeline: the data.
      token: its strides and patch say what a token is, its stretch what is cut off.
      model: for the cost.
    """
    assignment, index = pipeline.assignment, pipeline.dataset.index
    chosen = assignment.buckets(0) if callable(assignment.buckets) else assignment.buckets
    lines = []
    for i in assignment.used:
        shape, size = assignment.shapes[i], assignment.batch_sizes[i]
        videos = int(np.sum(chosen == i))
        batches = -(-videos // size)
        if pipeline.cached:
            tokens, crop = [n // p for n, p in zip(shape, token.patch)], None
        else:
            tokens = token.tokens(shape[0], shape[1:])
            chances = np.where(assignment.cells == i, assignment.chances, 0.0).sum(axis=1)
            sides = (index[name][pipeline.records] for name in ("height", "width"))
            crops = buckets.crop_loss(*sides, shape[1:], token.stretch)
            crop = float(np.average(crops, weights=chances))
        name = "x".join(map(str, shape[:3]))
        padding = 1.0 - videos / (batches * size) if batches else 0.0
        cost = size * clip_cost(tokens, model)
        lines.append(Line(name, size, videos, batches, math.prod(tokens), padding, crop, cost))
    return lines


def table_of(lines: Sequence[Line]) -> list[str]:
    """The lines as text, with a head and a sum."""
    out = [
        f"{'bucket':>16}{'batch':>7}{'videos':>9}{'batches':>9}{'tokens a clip':>15}"
        f"{'tokens a step':>15}{'padding':>9}{'crop':>7}{'cost a step':>13}"
    ]
    for line in lines:
        crop = "" if line.crop is None else f"{line.crop:.1%}"
        out.append(
            f"{line.name:>16}{line.batch_size:>7}{line.videos:>9}{line.batches:>9}{line.tokens:>15}"
            f"{line.batch_size * line.tokens:>15}{line.padding:>9.1%}{crop:>7}{line.cost:>13.3g}"
        )
    videos, batches = (sum(getattr(line, name) for line in lines) for name in ("videos", "batches"))
    steps = sum(line.batches * line.batch_size * line.tokens for line in lines)
    filled = sum(line.videos * line.tokens for line in lines)
    crops = [(line.crop, line.videos * line.tokens) for line in lines if line.crop is not None]
    weight = sum(tokens for _, tokens in crops)
    crop = f"{sum(c * tokens for c, tokens in crops) / weight:.1%}" if weight else ""
    padding = 1.0 - filled / steps if steps else 0.0
    costs = [line.cost for line in lines if line.batches]
    spread = f"{max(costs) / min(costs):.2f}x" if costs else ""
    out.append(
        f"{'an epoch':>16}{'':>7}{videos:>9}{batches:>9}{'':>15}{steps:>15}{padding:>9.1%}{crop:>7}"
        f"{spread:>13}"
    )
    return out


def suggest(
    dataset: Dataset,
    fps: float,
    budget: int,
    like: BucketsConfig,
    model: DenoiserConfig | None = None,
) -> BucketsConfig:
    """A table for a dataset: doubling resolutions and lengths that a tenth of the videos reach.

    The smallest is reached by 95 %. Keep probabilities give a video that fits several buckets to
    each as often; batch sizes make steps cost the same.

    Args:
      dataset: prepared videos.
      fps: of the clips, 0 for the videos' own.
      budget: tokens a step.
      like: multiple, strides, patch and batch_multiple.
      model: for the cost of attention.

    Raises:
      UserError: cached latents, whose sizes are settled, or videos too small for any bucket.
    """
    if dataset.metadata.get("kind") == "latents":
        raise UserError(
            f"{dataset.directory} holds latents, whose sizes are settled: give prepared videos."
        )
    index, images = dataset.index, dataset.index["num_frames"] == 1
    sides = np.sqrt(index["height"] * index["width"])
    longest = longest_clips(index, fps)
    offered, cells = [r for r in _RESOLUTIONS if r >= like.multiple], []
    for kind, lengths in ((~images, _FRAMES), (images, (1,))):
        if kind.any():
            reached = _reached(sides[kind], offered), _reached(longest[kind], lengths)
            cells += itertools.product(*reached)
    if not cells:
        raise UserError(f"The videos of {dataset.directory} are too small or short for any bucket.")
    nearest = np.bincount(
        np.abs(np.log(index["width"] / index["height"])[:, None] - np.log(_ASPECTS)).argmin(1),
        minlength=len(_ASPECTS),
    )
    aspects = tuple(round(a, 4) for a, n in zip(_ASPECTS, nearest) if n > 0.01 * len(dataset))
    plain = dataclasses.replace(like, table=(Bucket(*cells[0]),), aspects=aspects, token_budget=0)
    of_kind = {True: sum(f == 1 for _, f in cells), False: sum(f > 1 for _, f in cells)}
    table = []
    for resolution, frames in sorted(cells, reverse=True):
        grids = (plain.tokens(frames, size) for size in plain.sizes(resolution))
        clips = int(budget / max(clip_cost(grid, model) for grid in grids))
        size = max(1, clips // like.batch_multiple) * like.batch_multiple
        keep = round(1.0 / of_kind[frames == 1], 2)  # of those left, one in so many
        of_kind[frames == 1] -= 1
        table.append(Bucket(resolution, frames, keep, size))
    return dataclasses.replace(plain, table=tuple(table))


def _reached(values: np.ndarray, steps: Sequence[int]) -> list[int]:
    """Of the steps the largest that 95 % reach, and the next ones that a tenth does."""
    first = max((s for s in steps if np.mean(values >= s) >= 0.95), default=None)
    if first is None:
        first = min(steps)
    return [s for s in steps if s >= first and np.mean(values >= s) >= 0.1][:3]


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m walt_jax.data.buckets`: reads the command line, prints the tables."""
    parser = cli.Parser(
        prog="python -m walt_jax.data.buckets",
        description="What a config's buckets make of a dataset, and a table that would suit it.\n\n"
        "Any key of the config is overridden by --config.key=value.",
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="what prepare or encode wrote")
    parser.add_argument("--config", required=True, metavar="PATH[:ARG]", help="of the training")
    parser.add_argument(
        "--token_budget", type=int, default=0, help="tokens a step: suggest a table for it"
    )
    args, overrides = cli.parse(parser, argv)
    values = config_lib.load(args.config, [*overrides, f"data.path={args.data}"])
    experiment = config_lib.build(Experiment, values)
    task, data, dataset = experiment.task, experiment.data, open_dataset(args.data)
    model = task.model if isinstance(task, DenoiserTask) else None
    like = data.buckets or BucketsConfig(
        (Bucket(256, 17),), patch=model.patch_size if model else (1, 1, 1)
    )
    pipeline = Pipeline(dataset, data, batch_size=experiment.batch_size, seed=experiment.seed)
    print(f"{pipeline.describe()}\n")
    if data.packing is not None:
        return
    lines = survey(pipeline, like, model)
    print("\n".join(table_of(lines)))
    attention = "with attention" if model else "without attention"
    print(
        "\nPadding: clips that fill up a bucket's last batch. Crop: pixels cut off. Cost: in "
        f"tokens, {attention}; in the last line, the dearest step over the cheapest."
    )
    if args.token_budget:
        found = suggest(dataset, data.fps, args.token_budget, like, model)
        print(f"\nFor {args.token_budget} tokens a step, --config.data.buckets:\n")
        print(config_lib.to_dict(found))
        tried = dataclasses.replace(data, buckets=found)
        pipeline = Pipeline(dataset, tried, batch_size=experiment.batch_size, seed=experiment.seed)
        print("\n" + "\n".join(table_of(survey(pipeline, found, model))))
