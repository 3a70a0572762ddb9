"""From records to batches on the devices, by grain.

Batch k is a function of (seed, k): each row's record, start time and bucket are computed from those
two, so that the position in the data is one number, and any number of processes reads the same
batches, each its own rows.
"""

import dataclasses
import functools
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
from walt_jax.data.assignment import assign_records, refuse_empty, sides_of, why_none_fits
from walt_jax.data.buckets import BucketsConfig
from walt_jax.data.captions import Captions
from walt_jax.data.feeding import HostBatch, Share, on_devices, stacked
from walt_jax.data.packing import PackingConfig, PackPlan, fill_row
from walt_jax.data.plan import BatchPlan
from walt_jax.data.records import Dataset, decode_frames
from walt_jax.data.replacement import BrokenRecords, Replacing
from walt_jax.errors import UserError
from walt_jax.models.text import FrozenTextConfig
from walt_jax.models.tokenizer.quantizers import Lfq, unpack_codes
from walt_jax.parallel.sharding import local_rows

_CLIP = 2  # tag of the random draws of a clip
_ENDLESS = 2**40  # grain wants a length; training stops long before


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How clips are cut from a prepared dataset.

    Attributes:
      path: folder written by `walt_jax.prepare`, or by `walt_jax.encode` (cached latents, for
        which `num_frames`, `fps` and `sizes` were settled when they were encoded); the URL of a
        copy of one in a store; or a mixture's JSON file (see `mixture.py`).
      num_frames: frames of a clip.
      fps: frames a second that a clip is sampled at, nearest in time; 0 takes every frame.
      sizes: (height, width) of the buckets; a video goes to the one of nearest aspect.
      buckets: a table of buckets by resolution and length, instead of `num_frames` and `sizes`.
      packing: cached latents of any size share the rows of a batch, instead of buckets.
      caption_bytes: bytes of a caption in a batch, for what reads bytes; longer ones are cut.
      eval_fraction: share of the source videos held out, at least one; chosen by their names.
      max_broken: share of the split's records that may turn out to be broken; each is replaced by
        another one, and with more of them the run stops.
      num_workers: processes that decode; 0 decodes in threads of this one.
      num_threads: threads that decode in each process.
    """

    path: str
    num_frames: int = 17
    fps: float = 8.0
    sizes: tuple[tuple[int, int], ...] = ((128, 128),)
    buckets: BucketsConfig | None = None
    packing: PackingConfig | None = None
    caption_bytes: int = 0
    eval_fraction: float = 0.05
    max_broken: float = 0.01
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
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"config.data.max_broken must lie in [0, 1], got {self.max_broken}.")
        if not self.sizes or any(side < 1 for size in self.sizes for side in size):
            raise UserError(f"config.data.sizes must name (height, width) pairs, got {self.sizes}.")
        if self.buckets is not None and self.packing is not None:
            raise UserError("config.data has buckets and packing: set one of them to None.")


@dataclasses.dataclass(frozen=True)
class _Row:
    record: Any  # its number, or what a packed row holds
    bucket: int
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Random access to this process's rows of all batches: a source for grain."""

    plan: BatchPlan | PackPlan
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
        self,
        dataset: Dataset,
        config: DataConfig,
        shapes: Sequence[tuple[int, int, int]],
        captions: Captions,
    ) -> None:
        self._dataset, self._config, self._shapes = dataset, config, shapes
        self._captions = captions

    def __call__(self, row: _Row) -> dict[str, Any]:
        record = self._dataset.read(row.record)
        config, times = self._config, record["timestamps"]
        rng, (num_frames, *size) = np.random.default_rng(row.seed), self._shapes[row.bucket]
        frames = clip_frames(times, num_frames, config.fps, rng.random())
        stretch = config.buckets.stretch if config.buckets else 0.0
        video = buckets.fit_frames(decode_frames(record, frames), size, stretch=stretch)
        return {
            "video": video,
            "label": np.int32(record["label"]),
            "fps": np.float32(config.fps or record["fps"]),
            **self._captions.read(record),
        }


