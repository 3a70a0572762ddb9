"""Records on disk: ArrayRecord shards in TFDS's format, their reader and frame codec.

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
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from walt_jax.data import stores
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
        return int(self.ends[-1]) if self.ends.size else 0

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
        shard = int(np.searchsorted(self.ends, i, side="right"))
        within = i - (int(self.ends[shard - 1]) if shard else 0)
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
        names = index_names(self._features)
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
    def ends(self) -> np.ndarray:
        """The number of the record after each shard's last: int64 (shards,)."""
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


def index_names(features: tfds.features.FeaturesDict) -> list[str]:
    """The features that the index holds: `source` and numeric scalars."""
    return [
        name
        for name, info in sorted(features.get_tensor_info().items())
        if name == "source" or (info.shape == () and np.issubdtype(info.np_dtype, np.number))
    ]
