"""How many tokens of a batch hold no video, and how much of the videos is cut off.

    python -m benchmarks.padding --data out/records [--resolution 256] [--frames 129] [--json FILE]

Five schemes on the sizes of the videos in `--data` (repeated to `--videos` of them: only sizes
matter), and on a published mixture: resolutions and lengths as Open-Sora 1.2's stage 1 gives them
to long videos of high resolution by its table of buckets
(https://github.com/hpcaitech/Open-Sora/issues/464), lengths uniform up to the next one, and aspects
uniform in their logarithm from 9:16 to 16:9. Packing once more where videos may be stretched.

Padding is the share of all tokens that hold nothing, or a clip that the epoch has had. Crop is the
share of the frames' pixels cut off. Scaled is the share of the pixels, of at most the resolution,
that scaling down takes of the rest; it is no loss of tokens. Waiting is the share of the videos'
frames that no clip of one epoch holds: their turn is in another, for clips begin anywhere. No image
is read: all follows from the index, by the very plans of training.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from walt_jax import cli
from walt_jax.data.assignment import longest_clips
from walt_jax.data.buckets import (
    Bucket,
    BucketsConfig,
    assign,
    assign_by_table,
    assign_fixed,
    crop_loss,
)
from walt_jax.data.packing import PackingConfig, PackPlan
from walt_jax.data.plan import BatchPlan
from walt_jax.data.records import open_dataset
from walt_jax.errors import UserError

PATCH = (1, 2, 2)
WINDOW = (5, 8, 8)
TOKENS_STRETCH, WINDOWS_STRETCH = 0.04, 0.07  # 16:9 becomes 5:3, which is whole windows
ASPECTS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)
# Open-Sora 1.2, stage 1: (pixels of a frame, {frames: (keep of resolution, keep of length)}).
_LENGTHS = {51: 1.0, 102: 0.33, 204: 0.1, 408: 0.1}
STAGE_1 = ((360 * 640, 0.15), (240 * 426, 0.4), (256 * 256, 0.5), (144 * 256, 1.0))


class Videos(NamedTuple):
    """Sizes alone: frames at the clips' rate, height, width, int (N,) each."""

    frames: np.ndarray
    heights: np.ndarray
    widths: np.ndarray


class Losses(NamedTuple):
    """Shares: padding of the tokens, pixels cut off and scaled away, frames that wait."""

    padding: float
    crop: float
    scaled: float
    waiting: float
    shapes: int


def main() -> None:
    """Reads the command line and prints a table for each distribution."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="what prepare wrote")
    parser.add_argument("--fps", type=float, default=8.0, help="of the clips (default 8)")
    parser.add_argument("--resolution", type=int, default=256, help="the largest (default 256)")
    parser.add_argument("--frames", type=int, default=129, help="the most (default 129)")
    parser.add_argument("--videos", type=int, default=20_000, help="of an epoch")
    parser.add_argument("--tokens", type=int, default=65_536, help="a step (default 65536)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    if min(args.fps, args.resolution, args.frames, args.videos, args.tokens) <= 0:
        raise UserError("--fps, --resolution, --frames, --videos and --tokens must be positive.")
    clips = of_dataset(args.data, args.fps, args.videos)
    record = {}
    for name, videos in (("real clips", clips), ("Open-Sora's mixture", mixture(args.videos))):
        print(f"\n{name}: {len(videos.frames)} videos, at most {args.resolution}^2 pixels and "
              f"{args.frames} frames")  # fmt: skip
        print(
            f"{'':<24}{'padding':>9}{'crop':>8}{'both':>8}{'scaled':>9}{'waiting':>9}{'shapes':>8}"
        )
        record[name] = {}
        for scheme, of in SCHEMES.items():
            losses = of(videos, args)
            record[name][scheme] = losses._asdict()
            both = losses.padding + losses.crop
            print(
                f"{scheme:<24}{losses.padding:>9.2%}{losses.crop:>8.2%}{both:>8.2%}"
                f"{losses.scaled:>9.1%}{losses.waiting:>9.1%}{losses.shapes:>8}"
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def of_dataset(folder: str, fps: float, count: int) -> Videos:
    """The sizes of a prepared dataset's videos, over and over."""
    dataset = open_dataset(folder)
    if dataset.metadata.get("kind") == "latents":
        raise UserError(f"{folder} holds latents: give prepared videos as --data.")
    rows = np.arange(count) % len(dataset)
    index = dataset.index
    return Videos(longest_clips(index, fps)[rows], index["height"][rows], index["width"][rows])


