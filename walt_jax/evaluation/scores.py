"""A score with the record of how it was taken, and the file that scores are kept in."""

import dataclasses
import datetime
import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import metric_writers
from etils import epath

import walt_jax
from walt_jax import config as config_lib
from walt_jax.errors import UserError

SCORES = "scores.jsonl"
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """One number and all that it depends on.

    Attributes:
      name: of the metric; `frechet_fixture` where the feature network's weights are stand-ins.
      value: mean over the folds.
      folds: the value of each fold.
      record: JSON values: protocol, counts, features, samples, code.
      step: of the checkpoint; None for folders.
      time: when, UTC.
    """

    name: str
    folds: tuple[float, ...]
    record: Record
    step: int | None = None
    time: str = ""

    @property
    def value(self) -> float:
        return float(np.mean(self.folds))

    @property
    def std(self) -> float:
        """Standard deviation over the folds (divided by their number); 0 of one fold."""
        return float(np.std(self.folds))

    def __str__(self) -> str:
        spread = f" +- {self.std:.4g} over {len(self.folds)} folds" if len(self.folds) > 1 else ""
        return f"{self.name} {self.value:.6g}{spread}"


def identity(record: Record) -> str:
    """A hex digest of a record but for its code: what was measured, not with which version."""
    plain = {k: v for k, v in record.items() if k != "code"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def code() -> Record:
    """The version of this code: package, git commit where there is one, JAX."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):  # no git, or an installed package
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") if git("ls-files", Path(__file__).name) else ""
    changed = bool(commit and git("status", "--porcelain", "--untracked-files=no", "--", str(here)))
    return {
        "version": walt_jax.__version__,
        "commit": commit,
        "changed": changed,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def check_same(ours: Record, theirs: Record, what: str, advice: str) -> None:
    """Refuses two records that differ.

    Raises:
      UserError: naming every field that differs, with both values.
    """
    if diff := config_lib.differences(theirs, _plain(ours)):
        lines = "; ".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in diff.items())
        raise UserError(f"{what} was made in another way ({lines}): {advice}.")


def _plain(record: Record) -> Record:
    """As it comes back from a file: lists for tuples."""
    return json.loads(json.dumps(record))


def append(workdir: str | Path, scores: Sequence[Score]) -> None:
    """Adds lines to `scores.jsonl`; on a local disk several jobs may do so."""
    path = epath.Path(workdir) / SCORES
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = ""
    for score in scores:
        values = dataclasses.asdict(score) | {"value": score.value, "std": score.std}
        lines += json.dumps({"name": score.name, "value": score.value, **values, "time": now})
        lines += "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" not in str(path):
        with open(path, "a+b") as file:
            if file.tell() and (file.seek(-1, 2), file.read())[1] != b"\n":
                lines = "\n" + lines  # a job was killed in the middle of a line
            file.write(lines.encode())  # one write: jobs do not mix their lines
        return
    before = path.read_text() if path.exists() else ""
    if before and before[-1] != "\n":
        before += "\n"  # copied from a disk on which that job was killed
    temporary = path.with_suffix(".tmp")
    temporary.write_text(before + lines)  # whole, since gs:// has no appending
    temporary.replace(path)


def read_scores(path: str | Path) -> list[Score]:
    """The scores of a workdir, or of a `scores.jsonl`, in the order of the file.

    Raises:
      UserError: there is none.
    """
    path = epath.Path(path)
    path = path if path.suffix == ".jsonl" else path / SCORES
    if not path.exists():
        raise UserError(f"{path} does not exist: score a checkpoint first, by walt_jax.evaluate.")
    scores = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
            fields = {f.name: values[f.name] for f in dataclasses.fields(Score)}
            fields["folds"] = tuple(map(float, fields["folds"]))
            scores.append(Score(**fields))
        except (ValueError, KeyError, TypeError):
            continue  # the half of a line that a killed job left
    return scores


def find(workdir: str | Path, record: Record) -> list[Score]:
    """Scores of this very record that the workdir has already."""
    if not (epath.Path(workdir) / SCORES).exists():
        return []
    wanted = identity(_plain(record))
    return [score for score in read_scores(workdir) if identity(score.record) == wanted]


def to_tensorboard(workdir: str | Path, scores: Sequence[Score]) -> None:
    """Adds scores of a run's checkpoints to its TensorBoard, in an events file of their own."""
    folder = epath.Path(workdir) / "tensorboard"
    writer = metric_writers.SummaryWriter(str(folder))
    for score in scores:
        if score.step is not None:
            writer.write_scalars(score.step, scalars([score]))
    writer.flush()
    writer.close()


def scalars(scores: Sequence[Score]) -> Mapping[str, float]:
    """`score/NAME` of each, as TensorBoard and the log call them."""
    return {f"score/{score.name}": score.value for score in scores}
