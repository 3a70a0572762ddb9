"""Where metrics go: TensorBoard, `metrics.jsonl`, and a line with the time left."""

import io
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from clu import metric_writers
from etils import epath
from PIL import Image

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


class _TensorBoard(metric_writers.SummaryWriter):
    """clu's writer, which leaves videos out, with videos as GIFs (TensorBoard plays them)."""

    def write_videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
        with self._summary_writer.as_default():
            for name, video in videos.items():
                frames = np.concatenate(list(video), axis=1)  # the clips in a column
                gif = tf.compat.v1.Summary.Image(
                    height=frames.shape[1],
                    width=frames.shape[2],
                    colorspace=3,
                    encoded_image_string=_gif(frames),
                )
                summary = tf.compat.v1.Summary(
                    value=[tf.compat.v1.Summary.Value(tag=name, image=gif)]
                )
                tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step)


class _JsonLines(metric_writers.LoggingWriter):
    """One line of JSON a call, for plots and scripts; scalars only."""

    def __init__(self, path: epath.Path) -> None:
        super().__init__()
        self._path = path
        self._lines = path.read_text() if path.exists() else ""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        values = {k: float(v) for k, v in scalars.items()}
        self._lines += json.dumps({"step": step, **values}) + "\n"
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(self._lines)  # whole, since gs:// has no appending
        temporary.replace(self._path)

    def write_videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
        del step, videos

    def flush(self) -> None:
        pass


def make_writer(workdir: str | Path) -> metric_writers.MetricWriter:
    """Writes scalars to TensorBoard and JSON lines, uint8 (N, T, H, W, 3) to TensorBoard."""
    folder = epath.Path(workdir)
    return metric_writers.MultiWriter(
        [_TensorBoard(str(folder / "tensorboard")), _JsonLines(folder / METRICS)]
    )


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


def _gif(frames: np.ndarray, milliseconds: int = 125) -> bytes:
    images = [Image.fromarray(f) for f in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0
    )
    return buffer.getvalue()
