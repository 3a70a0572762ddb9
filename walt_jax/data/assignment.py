"""Which bucket each record of a dataset goes to, by what a config says of the clips."""

from typing import TYPE_CHECKING

import numpy as np

from walt_jax.data import buckets
from walt_jax.data.buckets import Assignment
from walt_jax.data.records import Dataset
from walt_jax.errors import UserError

if TYPE_CHECKING:
    from walt_jax.data.pipeline import DataConfig


def assign_records(
    dataset: Dataset,
    config: "DataConfig",
    records: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
) -> Assignment:
    """Where records go: to the nearest aspect, by a table, by the latents' shape, or into rows.

    Args:
      dataset: videos or cached latents.
      config: how clips are cut from it.
      records: (N,), their numbers.
      batch_size: of buckets that say none.
      seed: of the keep probabilities, drawn in each epoch where `shuffle` says so.

    Raises:
      UserError: packing of videos, or latents that no bucket of the table makes.
    """
    sides = sides_of(dataset, records)
    cached = dataset.metadata.get("kind") == "latents"
    if config.packing is not None:
        if not cached:
            raise UserError(
                f"{dataset.directory} holds videos, but config.data.packing packs latents: encode "
                "them by `python -m walt_jax.encode`, or set config.data.packing to None."
            )
        blocks = config.packing.count(sides)
        fits = (blocks > 0) & (blocks <= config.packing.blocks)
        return buckets.assign_fixed(fits - 1, [config.packing.block], [batch_size])
    if cached:
        return _by_latents(dataset, config, sides, batch_size)
    frames, heights, widths = sides.T
    longest = longest_clips(dataset.index, config.fps)[records]
    if config.buckets is not None:
        return buckets.assign_by_table(
            config.buckets,
            longest,
            frames == 1,
            heights,
            widths,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
        )
    nearest = buckets.assign(heights, widths, config.sizes)
    shapes = [(config.num_frames, *size) for size in config.sizes]
    chosen = np.where(longest >= config.num_frames, nearest, -1)
    return buckets.assign_fixed(chosen, shapes, [batch_size] * len(shapes))


def why_none_fits(config: "DataConfig", left_out: int, total: int) -> str:
    """The end of a sentence: why no record of so many fits, and what to do."""
    if config.packing is not None:
        return (
            f" ({left_out} of {total} are smaller than a block or larger than a row): change "
            "config.data.packing.block or blocks."
        )
    if config.buckets is not None:
        return (
            f" ({left_out} of {total} are smaller or shorter than every bucket): add a smaller one "
            "to config.data.buckets.table, or add videos."
        )
    return (
        f" ({left_out} of {total} are shorter than {config.num_frames} frames at "
        f"{config.fps or 'their own'} fps): lower config.data.num_frames, raise config.data.fps, "
        "or add videos."
    )


def refuse_empty(dataset: Dataset, config: "DataConfig", assignment: Assignment) -> None:
    """Refuses a bucket of the table where no record can go.

    Raises:
      UserError: there is one.
    """
    for bucket in config.buckets.table:
        sizes = {(bucket.num_frames, *size) for size in config.buckets.sizes(bucket.resolution)}
        cells = [i for i, shape in enumerate(assignment.shapes) if shape in sizes]
        if not assignment.expected[cells].any():
            raise UserError(
                f"The bucket of {bucket} is empty: no video of {dataset.directory} goes there "
                "(`python -m walt_jax.data.buckets` shows where they go); take it out of "
                "config.data.buckets.table."
            )


def sides_of(dataset: Dataset, records: np.ndarray) -> np.ndarray:
    """(T, H, W) of records, int (N, 3)."""
    names = ("num_frames", "height", "width")
    return np.stack([dataset.index[name][records] for name in names], axis=1)


def longest_clips(index: dict[str, np.ndarray], fps: float) -> np.ndarray:
    """Frames of the longest clip of each record at so many a second, 0 for its own."""
    if not fps:
        return index["num_frames"]
    # Half a frame short still has a nearest frame for every time.
    return np.floor((index["num_frames"] - 1) / index["fps"] * fps + 0.5).astype(int) + 1


def _by_latents(
    dataset: Dataset, config: "DataConfig", sides: np.ndarray, batch_size: int
) -> Assignment:
    shapes, assigned = np.unique(sides, axis=0, return_inverse=True)
    shapes = [tuple(shape) for shape in shapes.tolist()]
    sizes = [batch_size] * len(shapes)
    if config.buckets is not None:
        known = config.buckets.batches(batch_size, latents=True)
        for shape in shapes:
            if shape not in known:
                raise UserError(
                    f"{dataset.directory} holds latents of {'x'.join(map(str, shape))}, which no "
                    "bucket of config.data.buckets.table makes: encode with the same table, or "
                    "leave it out."
                )
        sizes = [known[shape] for shape in shapes]
    channels = dataset.metadata["latent_channels"]
    shapes = [(*shape, channels) for shape in shapes]
    return buckets.assign_fixed(assigned.reshape(-1), shapes, sizes)
