"""Statistics of real clips, kept with the record of how they were made."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.evaluation import partial
from walt_jax.evaluation.clips import Clips
from walt_jax.evaluation.features import FeatureNet
from walt_jax.evaluation.measures import FeatureSums, describe
from walt_jax.evaluation.moments import Moments
from walt_jax.evaluation.protocols import Protocol
from walt_jax.evaluation.scores import Record, check_same, identity

# What of a protocol does not concern the real clips.
_OF_SAMPLES = ("name", "source", "num_samples", "folds", "given_frames", "labels", "unbiased")
_BATCH = 8  # clips given to the feature network at once; no feature depends on it


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of real clips.

    Attributes:
      moments: the sums of their features.
      rows: float32 (K, D), the features of the first of them; K may be 0.
      source: what the clips are, as a record.
    """

    moments: Moments
    rows: np.ndarray
    source: Record


def record_of(protocol: Protocol, net: FeatureNet) -> Record:
    """What statistics of real clips depend on beside the clips."""
    cut = {k: v for k, v in config_lib.to_dict(protocol).items() if k not in _OF_SAMPLES}
    return {"protocol": cut, "features": describe(net)}


def statistics(
    clips: Clips,
    net: FeatureNet,
    cache: str | Path,
    *,
    kept: int = 0,
    progress: bool = True,
) -> tuple[Statistics, epath.Path]:
    """The sums of all clips: from the cache, or computed and put there.

    Computing goes on where it was cut off, and is shared by all processes.

    Args:
      clips: all are counted.
      net: of the features.
      cache: folder.
      kept: features to keep beside the sums, those of the first clips.
      progress: show it.

    Returns:
      The statistics and their file.
    """
    kept = min(kept, len(clips))
    record = {**record_of(clips.protocol, net), "real": clips.record}
    if kept:
        record["kept"] = kept
    name = f"{net.name}-{clips.protocol.name}-{identity(record)}".replace(":", "-")
    path = epath.Path(cache) / f"{name}.npz"
    there = path.exists()
    partial.barrier("evaluation-looked")
    if not there:
        sums = FeatureSums(net, kept=kept)
        folder = path.with_suffix(".parts")
        partial.gather(
            folder,
            len(clips),
            {"features": sums},
            lambda numbers: clips.batches(numbers, _BATCH),
            what="real clips",
            progress=progress,
        )
        if jax.process_index() == 0:
            _write(path, sums, record)
        partial.remove(folder)
    return load(path, clips.protocol, net), path


def load(path: epath.PathLike, protocol: Protocol, net: FeatureNet, *, kept: int = 0) -> Statistics:
    """Reads statistics, after checking that they fit, and that they keep so many features.

    Raises:
      UserError: no statistics, or made by another protocol or feature network; the sentence names
        every field that differs.
    """
    moments, (record, rows) = Moments.load(path), _read(path)
    real = record.pop("real")
    record.pop("kept", None)
    advice = "give the videos to have them computed anew, or the protocol and features of the file"
    check_same(record_of(protocol, net), record, str(path), advice)
    clips = moments.count // (protocol.num_frames if net.max_frames == 1 else 1)
    if protocol.num_real and protocol.num_real != clips:
        raise UserError(
            f"{path} is of {clips} clips, but the protocol {protocol.name} is of "
            f"{protocol.num_real}: give the videos."
        )
    if len(rows) < kept:
        raise UserError(
            f"{path} keeps the features of {len(rows)} clips, too few for a kernel distance of "
            f"{kept}: give the videos."
        )
    return Statistics(moments, rows, real)


def source_of(path: epath.PathLike) -> Record:
    """What the clips of a file of statistics are.

    Raises:
      UserError: it does not say.
    """
    return _read(path)[0]["real"]


def _read(path: epath.PathLike) -> tuple[Record, np.ndarray]:
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give statistics that evaluate wrote, or videos.")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return json.loads(file["record"].tobytes()), file["rows"]
    except Exception as error:  # a damaged zip file raises whatever NumPy trips over
        raise UserError(
            f"{path} does not say how it was made ({error}): compute it again from the videos."
        ) from error


def _write(path: epath.Path, sums: FeatureSums, record: Record) -> None:
    buffer, (moments,) = io.BytesIO(), sums.moments
    np.savez(
        buffer,
        count=moments.count,
        total=moments.total,
        outer=moments.outer,
        rows=sums.rows,
        record=np.frombuffer(json.dumps(record).encode(), np.uint8),
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)
