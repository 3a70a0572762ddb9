"""From records to batches on the devices, by grain.

Batch k is a function of (seed, k): each row's record, start time and bucket are computed from those
two, so that the position in the data is one number, and any number of processes reads the same
batches, each its own rows.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import grain.python as grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from walt_jax.data import buckets
from walt_jax.data.records import Dataset, decode_frames
from walt_jax.errors import UserError
from walt_jax.models.text import to_bytes
from walt_jax.models.tokenizer.quantizers import Lfq, unpack_codes
from walt_jax.parallel.sharding import local_rows

HostBatch = dict[str, np.ndarray]
_CLIP = 2  # tag of the random draws of a clip
IMAGES = "image/"  # before the names of a joint batch's images
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
      caption_bytes: a caption's bytes that a batch holds, for what reads text; longer ones are cut.
      eval_fraction: share of the source videos held out, at least one; chosen by their names.
      num_workers: processes that decode; 0 decodes in threads of this one.
      num_threads: threads that decode in each process.
    """

    path: str
    num_frames: int = 17
    fps: float = 8.0
    sizes: tuple[tuple[int, int], ...] = ((128, 128),)
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
    record: int
    bucket: int
    seed: tuple[int, ...]


class _Rows:
    """Random access to this process's rows of all batches: a source for grain."""

    def __init__(self, plan: buckets.BatchPlan, rows: tuple[int, int], seed: int) -> None:
        self._plan, self._rows, self._seed = plan, rows, seed

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> _Row:
        first, stop = self._rows
        k, row = divmod(i, stop - first)
        bucket, records = self._plan(k)
        return _Row(int(records[first + row]), bucket, (self._seed, _CLIP, k, first + row))


class _CutClip:
    """Decodes one clip of a video record: random start, target fps, bucket's size."""

    def __init__(self, dataset: Dataset, config: DataConfig) -> None:
        self._dataset, self._config = dataset, config

    def __call__(self, row: _Row) -> dict[str, Any]:
        record = self._dataset.read(row.record)
        config, times = self._config, record["timestamps"]
        rng = np.random.default_rng(row.seed)
        frames = clip_frames(times, config.num_frames, config.fps, rng.random())
        video = buckets.fit_frames(decode_frames(record, frames), config.sizes[row.bucket])
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
      dataset: the records read.
      left_out: videos too short for a clip.
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
        self._latents = dataset.metadata.get("kind") == "latents"
        index = dataset.index
        fits = np.ones(len(dataset), bool) if self._latents else long_enough(index, config)
        # Of those that fit alone, as the latents made of them are.
        chosen = np.flatnonzero(fits)
        chosen = chosen[in_split(index["source"][chosen], config.eval_fraction, split)]
        self.left_out = int(np.sum(~fits))
        if not chosen.size and fits.any():
            raise UserError(
                f"{dataset.directory} has no video for the {split} split ({fits.sum()} clips are "
                f"long enough): change config.data.eval_fraction ({config.eval_fraction:g}), or "
                "add videos."
            )
        if not chosen.size:
            raise UserError(
                f"{dataset.directory} has no video for the {split} split "
                f"({self.left_out} of {len(dataset)} are shorter than {config.num_frames} frames "
                f"at {config.fps or 'their own'} fps): lower config.data.num_frames, raise "
                "config.data.fps, or add videos."
            )
        assigned = self._assign(index, chosen)
        self.plan = _Subset(buckets.BatchPlan(assigned, batch_size, seed, shuffle=shuffle), chosen)
        self._used = np.unique(assigned, return_counts=True)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every video of the split appears."""
        return self.plan.batches_per_epoch

    def describe(self) -> str:
        """One line: clips, buckets, what was left out."""
        counts = ", ".join(f"{n} in {s}" for s, n in self._bucket_counts().items())
        short = f"; {self.left_out} too short for a clip" if self.left_out else ""
        return f"{self.dataset.directory}: {counts}{short}"

    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The whole batch's arrays, for every bucket that has records."""
        b, n = self._batch_size, self.config.num_frames
        common = {
            "label": jax.ShapeDtypeStruct((b,), np.int32),
            "fps": jax.ShapeDtypeStruct((b,), np.float32),
        }
        if length := self.config.caption_bytes:
            common["text"] = jax.ShapeDtypeStruct((b, length), np.uint8)
        if self._latents:
            metadata = self.dataset.metadata
            latents = [(b, *map(int, self._latent_shapes[i])) for i in self._used[0]]
            shapes = [{"latents": (s, np.dtype(metadata["dtype"]))} for s in latents]
            if "codes" in metadata:
                shapes = [d | {"codes": (s[:-1], np.int32)} for d, s in zip(shapes, latents)]
        else:
            sizes = [self.config.sizes[i] for i in self._used[0]]
            shapes = [{"video": ((b, n, *size, 3), np.uint8)} for size in sizes]
        return [
            {name: jax.ShapeDtypeStruct(*s) for name, s in arrays.items()} | common
            for arrays in shapes
        ]

    def batches(self, start: int = 0, rows: tuple[int, int] | None = None) -> Iterator[HostBatch]:
        """Batches `start`, `start` + 1, ... for ever; of each the given rows (default: all)."""
        rows = rows or (0, self._batch_size)
        local = rows[1] - rows[0]
        cut = (_ReadLatents if self._latents else _CutClip)(self.dataset, self.config)
        source = grain.MapDataset.source(_Rows(self.plan, rows, self._seed))
        clips = source.slice(slice(start * local, None)).map(cut)
        options = grain.ReadOptions(
            num_threads=self.config.num_threads, prefetch_buffer_size=max(local, 16)
        )
        clips = clips.to_iter_dataset(options)
        if self.config.num_workers:
            flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, which argparse left alone
            # Before batching: worker i decodes clips i, i + num_workers, ...
            clips = clips.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.config.num_workers)
            )
        return iter(clips.batch(local))

    def on_devices(
        self, sharding: NamedSharding, start: int = 0, ahead: int = 2
    ) -> Iterator[dict[str, jax.Array]]:
        """Batches as global arrays, `ahead` of them on the way to the devices; without strings."""
        return _on_devices(self, sharding, self._batch_size, start, ahead)

    def _bucket_counts(self) -> dict[str, int]:
        sizes = self._latent_shapes if self._latents else self.config.sizes
        return {"x".join(map(str, sizes[i])): int(n) for i, n in zip(*self._used)}

    def _assign(self, index: dict[str, np.ndarray], records: np.ndarray) -> np.ndarray:
        if not self._latents:
            return buckets.assign(
                index["height"][records], index["width"][records], self.config.sizes
            )
        columns = [index[c][records] for c in ("num_frames", "height", "width")]
        channels = np.full(len(records), self.dataset.metadata["latent_channels"])
        self._latent_shapes, assigned = np.unique(
            np.stack([*columns, channels], 1), axis=0, return_inverse=True
        )
        return assigned.reshape(-1)


