"""The writers of metrics: TensorBoard, with videos, and JSON lines. It imports TensorFlow."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from clu import metric_writers
from etils import epath
from PIL import Image

from walt_jax.training.metrics import METRICS


def make(folder: epath.Path) -> metric_writers.MetricWriter:
    """Writes to `folder/tensorboard` and `folder/metrics.jsonl`."""
    return metric_writers.MultiWriter(
        [_TensorBoard(str(folder / "tensorboard")), _JsonLines(folder / METRICS)]
    )


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


def _gif(frames: np.ndarray, milliseconds: int = 125) -> bytes:
    images = [Image.fromarray(f) for f in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0
    )
    return buffer.getvalue()
