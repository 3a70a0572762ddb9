"""The writer of datasets; `walt_jax.data.records` says what a dataset is and reads it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from walt_jax.data.directories import check_free, empty_directory, lock_directory
from walt_jax.data.records import FORMAT_VERSION, INDEX, Dataset, index_names, open_dataset
from walt_jax.data.shards import Shard
from walt_jax.errors import UserError


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
        self._index_keys, self._may_be_empty = index_names(features), may_be_empty
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

    def add(self, dataset: Dataset, keep: Sequence[bool] | None = None) -> None:
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
        for entry, stop in zip(dataset.metadata["shards"], dataset.ends):
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
) -> Dataset:
    """Writes examples in their order, `shard_size` to a shard; kwargs as for `DatasetWriter`."""
    with DatasetWriter(directory, features, **kwargs) as writer:
        for i, example in enumerate(examples):
            if i % shard_size == 0:
                writer.close_shard(i // shard_size - 1)
            writer.write(example, shard=i // shard_size)
    return open_dataset(directory)
