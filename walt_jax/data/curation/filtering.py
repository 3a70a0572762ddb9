"""Which clips of a scored dataset are kept: thresholds on its columns, near-duplicates by their
hashes. Nothing is decoded."""

from typing import Any

import numpy as np

from walt_jax.data.curation.config import FilterConfig
from walt_jax.data.curation.scores import HASHES
from walt_jax.data.records import Dataset
from walt_jax.errors import UserError

_COLUMNS = {
    "seconds": ("duration", "cut"),
    "frames": ("num_frames", "cut"),
    "aesthetic": ("aesthetic", "scores.clip.aesthetic_head"),
    "text_match": ("text_match", "scores.clip.text"),
}


def select(dataset: Dataset, config: FilterConfig) -> list[str]:
    """For each record why it is left out, or "" where it is kept; no image is asked for motion.

    Raises:
      UserError: a threshold is set on a score that the dataset does not have.
    """
    index, images = dataset.index, dataset.index["num_frames"] == 1
    reasons: list[list[str]] = [[] for _ in range(len(dataset))]
    for name, (least, most) in config.ranges().items():
        values = column(index, name, str(dataset.directory)).tolist()
        for i, value in enumerate(values):
            if name == "motion" and images[i]:
                continue
            if least is not None and not value >= least:
                reasons[i].append(f"{name} {value:.4g} is below {least:g}")
            elif most is not None and not value <= most:
                reasons[i].append(f"{name} {value:.4g} is above {most:g}")
    if config.duplicate_bits is not None:
        if HASHES[0] not in index:
            raise UserError(
                f"config.filter.duplicate_bits needs the hashes of {dataset.directory}, which has "
                "none: prepare it with config.scores.phash=True."
            )
        # Of what the thresholds keep: a clip that is gone replaces no other.
        kept = np.array([i for i, r in enumerate(reasons) if not r], np.int64)
        hashes = np.stack([index[name][kept] for name in HASHES], 1).astype(np.int64)
        for i, first in zip(kept, kept[duplicates(hashes, config.duplicate_bits)]):
            if first != i:
                source, start = index["source"][first], index["start"][first]
                reasons[i].append(f"a near-duplicate of {source} at {start:.2f} s")
    return ["; ".join(r) for r in reasons]


def column(index: dict[str, np.ndarray], name: str, where: str) -> np.ndarray:
    """The values that a threshold of this name looks at, one a record."""
    if name == "short_side":
        return np.minimum(index["height"], index["width"])
    key, option = _COLUMNS.get(name, (name, f"scores.{name}"))
    if key not in index:
        raise UserError(
            f"config.filter.{name} is set, but {where} has no such column: prepare it with "
            f"config.{option}, or leave the threshold out."
        )
    return index[key]


def duplicates(hashes: np.ndarray, bits: int) -> np.ndarray:
    """The first of each record's group of near-duplicates.

    Records that differ in at most `bits` bits are linked, and groups are what is linked directly or
    through others. Every such pair is found: of `bits` + 1 bands it shares one, and the search is
    among those that share one (near linear in N while bits are few).

    Args:
      hashes: int64 (N, 3), 192 bits a record.
      bits: in [0, 24).

    Returns:
      int64 (N,): the smallest number in each record's group; its own where it has no duplicate.
    """
    parent = np.arange(len(hashes))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    data = np.ascontiguousarray(hashes, ">i8").view(np.uint8).reshape(len(hashes), -1)
    # Equal hashes first: they are linked at once, and the search is among different ones.
    unique, first, inverse = np.unique(data, axis=0, return_index=True, return_inverse=True)
    parent = first[inverse.reshape(-1)].copy()
    for band in np.array_split(np.unpackbits(unique, axis=1), bits + 1, axis=1) if bits else ():
        keys = np.unique(np.packbits(band, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
        order = np.argsort(keys, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for n, i in enumerate(group[:-1]):
                others = group[n + 1 :]
                distance = np.bitwise_count(unique[i] ^ unique[others]).sum(axis=1)
                for j in others[distance <= bits]:
                    a, b = sorted((root(first[i]), root(first[j])))
                    parent[b] = a
    return np.array([root(i) for i in range(len(hashes))], np.int64)


def summary(reasons: list[str]) -> dict[str, Any]:
    """How many records each column turned away, by its name."""
    counts: dict[str, int] = {}
    for reason in filter(None, reasons):
        for part in reason.split("; "):
            name = "near-duplicate" if part.startswith("a near") else part.split()[0]
            counts[name] = counts.get(name, 0) + 1
    return counts