def mixture(count: int) -> Videos:
    """What Open-Sora 1.2's stage 1 makes of long videos of high resolution."""
    rng = np.random.default_rng(0)
    pixels, frames = np.zeros(count), np.zeros(count)
    for area, keep in STAGE_1:
        stays = (pixels == 0) & (rng.random(count) < keep)
        pixels[stays] = area
    for length, keep in sorted(_LENGTHS.items(), reverse=True):
        stays = (frames == 0) & (rng.random(count) < keep)
        frames[stays] = length * (1 + rng.random(stays.sum()))
    aspect = np.exp(rng.uniform(np.log(9 / 16), np.log(16 / 9), count))
    sides = np.sqrt(pixels / aspect), np.sqrt(pixels * aspect)
    # At 8 frames a second, a third of its 24.
    return Videos(*(np.rint(x).astype(int) for x in (np.maximum(frames / 3, 1), *sides)))


def pad_to_max(videos: Videos, args: argparse.Namespace) -> Losses:
    """Each at its size, of at most the resolution, in a batch as large as the largest."""
    scale = np.minimum(1.0, args.resolution / np.sqrt(videos.heights * videos.widths))
    sides = [np.maximum(16, np.rint(x * scale / 16) * 16) for x in (videos.heights, videos.widths)]
    steps = 1 + (np.minimum(videos.frames, args.frames) - 1) // 4
    losses = lost(videos, np.stack(sides, axis=1), args.resolution)
    grid = [steps, *(x // 16 for x in sides)]
    filled = np.prod(grid, axis=0)
    whole = len(steps) * np.prod([x.max() for x in grid])
    waiting = 1 - (1 + 4 * (steps - 1)).sum() / videos.frames.sum()
    return Losses(1 - filled.sum() / whole, *averages(losses, filled), waiting, 1)


def lost(
    videos: Videos, sizes: np.ndarray, resolution: int, stretch: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Of videos brought to sizes (N, 2) the shares of pixels cut off, and of the rest scaled away.

    Scaling to the resolution is not counted, nor is enlarging.
    """
    crops = crop_loss(videos.heights, videos.widths, sizes.T, stretch)
    pixels = np.minimum(videos.heights * videos.widths, resolution**2)
    return crops, np.maximum(0, 1 - sizes.prod(axis=1) / (pixels * (1 - crops)))


def averages(losses: tuple[np.ndarray, np.ndarray], tokens: np.ndarray) -> tuple[float, float]:
    """Means over the tokens."""
    crops, scaled = (float(np.average(x, weights=tokens)) for x in losses)
    return crops, scaled


def one_bucket(videos: Videos, args: argparse.Namespace) -> Losses:
    """All of them 17 frames, square, of the lowest resolution: covered, then cropped."""
    resolution = min(args.resolution, 128)
    table = BucketsConfig((Bucket(resolution, 17),), (1.0,), 16, patch=PATCH)
    return by_buckets(videos, table, args)


def open_sora(videos: Videos, args: argparse.Namespace) -> Losses:
    """Four lengths at two resolutions, seven aspects, batches of as many tokens."""
    lengths = [n for n in (9, 17, 33, 65, 129) if n <= args.frames]
    resolutions = sorted({min(128, args.resolution), args.resolution})
    cells = tuple(Bucket(r, n) for r in resolutions for n in lengths)
    table = BucketsConfig(cells, ASPECTS, 16, patch=PATCH, token_budget=args.tokens)
    return by_buckets(videos, table, args)


def by_buckets(videos: Videos, table: BucketsConfig, args: argparse.Namespace) -> Losses:
    """A table on the videos that it takes."""
    images = np.zeros(len(videos.frames), bool)
    columns = (videos.frames, images, videos.heights, videos.widths)
    assigned = assign_by_table(table, *columns, batch_size=32, seed=0)
    if not assigned.taken.any():
        raise UserError(
            "No video of --data is as large and long as the smallest bucket of 128 x 128 pixels: "
            "prepare larger ones, or lower --resolution."
        )
    plan = BatchPlan(assigned.buckets, assigned.batch_sizes, 0)
    tokens = np.array([np.prod(table.tokens(s[0], s[1:])) for s in assigned.shapes])
    computed = [plan(k) for k in range(plan.batches_per_epoch)]
    whole = sum(tokens[bucket] * len(records) for bucket, records in computed)
    taken = assigned.taken
    bucket, shapes = assigned.buckets[taken], np.array(assigned.shapes)[assigned.buckets[taken]]
    there = Videos(*(x[taken] for x in videos))
    return Losses(
        1 - tokens[bucket].sum() / whole,
        *averages(lost(there, shapes[:, 1:], args.resolution), tokens[bucket]),
        1 - shapes[:, 0].sum() / videos.frames[taken].sum(),
        len(assigned.used),
    )


def packed_by(
    block: tuple[int, int, int], blocks: int, most: int, stretch: float = 0.0
) -> Callable[..., Losses]:
    """Rows of so many blocks with that many videos at most, sizes of any aspect."""

    def scheme(videos: Videos, args: argparse.Namespace) -> Losses:
        multiple = block[1] * 8
        table = BucketsConfig((Bucket(args.resolution, 1),), (), multiple)
        scales = np.sqrt(videos.heights * videos.widths)
        # Frames that make whole blocks: 1 + 4 n are n + 1 latents.
        latents = 1 + (np.minimum(videos.frames, args.frames) - 1) // 4
        steps = latents // block[0] * block[0]
        sizes = np.zeros((len(steps), 2), int)
        resolutions = (np.minimum(scales, args.resolution) // 16 * 16).astype(int)
        for resolution in np.unique(resolutions[resolutions >= multiple]):
            own = resolutions == resolution
            offered = dataclasses.replace(table, table=(Bucket(resolution, 1),)).sizes(resolution)
            nearest = assign(videos.heights[own], videos.widths[own], offered, stretch)
            sizes[own] = np.array(offered)[nearest]
        taken = (steps > 0) & (sizes[:, 0] > 0)
        shapes = np.stack([steps, *(sizes // 8).T], axis=1)[taken]
        packing = PackingConfig(block, blocks, most)
        counts = packing.count(shapes)
        fits = assign_fixed((counts <= blocks) - 1, [block], [1]).taken
        plan = PackPlan(counts[fits], packing, 1, 0, records=np.flatnonzero(fits))
        there = Videos(*(x[taken][fits] for x in videos))
        losses = lost(there, sizes[taken][fits], args.resolution, stretch)
        frames = 1 + 4 * (shapes[fits, 0] - 1)
        return Losses(
            1 - counts[fits].sum() / (len(plan.epoch(0)) * blocks),
            *averages(losses, counts[fits]),
            1 - frames.sum() / there.frames.sum(),
            1,
        )

    return scheme


SCHEMES = {
    "pad to the largest": pad_to_max,
    "one bucket": one_bucket,
    "Open-Sora's buckets": open_sora,
    "packed tokens": packed_by(PATCH, 16_384, 64),
    f"the same, {TOKENS_STRETCH:.0%} stretch": packed_by(PATCH, 16_384, 64, TOKENS_STRETCH),
    "packed windows": packed_by(WINDOW, 256, 64),
    f"the same, {WINDOWS_STRETCH:.0%} stretch": packed_by(WINDOW, 256, 64, WINDOWS_STRETCH),
}

if __name__ == "__main__":
    cli.run(main)
