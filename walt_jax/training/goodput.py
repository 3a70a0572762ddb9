"""Goodput: the share of a run's time that went into steps which count, and what took the rest."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from walt_jax.training.metrics import clock

ALIVE = "alive.json"
KINDS = {
    "step": "training steps that count",
    "data": "waiting for batches",
    "start": "data, weights and state at a start",
    "compile": "compiling",
    "evaluation": "evaluations and previews",
    "checkpoint": "the part of saving that training waits for",
    "lost": "steps since a checkpoint that a crash or a roll-back undid",
    "down": "between an attempt's last sign of life and the next start",
}
_PERIOD = 10.0  # seconds between signs of life, at least


class Goodput:
    """A stopwatch with one hand for each of `KINDS`, over all attempts at a run.

    Attributes:
      spent: wall seconds by kind, as of the last switch.
    """

    def __init__(self, workdir: str | Path, *, writes: bool) -> None:
        """Starts at "start".

        Args:
          workdir: where signs of life are left, so that the next attempt knows when this ended.
          writes: whether this process leaves them.
        """
        self._file, self._writes = epath.Path(workdir) / ALIVE, writes
        self._began = self._mark = time.monotonic()
        self._kind, self._said = "start", -_PERIOD
        self.spent: dict[str, float] = {}
        self._first, self._last = self._before()

    def to(self, kind: str) -> None:
        """From now on time goes to `kind`, one of `KINDS`."""
        now = time.monotonic()
        self.spent[self._kind] = self.spent.get(self._kind, 0.0) + now - self._mark
        self._kind, self._mark = kind, now

    def _before(self) -> tuple[float, float]:
        """When the first attempt began to train, and the last sign of life; Unix times."""
        now = time.time()
        if self._file.exists():
            # Cut off while it was written.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                said = json.loads(self._file.read_text())
                return float(said.get("began", now)), float(said["time"])
        return now, 0.0

    def resume(self, spent: Mapping[str, float], saved_at: float | None = None) -> None:
        """Adds what the attempts before spent, by their newest checkpoint, and what that lost.

        Args:
          spent: of the checkpoint that is gone on from; empty where there was none yet.
          saved_at: Unix time of it; None where there was none yet, and all that the attempts before
            did is lost.
        """
        self.to(self._kind)
        began = time.time() - (time.monotonic() - self._began)
        saved_at = self._first if saved_at is None else saved_at
        last = min(max(saved_at, self._last), began)
        gone = {"lost": max(0.0, last - saved_at), "down": max(0.0, began - last)}
        for before in (spent, gone):
            self._add(before)

    def roll_back(self, spent: Mapping[str, float]) -> None:
        """What this attempt spent since a checkpoint with `spent` is lost."""
        self.to("lost")
        lost = sum(self.spent.values()) - sum(spent.values())
        self.spent = dict(spent)
        self._add({"lost": max(0.0, lost)})

    def _add(self, seconds: Mapping[str, float]) -> None:
        for kind, value in seconds.items():
            self.spent[kind] = self.spent.get(kind, 0.0) + value

    def alive(self, step: int) -> None:
        """Leaves a sign of life, now and then."""
        now = time.monotonic()
        if self._writes and now - self._said >= _PERIOD:
            self._said = now
            # TensorFlow, which writes to gs://, has errors of its own; what matters more is
            # written elsewhere.
            said = {"time": time.time(), "step": step, "began": self._first}
            with contextlib.suppress(Exception):
                self._file.write_text(json.dumps(said) + "\n")

    @property
    def share(self) -> float:
        """Of all time so far, that of steps which count; 0 to 1."""
        total = sum(self.spent.values())
        return self.spent.get("step", 0.0) / total if total else 0.0

    def describe(self) -> str:
        """One line: the share, and every kind that took a hundredth or more, largest first."""
        self.to(self._kind)
        total = sum(self.spent.values())
        rows = sorted(self.spent.items(), key=lambda row: -row[1])
        parts = [
            f"{kind} {clock(seconds)} ({seconds / total:.0%})"
            for kind, seconds in rows
            if seconds >= 0.01 * total
        ]
        return f"goodput {self.share:.0%} of {clock(total)}: {', '.join(parts)}"
