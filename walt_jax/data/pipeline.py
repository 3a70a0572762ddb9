"""From records to batches on the devices, by grain.

Batch k is a function of (seed, k): each row's record, start time and bucket are computed from those
two, so that the position in the data is one number, and any number of processes reads the same
batches, each its own rows.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import grain.python as grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from walt_jax.data import buckets
from walt_jax.data.buckets import BucketsConfig
from walt_jax.data.feeding import HostBatch, Share, on_devices, stacked
from walt_jax.data.plan import BatchPlan
from walt_jax.data.records import Dataset, decode_frames
from walt_jax.errors import UserError
from walt_jax.models.text import to_bytes
from walt_jax.models.tokenizer.quantizers import Lfq, unpack_codes
from walt_jax.parallel.sharding import local_rows

_CLIP = 2  # tag of the random draws of a clip
_ENDLESS = 2**40  # grain wants a length; training stops long before


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How clips are cut from a prepared dataset.

    Attributes:
      path: folder written by `walt_jax.prepare`, or by `walt_jax.encode` (cached latents, for
        which `num_frames`, `fps` and `sizes` were settled when they were encoded).
      num_frames: frames of a clip.
      fps: frames a second that a clip is sampled at, nearest in time; 0 takes every frame.
      sizes: (height, width) of the buckets; a video goes to the one of nearest aspect.
      buckets: a table of buckets by resolution and length, instead of `num_frames` and `sizes`.
      caption_bytes: a caption's bytes that a batch holds, for what reads text; longer ones are cut.
      eval_fraction: share of the source videos held out, at least one; chosen by their names.
      num_workers: processes that decode; 0 decodes in threads of this one.
      num_threads: threads that decode in each process.
    """

    path: str
    num_frames: int = 17
    fps: float = 8.0
    sizes: tuple[tuple[int, int], ...] = ((128, 128),)
    buckets: BucketsConfig | None = None
    caption_bytes: int = 0
    eval_fraction: float = 0.05
    num_workers: int = 0
    num_threads: int = 8

    def __post_init__(self) -> None:
        least = {"num_frames": 1, "fps": 0, "caption_bytes": 0, "num_workers": 0, "num_threads": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(
                    f"config.data.{name} must be at least {value}, got {getattr(self, name)}."
                )
        if not 0 <= self.eval_fraction < 1:
            raise UserError(
                f"config.data.eval_fraction must lie in [0, 1), got {self.eval_fraction}."
            )
        if not self.sizes or any(side < 1 for size in self.sizes for side in size):
            raise UserError(f"config.data.sizes must name (height, width) pairs, got {self.sizes}.")


@dataclasses.dataclass(frozen=True)
class _Row:
    record: Any  # its number
    bucket: int
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Random access to this process's rows of all batches: a source for grain."""

    plan: BatchPlan
    share: Share
    seed: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> _Row:
        share = self.share
        k = self.plan.batch_of(i * share.total // (share.stop - share.first))
        bucket, records = self.plan(k)
        within = i - share.rows(self.plan.first_row(k))
        row = len(records) * share.first // share.total + within
        return _Row(records[row], bucket, (self.seed, _CLIP, k, row))


class _CutClip:
    """Decodes one clip of a video record: random start, target fps, bucket's size."""

    def __init__(
        self, dataset: Dataset, config: DataConfig, shapes: Sequence[tuple[int, int, int]]
    ) -> None:
        self._dataset, self._config, self._shapes = dataset, config, shapes

    def __call__(self, row: _Row) -> dict[str, Any]:
        record = self._dataset.read(row.record)
        config, times = self._config, record["timestamps"]
        rng, (num_frames, *size) = np.random.default_rng(row.seed), self._shapes[row.bucket]
        frames = clip_frames(times, num_frames, config.fps, rng.random())
        video = buckets.fit_frames(decode_frames(record, frames), size)
        return {
            "video": video,
            "label": np.int32(record["label"]),
            "fps": np.float32(config.fps or record["fps"]),
            **_caption(record, config),
        }


class _ReadLatents:
    """Reads one record of cached latents; where they are discrete, their codes too."""

    def __init__(self, dataset: Dataset, config: DataConfig) -> None:
        self._dataset, self._config = dataset, config

    def __call__(self, row: _Row) -> dict[str, Any]:
        record, metadata = self._dataset.read(row.record), self._dataset.metadata
        made_by = record["tokenizer_hash"]
        if metadata.get("tokenizer_hash", made_by) != made_by:
            raise UserError(
                f"Record {row.record} of {self._dataset.directory} was made by tokenizer "
                f"{made_by}, not by {metadata['tokenizer_hash']}: encode the videos again."
            )
        return {
            **_latents(record, metadata),
            "label": np.int32(record["label"]),
            "fps": np.float32(record["fps"]),
            **_caption(record, self._config),
        }


def _caption(record: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    caption, length = record["caption"], config.caption_bytes
    return {"caption": caption} | ({"text": to_bytes(caption, length)} if length else {})


def _latents(record: dict[str, Any], metadata: dict[str, Any]) -> HostBatch:
    """`latents` (t, h, w, c), normalised; of a record of codes also `codes` int32 (t, h, w)."""
    if "latents" in record:
        return {"latents": np.asarray(record["latents"])}
    bits, moments = metadata["latent_channels"], metadata["codes"]
    shape = [record[name] for name in ("num_frames", "height", "width")]
    codes = unpack_codes(record["codes"], bits, shape)
    mean, std = (np.asarray(moments[name], np.float32) for name in ("mean", "std"))
    latents = (Lfq().from_codes(codes, bits) - mean) / std
    return {"latents": latents.astype(metadata["dtype"]), "codes": codes}


def clip_frames(times: np.ndarray, num_frames: int, fps: float, position: float) -> np.ndarray:
    """Indices of the frames nearest to a clip's times.

    Args:
      times: float64 (N,), seconds of each frame from 0, rising.
      num_frames: frames of the clip.
      fps: frames a second of the clip; 0 takes consecutive frames.
      position: where the clip starts, 0 (the earliest) to 1 (the latest that fits).
    """
    if not fps:
        start = round(position * (len(times) - num_frames))
        return np.arange(start, start + num_frames)
    offsets = np.arange(num_frames) / fps
    wanted = position * max(0.0, times[-1] - offsets[-1]) + offsets
    after = np.minimum(np.searchsorted(times, wanted), len(times) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - times[before] <= times[after] - wanted, before, after)


class Pipeline:
    """Batches of one split of a dataset.

    Attributes:
      dataset: the records read; cached: whether they are latents.
      records: the numbers of those in the split.
      assignment: the bucket of each of them.
      plan: which of them make batch k.
      left_out: videos too short for a clip, or too small for every bucket.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        split: Literal["train", "eval", "all"] = "train",
        shuffle: bool = True,
    ) -> None:
        self.dataset, self.config, self._batch_size, self._seed = dataset, config, batch_size, seed
        self.cached = dataset.metadata.get("kind") == "latents"
        everything = np.arange(len(dataset))
        fits = self._assign(everything, shuffle).taken
        # Of those that fit alone, as the latents made of them are.
        chosen = everything[fits]
        chosen = chosen[_split(dataset.index["source"][chosen], config.eval_fraction, split)]
        self.left_out = int(np.sum(~fits))
        if not chosen.size and fits.any():
            raise UserError(
                f"{dataset.directory} has no video for the {split} split ({fits.sum()} clips are "
                f"long enough): change config.data.eval_fraction ({config.eval_fraction:g}), or "
                "add videos."
            )
        if not chosen.size:
            raise UserError(f"{dataset.directory} has no video for the {split} split{self._why()}")
        self.records, self.assignment = chosen, self._assign(chosen, shuffle)
        if config.buckets is not None and split != "eval":
            self._refuse_empty()
        self.plan = BatchPlan(
            self.assignment.buckets,
            self.assignment.batch_sizes,
            seed,
            shuffle=shuffle,
            records=chosen,
        )

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every video of the split appears, but those that an epoch leaves out."""
        return self.plan.batches_per_epoch

    def num_clips(self, k: int) -> int:
        """Videos in batch k."""
        return len(self.plan(k)[1])

    def describe(self) -> str:
        """One line: clips, buckets, what was left out."""
        shapes, expected = self.assignment.shapes, self.assignment.expected
        plain = not self.cached and self.config.buckets is None
        names = ["x".join(map(str, shape[1:] if plain else shape)) for shape in shapes]
        counts = ", ".join(f"{expected[i]:g} in {names[i]}" for i in self.assignment.used)
        short = f"; {self.left_out} too short for a clip" if self.left_out else ""
        return f"{self.dataset.directory}: {counts}{short}"

    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The whole batch's arrays, for every bucket that a record may go to."""
        return [self._arrays(i) for i in self.assignment.used]

    def _arrays(self, bucket: int) -> dict[str, jax.ShapeDtypeStruct]:
        b, shape = self.assignment.batch_sizes[bucket], self.assignment.shapes[bucket]
        metadata = self.dataset.metadata
        arrays = {"label": ((), np.int32), "fps": ((), np.float32)}
        if length := self.config.caption_bytes:
            arrays["text"] = ((length,), np.uint8)
        if not self.cached:
            arrays["video"] = ((*shape, 3), np.uint8)
        else:
            arrays["latents"] = (shape, np.dtype(metadata["dtype"]))
            if "codes" in metadata:
                arrays["codes"] = (shape[:-1], np.int32)
        return {n: jax.ShapeDtypeStruct((b, *s), dtype) for n, (s, dtype) in arrays.items()}

    def batches(self, start: int = 0, rows: tuple[int, int] | None = None) -> Iterator[HostBatch]:
        """Batches `start`, `start` + 1, ... for ever; of each the given rows (default: all).

        The rows are those of a batch of `batch_size`; of others as large a part.
        """
        share = Share(*(rows or (0, self._batch_size)), self._batch_size)
        return self._read(start, share)

    def _read(self, start: int, share: Share) -> Iterator[HostBatch]:
        if self.cached:
            cut = _ReadLatents(self.dataset, self.config)
        else:
            cut = _CutClip(self.dataset, self.config, self.assignment.shapes)
        source = grain.MapDataset.source(_Rows(self.plan, share, self._seed))
        clips = source.slice(slice(share.rows(self.plan.first_row(start)), None)).map(cut)
        most = share.rows(max(self.assignment.batch_sizes))
        options = grain.ReadOptions(
            num_threads=self.config.num_threads, prefetch_buffer_size=max(most, 16)
        )
        clips = clips.to_iter_dataset(options)
        if self.config.num_workers:
            flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, which argparse left alone
            # Before batching: worker i decodes clips i, i + num_workers, ...
            clips = clips.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.config.num_workers)
            )
        return stacked(
            iter(clips), (share.rows(len(self.plan(k)[1])) for k in itertools.count(start))
        )

    def on_devices(
        self, sharding: NamedSharding, start: int = 0, ahead: int = 2
    ) -> Iterator[dict[str, jax.Array]]:
        """Batches as global arrays, `ahead` of them on the way to the devices; without strings."""
        # The devices divide every batch, so that they divide this one.
        total = math.gcd(*(self.assignment.batch_sizes[i] for i in self.assignment.used))
        share = Share(*local_rows(sharding, total), total)
        return on_devices(self._read(start, share), sharding, share, ahead)

    def _assign(self, records: np.ndarray, shuffle: bool) -> buckets.Assignment:
        names = ("num_frames", "height", "width")
        frames, heights, widths = (self.dataset.index[name][records] for name in names)
        config, size = self.config, self._batch_size
        if self.cached:
            shapes = np.stack([frames, heights, widths], 1)
            return self._assign_latents(shapes)
        longest = longest_clips(self.dataset.index, config.fps)[records]
        if config.buckets is not None:
            sizes, options = (heights, widths), {"batch_size": size, "seed": self._seed}
            return buckets.assign_by_table(
                config.buckets, longest, frames == 1, *sizes, **options, shuffle=shuffle
            )
        nearest = buckets.assign(heights, widths, config.sizes)
        shapes = [(config.num_frames, *s) for s in config.sizes]
        chosen = np.where(longest >= config.num_frames, nearest, -1)
        return buckets.assign_fixed(chosen, shapes, [size] * len(shapes))

    def _assign_latents(self, shapes: np.ndarray) -> buckets.Assignment:
        shapes, assigned = np.unique(shapes, axis=0, return_inverse=True)
        shapes = [tuple(shape) for shape in shapes.tolist()]
        sizes = [self._batch_size] * len(shapes)
        if (table := self.config.buckets) is not None:
            known = table.latent_batches(self._batch_size)
            for shape in shapes:
                if shape not in known:
                    raise UserError(
                        f"{self.dataset.directory} holds latents of {'x'.join(map(str, shape))}, "
                        "which no bucket of config.data.buckets.table makes: encode with the same "
                        "table, or leave it out."
                    )
            sizes = [known[shape] for shape in shapes]
        channels = self.dataset.metadata["latent_channels"]
        shapes = [(*shape, channels) for shape in shapes]
        return buckets.assign_fixed(assigned.reshape(-1), shapes, sizes)

    def _why(self) -> str:
        """Why no record fits."""
        config, total = self.config, len(self.dataset)
        if config.buckets is not None:
            return (
                f" ({self.left_out} of {total} are smaller or shorter than every bucket): add a "
                "smaller one to config.data.buckets.table, or add videos."
            )
        return (
            f" ({self.left_out} of {total} are shorter than {config.num_frames} frames at "
            f"{config.fps or 'their own'} fps): lower config.data.num_frames, raise "
            "config.data.fps, or add videos."
        )

    def _refuse_empty(self) -> None:
        expected = self.assignment.expected
        for bucket in self.config.buckets.table if not self.cached else ():
            sizes = {(bucket.num_frames, *s) for s in self.config.buckets.sizes(bucket.resolution)}
            cells = [i for i, shape in enumerate(self.assignment.shapes) if shape in sizes]
            if not expected[cells].any():
                raise UserError(
                    f"The bucket of {bucket} is empty: no video of {self.dataset.directory} goes "
                    "there (`python -m walt_jax.data.buckets` shows where they go); take it out of "
                    "config.data.buckets.table."
                )


def longest_clips(index: dict[str, np.ndarray], fps: float) -> np.ndarray:
    """Frames of the longest clip of each record."""
    if not fps:
        return index["num_frames"]
    # Half a frame short still has a nearest frame for every time.
    return np.floor((index["num_frames"] - 1) / index["fps"] * fps + 0.5).astype(int) + 1


def _split(sources: np.ndarray, fraction: float, split: str) -> np.ndarray:
    """Which records belong to the split: whole source videos, in the order of their names' hashes.

    So videos and the latents made of them are split alike.
    """
    if split == "all" or not fraction:
        return np.full(len(sources), split != "eval")
    names = sorted(set(sources.tolist()), key=lambda s: hashlib.sha256(s.encode()).digest())
    held_out = names[: max(1, round(fraction * len(names)))]
    return np.isin(sources, held_out) == (split == "eval")
