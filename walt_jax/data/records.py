"""Records on disk: ArrayRecord shards in TFDS's format, their writer, reader and frame codec.

A dataset is a directory that `tfds.builder_from_directory(DIR).as_data_source()` opens. It also
holds `metadata.json` (shard sizes, label names, fingerprint, whatever the writer adds) and
`index.npz` (every scalar of every record: buckets are planned without reading a payload; and every
record's SHA-256: datasets are joined without reading one). Nothing here imports TensorFlow.
`prepare` writes `VIDEO_FEATURES`, `encode` writes latents with its own.

**Why JPEG frames.** A training example is a few frames from anywhere in a clip, often with a
stride, and on a pod the hosts' CPUs run short before the disks do. Measured on 32 real clips, one
core of an AMD EPYC, 17 frames from a random offset (`benchmarks/record_encoding.py`):

    short side 128            bytes/frame   clips/s   clips/s, every 3rd frame   PSNR
    JPEG q90 4:4:4 (chosen)          8636       603                        599   40.1 dB
    JPEG q95 4:2:0                   9663       651                        677   39.9 dB
    H.264 crf 16, GOP 8, 4:4:4       1419       215                        117   40.1 dB
    H.264 crf 16, GOP 8, 4:2:0       1408       340                        160   37.3 dB
    short side 256
    JPEG q90 4:4:4 (chosen)         22870       203                        210   43.0 dB
    H.264 crf 16, GOP 8, 4:4:4       3969        65                         35   41.9 dB

At equal fidelity H.264 is 6 times smaller but decodes 3 to 6 times slower.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core import example_serializer

from walt_jax.data import stores
from walt_jax.data.directories import check_free, empty_directory, lock_directory
from walt_jax.data.shards import Shard
from walt_jax.errors import UserError

FORMAT_VERSION = 1
INDEX = "index.npz"


class BrokenRecord(UserError):
    """A record that cannot be read or decoded.

    Attributes:
      key: names the record.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def exact(dtype: type, *shape: int | None) -> tfds.features.Tensor:
    """A feature whose bits survive: tf.Example alone would squeeze float64 into float32."""
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


VIDEO_FEATURES = tfds.features.FeaturesDict(
    {
        "payload": exact(np.uint8, None),  # all frames as JPEG, one after the other
        "offsets": exact(np.int64, None),  # (T+1,): frame t is payload[offsets[t]:offsets[t+1]]
        "timestamps": exact(np.float64, None),  # (T,): seconds from the record's first frame
        "fps": exact(np.float64),  # average; 1.0 for a single frame
        "duration": exact(np.float64),  # seconds: num_frames / fps
        "width": tfds.features.Scalar(np.int64),
        "height": tfds.features.Scalar(np.int64),
        "num_frames": tfds.features.Scalar(np.int64),
        "caption": tfds.features.Text(),
        "label": tfds.features.Scalar(np.int64),  # -1 = none
        "source": tfds.features.Text(),  # path relative to the input, or a name
        "start": exact(np.float64),  # seconds from the source's first frame to the record's
        "sha256": tfds.features.Text(),  # of the source file
    }
)


