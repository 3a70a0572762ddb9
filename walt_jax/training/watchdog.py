"""The watchdog: a job that hangs ends, and says which process it waited for."""

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable

import jax

from walt_jax.errors import EXIT_HUNG
from walt_jax.parallel.distributed import Board

logger = logging.getLogger(__name__)
_PERIOD = 5.0  # seconds between looks, at most


class Watchdog:
    """Ends the process when `beat` was not called for a time; a context manager.

    Processes show each other where they are, so that the one that hangs is named by the others,
    which wait for it in a collective.
    """

    def __init__(self, seconds: float, leave: Callable[[int], None] = os._exit) -> None:
        """`seconds` without a beat before it calls `leave(EXIT_HUNG)`; 0 turns it off."""
        self._seconds, self._leave = seconds, leave
        self._board = Board("walt_jax/watchdog")
        self._place, self._mark = (0, "start"), time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._mark = time.monotonic()
            # Two, for showing waits where the process that runs the service hangs.
            for work in (self._watch, self._show):
                threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, step: int, doing: str) -> None:
        """This process is alive: it begins `doing` (data, step, ...) after `step` updates."""
        self._place, self._mark = (step, doing), time.monotonic()

    def rest(self, doing: str) -> None:
        """What this process begins may take any time, such as compiling; the next beat ends it."""
        self._place, self._mark = (self._place[0], doing), math.inf

    def alive(self) -> None:
        """What it does takes long, but goes on."""
        self._mark = time.monotonic()

    def _show(self) -> None:
        while not self._ended.wait(min(_PERIOD, self._seconds / 4)):
            step, doing = self._place
            self._board.put(f"{step} {doing}")

    def _watch(self) -> None:
        while not self._ended.wait(min(_PERIOD, self._seconds / 4)):
            if time.monotonic() - self._mark > self._seconds:
                logger.error("error: %s", self._sentence())
                faulthandler.dump_traceback(all_threads=True, file=sys.stderr)
                sys.stderr.flush()
                self._leave(EXIT_HUNG)
                return

    def _sentence(self) -> str:
        step, doing = self._place
        sentence = (
            f"Process {jax.process_index()} got nothing done for {self._seconds:g} s (config.guard."
            f"hang_seconds) in {doing!r} after step {step}"
        )
        rows = {p: word.split(" ", 1) for p, word in self._board.read().items()}
        least = min((int(row[0]) for row in rows.values()), default=step)
        behind = {p: row[1] for p, row in rows.items() if int(row[0]) == least}
        # All wait in the same step: those that are elsewhere in it keep the others waiting.
        apart = {p: place for p, place in behind.items() if place != "step"} or behind
        if len(rows) > 1:
            told = ", ".join(f"process {p} in {place!r}" for p, place in sorted(apart.items()))
            sentence += f"; furthest behind: {told} after step {least}"
        silent = sorted(set(range(jax.process_count())) - rows.keys())
        if not rows:
            sentence += "; process 0, which knows where the others are, does not answer"
        elif silent:
            sentence += f"; never heard of: {', '.join(map(str, silent))}"
        return f"{sentence}. The job ends; the same command goes on from the newest checkpoint."