class _ReadLatents:
    """Reads one record of cached latents; where they are discrete, their codes too."""

    def __init__(self, dataset: Dataset, captions: Captions) -> None:
        self._dataset, self._captions = dataset, captions

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
            **self._captions.read(record),
        }


class _PackRow:
    """Reads the videos of a packed row; captions are left out, their bytes are not."""

    def __init__(self, read: _ReadLatents, config: DataConfig, seed: int) -> None:
        self._read, self._config, self._seed = read, config, seed

    def __call__(self, row: _Row) -> HostBatch:
        def read(record: int) -> dict[str, Any]:
            clip = self._read(dataclasses.replace(row, record=record))
            return {k: v for k, v in clip.items() if k not in ("caption", "codes")}

        return fill_row(row.record, read, self._config.packing, self._seed)


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
        redraw: bool = False,
        text_encoder: FrozenTextConfig | None = None,
    ) -> None:
        """`text_encoder` is the published one that reads captions, where there is one.

        Without `shuffle` epochs are alike, but for the buckets that `redraw` draws anew in each.
        """
        self.dataset, self.config, self._batch_size, self._seed = dataset, config, batch_size, seed
        self.cached = dataset.metadata.get("kind") == "latents"
        self._captions = Captions.of(dataset, config.caption_bytes, text_encoder)
        sizes = {"batch_size": batch_size, "seed": seed, "shuffle": shuffle or redraw}
        assign = functools.partial(assign_records, dataset, config, **sizes)
        fits = assign(np.arange(len(dataset))).taken
        # Of those that fit alone, as the latents made of them are.
        chosen = np.flatnonzero(fits)
        chosen = chosen[in_split(dataset.index["source"][chosen], config.eval_fraction, split)]
        self.left_out = int(np.sum(~fits))
        if not chosen.size and fits.any():
            raise UserError(
                f"{dataset.directory} has no video for the {split} split ({fits.sum()} clips are "
                f"long enough): change config.data.eval_fraction ({config.eval_fraction:g}), or "
                "add videos."
            )
        if not chosen.size:
            why = why_none_fits(config, self.left_out, len(dataset))
            raise UserError(f"{dataset.directory} has no video for the {split} split{why}")
        self.records, self.assignment = chosen, assign(chosen)
        if config.buckets is not None and not self.cached and split != "eval":
            refuse_empty(dataset, config, self.assignment)
        self._broken = BrokenRecords(str(dataset.directory), len(chosen), config.max_broken)
        options = {"shuffle": shuffle, "records": chosen}
        if config.packing is not None:
            blocks = config.packing.count(sides_of(dataset, chosen))
            self.plan = PackPlan(blocks, config.packing, batch_size, seed, **options)
        else:
            sizes = self.assignment.batch_sizes
            self.plan = BatchPlan(self.assignment.buckets, sizes, seed, **options)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every video of the split appears, but those that an epoch leaves out."""
        return self.plan.batches_per_epoch

    @property
    def broken(self) -> dict[str, str]:
        """The records that could not be decoded until now: what names each, and the reason."""
        return self._broken.reasons

    def num_clips(self, k: int) -> int:
        """Videos in batch k."""
        rows = self.plan(k)[1]
        return len(rows) if self.config.packing is None else sum(map(len, rows))

    def keys(self, k: int) -> list[str]:
        """The records of batch k, a row each: `source@start`, of packed videos several."""
        _, rows = self.plan(k)
        index = self.dataset.index
        starts = index["start"] if "start" in index else np.zeros(len(self.dataset))

        def named(i: int) -> str:
            return f"{index['source'][i]}@{starts[i]:g}"

        if self.config.packing is None:
            return [named(i) for i in rows]
        return [" + ".join(map(named, row)) for row in rows]

    def describe(self) -> str:
        """One line: clips, buckets, what was left out."""
        if self.config.packing is not None:
            return self._describe_packing()
        shapes, expected = self.assignment.shapes, self.assignment.expected
        plain = not self.cached and self.config.buckets is None
        names = ["x".join(map(str, shape[1:] if plain else shape)) for shape in shapes]
        counts = ", ".join(f"{round(expected[i])} in {names[i]}" for i in self.assignment.used)
        why = "too short for a clip" if plain else "too small or short for every bucket"
        short = f"; {self.left_out} {why}" if self.left_out else ""
        return f"{self.dataset.directory}: {counts}{short}"

    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The whole batch's arrays, for every bucket that a record may go to."""
        return [self._arrays(i) for i in self.assignment.used]

    def _arrays(self, bucket: int) -> dict[str, jax.ShapeDtypeStruct]:
        b, shape = self.assignment.batch_sizes[bucket], self.assignment.shapes[bucket]
        metadata, packing = self.dataset.metadata, self.config.packing
        arrays = {"label": ((), np.int32), "fps": ((), np.float32)} | self._captions.arrays()
        if packing is not None:
            arrays = {n: ((packing.videos, *s), dtype) for n, (s, dtype) in arrays.items()}
            arrays |= packing.arrays(metadata["latent_channels"], metadata["dtype"])
        elif not self.cached:
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
        if self.config.packing is not None:
            read = _ReadLatents(self.dataset, self._captions)
            cut = _PackRow(read, self.config, self._seed)
        elif self.cached:
            cut = _ReadLatents(self.dataset, self._captions)
        else:
            cut = _CutClip(self.dataset, self.config, self.assignment.shapes, self._captions)
        source = grain.MapDataset.source(_Rows(self.plan, share, self._seed))
        clips = source.slice(slice(share.rows(self.plan.first_row(start)), None)).map(
            Replacing(cut, self.plan)
        )
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
        counts = (share.rows(len(self.plan(k)[1])) for k in itertools.count(start))
        return self._broken.counted(stacked(iter(clips), counts))

    def on_devices(
        self, sharding: NamedSharding, start: int = 0, ahead: int = 2
    ) -> Iterator[dict[str, jax.Array]]:
        """Batches as global arrays, `ahead` of them on the way to the devices; without strings."""
        # The devices divide every batch, so that they divide this one.
        total = math.gcd(*(self.assignment.batch_sizes[i] for i in self.assignment.used))
        share = Share(*local_rows(sharding, total), total)
        return on_devices(self._read(start, share), sharding, share, ahead)

    def _describe_packing(self) -> str:
        packing, rows = self.config.packing, self.plan.epoch(0)
        kept = sum(video.kept for row in rows for video in row)
        sides = sides_of(self.dataset, self.records)
        blocks = packing.count(sides).sum()
        cut_off = 1.0 - blocks * math.prod(packing.block) / np.prod(sides, axis=1).sum()
        out = f"; {self.left_out} smaller than a block or larger than a row" * (self.left_out > 0)
        return (
            f"{self.dataset.directory}: {len(self.records)} videos in {len(rows)} rows of "
            f"{packing.blocks} blocks of {'x'.join(map(str, packing.block))}; padding "
            f"{1.0 - kept / (len(rows) * packing.blocks):.1%}, cut off {cut_off:.1%}, dropped "
            f"{1.0 - kept / blocks:.1%}{out}"
        )


def in_split(sources: np.ndarray, fraction: float, split: str) -> np.ndarray:
    """Which records belong to the split: whole source videos, in the order of their names' hashes.

    So videos and the latents made of them are split alike.
    """
    if split == "all" or not fraction:
        return np.full(len(sources), split != "eval")
    names = sorted(set(sources.tolist()), key=lambda s: hashlib.sha256(s.encode()).digest())
    held_out = names[: max(1, round(fraction * len(names)))]
    return np.isin(sources, held_out) == (split == "eval")