class DatasetWriter:
    """Writes a dataset that appears under its name only when it is complete.

    Everything goes to the sibling `DIRECTORY.partial`, which becomes DIRECTORY in one rename at
    the end of the `with` block; what an interrupted run left there is removed by the next one.
    Shards are independent: threads may write side by side as long as each keeps to its own shard.
    The bytes depend only on what is written to which shard. Empty shards are dropped.

    Attributes:
      partial: the directory in progress; further files put there come along.
      metadata: JSON values to store; may be added to until the end of the block.
    """

    def __init__(
        self,
        directory: str | Path,
        features: tfds.features.FeaturesDict,
        *,
        name: str = "walt_jax",
        description: str = "",
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        may_be_empty: bool = False,
    ):
        """Raises UserError if `directory` is taken, or another process is writing it.

        Args:
          directory: where the dataset will be.
          features: what a record holds; its numeric scalars and `source` make up the index.
          name: TFDS's name of the dataset, lower-case letters, digits and underscores.
          description: a sentence for `dataset_info.json`.
          metadata: JSON values; `label_names`, a list of str, is given a meaning by `Dataset`.
          overwrite: replace a dataset that is there (never a directory of anything else).
          may_be_empty: a dataset without records is none to complain about.
        """
        self.directory = Path(directory).absolute()
        self.partial = self.directory.with_name(self.directory.name + ".partial")
        self.metadata = dict(metadata or {})
        self._features, self._name, self._description = features, name, description
        self._serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        self._index_keys, self._may_be_empty = _index_names(features), may_be_empty
        self._shards: dict[int, Shard] = {}
        check_free(self.directory, overwrite)
        self._lock = lock_directory(self.partial)
        empty_directory(self.partial)

    def write(self, example: Mapping[str, Any], shard: int = 0) -> None:
        """Appends one example, a value for each feature, to a shard."""
        if shard not in self._shards:
            self._shards[shard] = Shard(self.partial / f"shard-{shard:05d}")
        # Plain SerializeToString may order the features differently in each process.
        encoded = self._features.encode_example(example)
        data = self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
        self._shards[shard].write(data, [np.asarray(example[k]).item() for k in self._index_keys])

    def close_shard(self, shard: int) -> None:
        """Closes a shard's file, if it has one; nothing more can be written to it."""
        if shard in self._shards:
            self._shards[shard].close()

    def add(self, dataset: "Dataset", keep: Sequence[bool] | None = None) -> None:
        """Appends the records of a dataset of the same features; none is decoded.

        Without `keep` its files are linked, or moved where the file system has no links. With
        `keep`, N bools, files of which all is kept are linked or copied, of others the bytes of
        the records kept are copied; `dataset` stays whole.
        """
        if not len(dataset):
            return
        with np.load(dataset.directory / INDEX, allow_pickle=False) as columns:
            digests = [row.tobytes() for row in columns["digest"]]
        rows = list(zip(*(dataset.index[k].tolist() for k in self._index_keys)))
        for entry, stop in zip(dataset.metadata["shards"], dataset._ends):
            number, part = len(self._shards), range(stop - entry["records"], stop)
            kept = [i for i in part if keep is None or keep[i]]
            if not kept:
                continue
            path, source = self.partial / f"shard-{number:05d}", dataset.directory / entry["file"]
            if len(kept) == len(part):
                shard = Shard(path, [rows[i] for i in kept], [digests[i] for i in kept])
                try:
                    os.link(source, path)
                except OSError:
                    source.rename(path) if keep is None else shutil.copyfile(source, path)
            else:
                shard = Shard(path)
                for i in kept:
                    shard.write(dataset.read_bytes(i), rows[i])
            self._shards[number] = shard

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, exc_type: type | None, *_: object) -> None:
        try:
            for shard in self._shards.values():
                shard.close()
            if exc_type is None:
                self._finish()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            os.close(self._lock)

    def _finish(self) -> None:
        shards = [self._shards[i] for i in sorted(self._shards)]
        if not shards and not self._may_be_empty:
            raise UserError(f"no record was written to {self.directory}: check the input.")
        entries, rows, digests = [], [], []
        for i, shard in enumerate(shards):
            file = f"{self._name}-train.array_record-{i:05d}-of-{len(shards):05d}"
            path = shard.path.rename(self.partial / file)
            entries.append({"file": file, "records": len(shard.rows), "bytes": path.stat().st_size})
            rows += shard.rows
            digests += shard.digests
        columns = {k: np.array(c) for k, c in zip(self._index_keys, zip(*rows))}
        whole = b"".join(digests)
        columns["digest"] = np.frombuffer(whole, np.uint8).reshape(len(digests), 32)
        np.savez(self.partial / INDEX, **columns)
        self.metadata |= {"format_version": FORMAT_VERSION, "shards": entries}
        self.metadata["fingerprint"] = hashlib.sha256(whole).hexdigest()
        if shards:
            self._describe(entries)
        else:  # TFDS knows no dataset without records
            self._features.save_config(str(self.partial))
            (self.partial / "metadata.json").write_text(json.dumps(self.metadata))
        replaced = self.partial.with_name(self.directory.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(replaced)
        self.partial.rename(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _describe(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Writes what TFDS wants to know."""
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[e["records"] for e in entries],
            num_bytes=sum(e["bytes"] for e in entries),
            filename_template=None,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self.partial,
            features=self._features,
            split_infos=[split],
            description=self._description,
            metadata=tfds.core.MetadataDict(self.metadata),
            check_data=False,
        )


def write_dataset(
    directory: str | Path,
    features: tfds.features.FeaturesDict,
    examples: Iterable[Mapping[str, Any]],
    *,
    shard_size: int = 256,
    **kwargs: Any,
) -> "Dataset":
    """Writes examples in their order, `shard_size` to a shard; kwargs as for `DatasetWriter`."""
    with DatasetWriter(directory, features, **kwargs) as writer:
        for i, example in enumerate(examples):
            if i % shard_size == 0:
                writer.close_shard(i // shard_size - 1)
            writer.write(example, shard=i // shard_size)
    return open_dataset(directory)


class Dataset:
    """A dataset on disk, a random-access source for grain; pickles as its path.

    Attributes:
      directory: its path.
      metadata: what the writer stored, a dict of JSON values.
      label_names: name of each label id; empty where labels have none.
      fingerprint: SHA-256 over the records in their order; the number of shards is no part of it.
      index: `source` and the numeric scalars of all records by name, each an array (N,): for
        videos `fps`, `duration`, `start` float64, `width`, `height`, `num_frames`, `label` int64.
    """

    def __init__(self, directory: str | Path, url: str | None = None):
        """`url` is where the files are that `directory`, a cache, does not have yet."""
        self.directory, self._url = Path(directory), url
        self._readers: dict[int, ArrayRecordReader] = {}

    def __reduce__(self) -> tuple:
        return Dataset, (self.directory, self._url)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.read(i)

    def read(self, i: int) -> dict[str, Any]:
        """Reads record i: arrays as numpy, texts as str, scalars as numbers; nothing decoded.

        Raises IndexError out of range, UserError for a shard that is missing or damaged.
        """
        data, where = self._fetch(i)
        try:
            record = self._features.deserialize_example_np(data)
        except Exception as error:  # protobuf and TFDS each raise their own kinds
            raise BrokenRecord(f"{where} is damaged: prepare the dataset again.", where) from error
        return {name: _plain(value) for name, value in record.items()}

    def read_bytes(self, i: int) -> bytes:
        """Record i as it lies on disk; errors as in `read`."""
        return self._fetch(i)[0]

    def _fetch(self, i: int) -> tuple[bytes, str]:
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.directory}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        within = i - (int(self._ends[shard - 1]) if shard else 0)
        path = self.directory / self.metadata["shards"][shard]["file"]
        try:
            if shard not in self._readers:
                if self._url is not None:
                    stores.cached(self._url, path.name, self.directory)
                options = "readahead_buffer_size:0,max_parallelism:0"
                self._readers[shard] = ArrayRecordReader(str(path), options)
            (data,) = self._readers[shard].read([within])
        except Exception as error:  # array_record raises its own kinds
            where = f"{path} is missing or damaged at its record {within}"
            raise BrokenRecord(f"{where}: prepare the dataset again.", where) from error
        return data, f"record {within} of {path}"

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        path = self.directory / "metadata.json"
        if not path.is_file():
            lacks = f"{self.directory} is not a complete dataset (it has no metadata.json)"
            raise UserError(f"{lacks}: check the path, or run `python -m walt_jax.prepare`.")
        try:
            metadata = json.loads(path.read_text())
            version = metadata["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: prepare the dataset again.") from error
        if version != FORMAT_VERSION:
            raise UserError(f"{path} is of format {version}, not {FORMAT_VERSION}: prepare again.")
        return metadata

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.metadata.get("label_names", ()))

    @property
    def fingerprint(self) -> str:
        return self.metadata["fingerprint"]

    @functools.cached_property
    def index(self) -> dict[str, np.ndarray]:
        path = self.directory / INDEX
        names = _index_names(self._features)
        if not path.exists():
            records = [self.read(i) for i in range(len(self))]
            return {k: np.array([r[k] for r in records]) for k in names}
        try:
            with np.load(path, allow_pickle=False) as columns:
                index = {k: columns[k] for k in names}
            if any(len(column) != len(self) for column in index.values()):
                raise ValueError("not one value for each record")
        except Exception as error:  # zipfile and numpy raise many kinds
            raise UserError(f"{path} is damaged: delete it to have it made anew.") from error
        return index

    @property
    def features(self) -> tfds.features.FeaturesDict:
        """What a record holds."""
        return self._features

    @functools.cached_property
    def _features(self) -> tfds.features.FeaturesDict:
        try:
            return tfds.features.FeaturesDict.from_config(self.directory)
        except Exception as error:  # TFDS raises whatever it trips over
            path = self.directory / "features.json"
            raise UserError(f"{path} is missing or damaged: prepare the dataset again.") from error

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard["records"] for shard in self.metadata["shards"]])


def open_dataset(directory: str | Path, features: Iterable[str] = ()) -> Dataset:
    """Opens a dataset after checking that all of it is there.

    Args:
      directory: what `DatasetWriter` wrote, the URL of a copy of it in a store (gs://...), or the
        file of a mixture (see `mixture.py`).
      features: names that a record must have, for example `VIDEO_FEATURES`.

    Raises:
      UserError: not a dataset, another format, a feature or shard is missing, or a shard is
        truncated; names the path.
    """
    if Path(directory).suffix == ".json":
        from walt_jax.data.mixture import open_mixture  # made of datasets that are opened here

        return open_mixture(directory, features)
    dataset = _cached(str(directory)) if stores.is_remote(directory) else Dataset(directory)
    shards = dataset.metadata["shards"]
    missing = sorted(set(features) - set(dataset._features))
    if missing:
        lacks = f"{directory} holds records without {', '.join(missing)}"
        raise UserError(f"{lacks}: give the directory of a dataset that was written for this use.")
    for shard in shards:
        path = stores.join(directory, shard["file"])
        size = stores.size(path)
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} of {shard['bytes']} bytes"
            raise UserError(f"{path} {found}: prepare the dataset again or copy it completely.")
    return dataset


def _cached(url: str) -> Dataset:
    """A dataset in a store; its shards are fetched when a record of them is first read."""
    if not stores.exists(stores.join(url, "metadata.json")):
        lacks = f"{url} is not a complete dataset (it has no metadata.json)"
        raise UserError(f"{lacks}: check the path, or run `python -m walt_jax.prepare`.")
    folder = stores.cache_of(url, stores.read_text(stores.join(url, "metadata.json")))
    for name in ("metadata.json", "features.json", INDEX):
        stores.cached(url, name, folder)
    return Dataset(folder, url)


def decode_frames(record: Mapping[str, Any], frame_indices: Sequence[int]) -> np.ndarray:
    """Decodes the frames asked for, and only those.

    Args:
      record: a video record from `Dataset.read`.
      frame_indices: in [0, num_frames), in any order, repeats allowed; at least one.

    Returns:
      uint8 (len(frame_indices), height, width, 3), sRGB.

    Raises:
      IndexError: a frame is out of range.
      UserError: the payload is damaged; names the record's source.
    """
    payload, offsets = record["payload"], record["offsets"]
    frames = np.empty((len(frame_indices), record["height"], record["width"], 3), np.uint8)
    for i, t in enumerate(frame_indices):
        if not 0 <= t < len(offsets) - 1:
            raise IndexError(f"frame {t} of {len(offsets) - 1} in the record of {record['source']}")
        image = cv2.imdecode(payload[offsets[t] : offsets[t + 1]], cv2.IMREAD_COLOR_RGB)
        if image is None or image.shape != frames.shape[1:]:
            where = f"the record of {record['source']} at {record['start']:g} s"
            raise BrokenRecord(f"frame {t} in {where} is damaged: prepare it again.", where)
        frames[i] = image
    return frames


def _plain(value: Any) -> Any:
    """Texts come out of TFDS as bytes, exact scalars as arrays without axes."""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if np.ndim(value) == 0 and isinstance(value, np.ndarray) else value


def _index_names(features: tfds.features.FeaturesDict) -> list[str]:
    return [
        name
        for name, info in sorted(features.get_tensor_info().items())
        if name == "source" or (info.shape == () and np.issubdtype(info.np_dtype, np.number))
    ]
