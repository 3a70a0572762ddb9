"""Where metrics go: TensorBoard, `metrics.jsonl`, and a line with the time left."""

import json
import logging
import sys
import time
import typing
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epath

if typing.TYPE_CHECKING:
    from clu import metric_writers

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"

# Dense matrix peaks of one JAX device in bf16, FLOP/s, by the start of `device_kind`.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The device's peak in bf16, None where it is not known (CPUs)."""
    return next((v for k, v in _PEAKS.items() if device_kind.startswith(k)), None)


def make_writer(workdir: str | Path) -> "metric_writers.MetricWriter":
    """Writes scalars to TensorBoard and JSON lines, uint8 (N, T, H, W, 3) to TensorBoard."""
    # clu imports TensorFlow, which takes longer than all else at a start: the one process that
    # writes imports it.
    from walt_jax.training import writers

    return writers.make(epath.Path(workdir))


def close(writer: "metric_writers.MetricWriter | None") -> None:
    """Writes out what is left; what ends the run tells more than a failure of this would."""
    if writer is None:
        return
    try:
        writer.flush()
        writer.close()
    except Exception as e:  # TensorFlow's own kinds
        logger.warning("the last metrics are lost: %s", e)


def read_metrics(workdir: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The history of one scalar: steps and values, the last value of a step."""
    text = (epath.Path(workdir) / METRICS).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    history = {row["step"]: row[name] for row in rows if name in row}
    steps = sorted(history)
    return np.array(steps, int), np.array([history[s] for s in steps], float)


class ProgressLine:
    """A line with speed and time left: rewritten on a terminal, a line a call elsewhere."""

    def __init__(self, what: str, total: int, start: int, *, enabled: bool) -> None:
        self._what, self._total, self._start, self._enabled = what, total, start, enabled
        self._began = time.monotonic()

    def __call__(self, step: int, rates: Mapping[str, float], values: Mapping[str, float]) -> None:
        """Shows `what step/total (share)`, rates, values, and the time left."""
        if not self._enabled:
            return
        rates = {k: v for k, v in rates.items() if k != "clips/s/chip"}  # in the files
        done = step - self._start
        elapsed = time.monotonic() - self._began
        left = (self._total - step) * elapsed / max(done, 1)
        shares = {k: f"{100 * v:.2g} %" for k, v in rates.items() if k == "input wait"}
        texts = shown(values) + [f"{shares.get(k, f'{v:.3g}')} {k}" for k, v in rates.items()]
        line = f"{self._what} {step}/{self._total}  {'  '.join(texts)}  {clock(left)} left"
        end = "\r" if sys.stderr.isatty() and step < self._total else "\n"
        print(line, end=end, file=sys.stderr, flush=True)


def shown(values: Mapping[str, float]) -> list[str]:
    """`name value` of each that belongs into a line: parts of a metric (`grad_norm/encoder`) and
    details (`image/mse`) are for TensorBoard."""
    split = {k.removeprefix("eval/"): v for k, v in values.items()}
    return [f"{k} {v:.4g}" for k, v in split.items() if "/" not in k]


def clock(seconds: float) -> str:
    """`1h02m`, `3m05s` or `7s`."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