class _Subset:
    """A plan over some of the records, in the dataset's own numbering."""

    def __init__(self, plan: buckets.BatchPlan, records: np.ndarray) -> None:
        self._plan, self._records = plan, records
        self.batches_per_epoch = plan.batches_per_epoch

    def __call__(self, k: int) -> tuple[int, np.ndarray]:
        bucket, rows = self._plan(k)
        return bucket, self._records[rows]


def long_enough(index: dict[str, np.ndarray], config: DataConfig) -> np.ndarray:
    """Which records of a dataset's index a clip fits in, bool (N,)."""
    if not config.fps:
        return index["num_frames"] >= config.num_frames
    # Half a frame short still has a nearest frame for every time.
    last = (index["num_frames"] - 1) / index["fps"]
    return last + 0.5 / config.fps >= (config.num_frames - 1) / config.fps


def in_split(sources: np.ndarray, fraction: float, split: str) -> np.ndarray:
    """Which records belong to the split: whole source videos, in the order of their names' hashes.

    So videos and the latents made of them are split alike.
    """
    if split == "all" or not fraction:
        return np.full(len(sources), split != "eval")
    names = sorted(set(sources.tolist()), key=lambda s: hashlib.sha256(s.encode()).digest())
    held_out = names[: max(1, round(fraction * len(names)))]
    return np.isin(sources, held_out) == (split == "eval")


class Joint:
    """Batches of videos that also hold images: the two go through the step together.

    An image is a clip of one frame. The arrays of a batch of images are added to those of the
    videos under names that begin with `image/`.
    """

    def __init__(self, videos: Pipeline, images: Pipeline) -> None:
        self._videos, self._images = videos, images

    def describe(self) -> str:
        """One line for both."""
        return f"{self._videos.describe()}; images from {self._images.describe()}"

    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Every bucket of videos with every bucket of images."""
        both = itertools.product(self._videos.shapes(), self._images.shapes())
        return [_beside(videos, images) for videos, images in both]

    def on_devices(self, sharding: NamedSharding, start: int = 0) -> Iterator[dict[str, jax.Array]]:
        """As `Pipeline.on_devices`."""
        both = zip(*(p.on_devices(sharding, start) for p in (self._videos, self._images)))
        return (_beside(videos, images) for videos, images in both)


def _beside(videos: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    return videos | {f"{IMAGES}{name}": array for name, array in images.items()}


def _on_devices(
    pipeline: Pipeline, sharding: NamedSharding, batch_size: int, start: int, ahead: int
) -> Iterator[dict[str, jax.Array]]:
    rows = local_rows(sharding, batch_size)
    batches = pipeline.batches(start, rows)

    def put(batch: HostBatch) -> dict[str, jax.Array]:
        # The one transfer that is wanted; with several processes JAX takes it for an implicit one.
        with jax.transfer_guard_host_to_device("allow"):
            return {
                name: jax.make_array_from_process_local_data(
                    sharding, x, (batch_size, *x.shape[1:])
                )
                for name, x in batch.items()
                if name != "caption"
            }

    queue = collections.deque(put(next(batches)) for _ in range(ahead))
    while True:
        yield queue.popleft()
        queue.append(put(next(batches)))
