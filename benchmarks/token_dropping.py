"""How many more videos a second training takes when tokens are dropped.

    python -m benchmarks.token_dropping --data out/records [--rates 0 0.25 0.5] [--json FILE]

One small network with full attention (4 layers of 128) makes training steps, forward and backward,
on a packed row of 2048 tokens of 2 x 2 latents: random latents of the sizes that the videos in
`--data` have at 128 pixels and 8 frames a second. Rows are filled by the plan of training, so that
a step takes as long at any rate and holds more videos: the gain is that of the videos in a row,
less what packing leaves empty. Core seconds are told, too: they hold on a machine that others use.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.timing import alternate
from walt_jax import cli
from walt_jax.data.assignment import longest_clips
from walt_jax.data.buckets import Bucket, BucketsConfig, assign
from walt_jax.data.packing import DropConfig, PackingConfig, PackPlan, fill_row
from walt_jax.data.records import open_dataset
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig
from walt_jax.parallel import Layout
from walt_jax.tasks import DenoiserTask

MODEL = DenoiserConfig(
    grid=(5, 32, 32),
    patch_size=(1, 2, 2),
    width=128,
    num_heads=4,
    num_layers=4,
    windows=((0, 0, 0),),
    positions="fractional",
    relative_bias=False,
    image_identity=False,
    dtype="float32",
)
BLOCKS, VIDEOS, ROWS = 2048, 32, 1
FRAMES = 17  # of a clip at most


def main() -> None:
    """Reads the command line, times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="what prepare wrote")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.25, 0.5], metavar="R")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    shapes = latents_of(args.data)
    runs = [Steps(shapes, rate) for rate in args.rates]
    wall, cores = alternate(runs, args.repeats)
    print(
        f"{'rate':>6}{'padding':>9}{'videos a step':>15}{'videos/s':>10}{'a core second':>15}"
        f"{'gain':>7}"
    )
    record: list[dict[str, Any]] = []
    for run, seconds, spent in zip(runs, wall, cores):
        line = {
            "rate": run.rate,
            "padding": run.padding,
            "videos": run.videos,
            "videos/s": run.videos / float(np.median(seconds)),
            "videos a core second": run.videos / float(np.median(spent)),
        }
        record.append(line)
        gain = line["videos a core second"] / record[0]["videos a core second"]
        print(
            f"{run.rate:>6.2f}{run.padding:>9.1%}{run.videos:>15.1f}{line['videos/s']:>10.2f}"
            f"{line['videos a core second']:>15.2f}{gain:>6.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def latents_of(folder: str) -> np.ndarray:
    """(T, H, W) of the latents of a dataset's videos at 128 pixels, 50 times over."""
    dataset = open_dataset(folder)
    if dataset.metadata.get("kind") == "latents":
        raise UserError(f"{folder} holds latents: give prepared videos as --data.")
    index = dataset.index
    sizes = BucketsConfig((Bucket(128, 1),), (), 16).sizes(128)
    nearest = np.array(sizes)[assign(index["height"], index["width"], sizes)]
    frames = 1 + (np.minimum(longest_clips(index, 8.0), FRAMES) - 1) // 4
    return np.tile(np.stack([frames, *(nearest // 8).T], axis=1), (50, 1))


class Steps:
    """Loss and gradients on one batch after another, at a rate of dropping."""

    def __init__(self, shapes: np.ndarray, rate: float) -> None:
        packing = PackingConfig(MODEL.patch_size, BLOCKS, VIDEOS, DropConfig(rate))
        counts = packing.count(shapes)
        plan = PackPlan(counts, packing, ROWS, 0, records=np.arange(len(shapes)))
        rows = plan.epoch(0)
        kept = sum(video.kept for row in rows for video in row)
        self.rate, self.padding = rate, 1 - kept / (len(rows) * BLOCKS)
        self.videos = ROWS * len(shapes) / len(rows)
        rng, channels = np.random.default_rng(0), MODEL.latent_channels

        def read(record: int) -> dict[str, np.ndarray]:
            latents = rng.standard_normal((*shapes[record], channels)).astype(np.float32)
            return {"latents": latents, "label": np.int32(0)}

        filled = [fill_row(row, read, packing, 0) for row in plan(0)[1]]
        self._batch = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
        task, step = DenoiserTask(tokenizer="", model=MODEL), np.zeros((), np.int32)
        self._params = task.init(jax.random.key(0))

        def loss(params: Any, key: jax.Array) -> jax.Array:
            return task.loss(params, {}, None, self._batch, key, step, Layout())[0]

        self._step, self._keys = jax.jit(jax.grad(loss)), itertools.count()

    def __call__(self) -> None:
        jax.block_until_ready(self._step(self._params, jax.random.key(next(self._keys))))


if __name__ == "__main__":
    cli.run(main)
