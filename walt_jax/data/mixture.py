"""Several datasets as one, in given proportions.

A mixture is a JSON file, {"DIRECTORY": WEIGHT, ...}, that stands wherever a dataset's directory
does. Directories are relative to the file. Records of a dataset are drawn in proportion to its
weight: the one that is rarest for its size comes once an epoch, the others as often as that
requires, the fraction of a repetition spread evenly over their records. So every record appears in
every epoch, and batch k stays a function of (seed, k).
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from walt_jax.data.records import Dataset, open_dataset
from walt_jax.errors import UserError


class Mixture(Dataset):
    """The records of all datasets, repeated by their weights; used as a `Dataset` is.

    Label ids are of the union of the datasets' label names, in the order in which these come.
    """

    def __init__(self, path: str | Path, datasets: list[Dataset], weights: list[float]):
        self.directory, self._datasets, self._weights = Path(path), datasets, weights
        sizes = np.array([len(d) for d in datasets])
        often = np.array(weights) / sizes
        often = often / often.min()
        counts = [round(f * n) for f, n in zip(often.tolist(), sizes.tolist())]
        rows = [np.arange(c) * n // c for c, n in zip(counts, sizes.tolist())]
        self._of = np.repeat(np.arange(len(datasets)), counts)
        self._rows = np.concatenate(rows)
        names = [d.label_names for d in datasets]
        union = list(dict.fromkeys(name for part in names for name in part))
        # The last entry is that of -1, no label.
        self._labels = [np.array([*map(union.index, part), -1], np.int64) for part in names]
        self._union = tuple(union)

    def __reduce__(self) -> tuple:
        return Mixture, (self.directory, self._datasets, self._weights)

    def __len__(self) -> int:
        return len(self._of)

    def read(self, i: int) -> dict[str, Any]:
        """As of `Dataset`; `source` begins with the dataset's name."""
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.directory}")
        which = int(self._of[i])
        record = dict(self._datasets[which].read(self._rows[i]))
        record["label"] = self._label(which, record["label"])
        record["source"] = f"{self._datasets[which].directory.name}/{record['source']}"
        return record

    def read_bytes(self, i: int) -> bytes:
        """The bytes in the dataset that the record comes from: with its own label ids."""
        return self._datasets[int(self._of[i])].read_bytes(self._rows[i])

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        first = dict(self._datasets[0].metadata)
        parts = [d.fingerprint for d in self._datasets]
        first["label_names"] = list(self._union)
        text = json.dumps([parts, self._weights])
        return first | {"fingerprint": hashlib.sha256(text.encode()).hexdigest(), "shards": []}

    @functools.cached_property
    def index(self) -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {}
        for which, dataset in enumerate(self._datasets):
            rows = self._rows[self._of == which]
            for name, values in dataset.index.items():
                if name == "label":
                    values = self._label(which, values)
                if name == "source":
                    values = np.array([f"{dataset.directory.name}/{s}" for s in values.tolist()])
                columns.setdefault(name, []).append(values[rows])
        shared = {n: c for n, c in columns.items() if len(c) == len(self._datasets)}
        return {name: np.concatenate(c) for name, c in shared.items()}

    def _label(self, which: int, label: Any) -> Any:
        labels = self._labels[which]
        if len(labels) == 1:  # numbers without names stand as they are
            return label
        return labels[label] if isinstance(label, np.ndarray) else int(labels[label])


def open_mixture(path: str | Path, features: Iterable[str] = ()) -> Mixture:
    """Opens a mixture and its datasets, as `open_dataset` opens one.

    Raises:
      UserError: no such file, no JSON object of positive weights, a dataset that cannot be opened,
        or datasets that do not go together.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a dataset's directory or a mixture's file.")
    try:
        weights = json.loads(path.read_text())
        weights = {str(k): float(v) for k, v in weights.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f'{path} is no mixture ({error}): write {{"DIRECTORY": WEIGHT, ...}}.'
        ) from error
    if not weights or min(weights.values()) <= 0:
        raise UserError(f"{path} must name datasets with weights above 0: correct it.")
    datasets = [open_dataset(path.parent / name, features) for name in weights]
    for key in ("kind", "tokenizer_hash", "dtype", "latent_channels", "codes", "text"):
        values = [d.metadata.get(key) for d in datasets]
        other = next((i for i, v in enumerate(values) if v != values[0]), None)
        if other is not None:
            raise UserError(
                f"{path} mixes datasets of different {key}: {datasets[0].directory} and "
                f"{datasets[other].directory}; leave one out."
            )
    return Mixture(path, datasets, list(weights.values()))
