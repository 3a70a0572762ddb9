"""What is trained: the interface between a task and the one loop."""

import abc
from typing import Any, ClassVar

import jax
import numpy as np

from walt_jax.data.joint import IMAGES
from walt_jax.data.records import Dataset
from walt_jax.models import Network
from walt_jax.models.text import FrozenTextConfig
from walt_jax.parallel import Layout

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(abc.ABC):
    """A frozen dataclass of sizes and weights, with pure functions of arrays.

    Everything but `prepare` is traced. Losses and metrics are means over the batch in float32.
    """

    registry: ClassVar[dict[str, type["Task"]]] = {}
    keeps_statistics: ClassVar[bool] = False  # of the moving average

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Task.registry[name] = cls

    @property
    @abc.abstractmethod
    def network(self) -> Network:
        """The network whose parameters are trained."""

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters: a dict of sub-networks."""
        return self.network.init(key)

    def given_params(self) -> PyTree:
        """Sub-networks that a fresh run takes from another one instead of `init`, on the host.

        Raises:
          UserError: the other run does not fit.
        """
        return {}

    @property
    def text_encoder(self) -> FrozenTextConfig | None:
        """The published encoder that reads captions, where there is one."""
        return None

    @property
    def starts(self) -> dict[str, int]:
        """Sub-networks without a gradient before some step: name -> that step."""
        return {}

    def prepare(self, workdir: str, *datasets: Dataset) -> PyTree:
        """Loads what stays fixed in training (a tokenizer, say), on the host.

        Args:
          workdir: of the run.
          datasets: the videos and, where the run has them, the images.

        Raises:
          UserError: a dataset or what is loaded does not fit the task.
        """
        del workdir, datasets
        return {}

    def stand_in(self) -> PyTree:
        """ShapeDtypeStructs of what `prepare` would load, without any file or dataset."""
        return {}

    def keep(self, frozen: PyTree, workdir: str) -> None:
        """Puts what `prepare` gave into the workdir, once the run can start, where it must stay."""
        del frozen, workdir

    def init_extra(self) -> PyTree:
        """Statistics kept in the state beside the parameters."""
        return {}

    def plain(self) -> "Task":
        """The task as its model FLOPs are counted: without recomputation and regularisers."""
        return self

    @abc.abstractmethod
    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
        layout: Layout,
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        """The scalar to descend, the metrics, and the next `extra`."""

    @abc.abstractmethod
    def evaluate(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> Metrics:
        """Metrics on held-out clips, a value a clip (B,), so that any batch gives one mean."""

    def statistics(self, params: PyTree, batch: Batch, layout: Layout) -> PyTree:
        """What of `extra` describes the moving average, `params`, by a batch of held-out clips.

        Only where `keeps_statistics`: a checkpoint holds the mean over an evaluation's batches.
        """
        return {}

    @abc.abstractmethod
    def preview(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> jax.Array:
        """Videos to look at in TensorBoard, float32 (N, T, H, W, 3) in [-1, 1]."""


def to_unit(pixels: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]; anything else is a mistake of the caller."""
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels come as uint8 in 0..255, got {pixels.dtype}.")
    return pixels.astype(np.float32) / 127.5 - 1.0


def to_uint8(pixels: np.ndarray | jax.Array) -> np.ndarray:
    """float pixels in [-1, 1] (values outside are clipped) to uint8, on the host."""
    pixels = np.asarray(pixels, np.float32)
    return np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8)


def shrink(video: jax.Array, factor: tuple[int, int, int]) -> jax.Array:
    """Pixels (B, T, H, W, 3) averaged over blocks of (fh, fw)."""
    b, t, h, w, c = video.shape
    _, fh, fw = factor
    return video.reshape(b, t, h // fh, fh, w // fw, fw, c).mean((3, 5))


def images_of(batch: Batch) -> Batch:
    """The images beside a batch's videos, as a batch of clips of one frame; empty without any."""
    return {k.removeprefix(IMAGES): v for k, v in batch.items() if k.startswith(IMAGES)}


def sample_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """A key for each row, so that what a row draws depends on no other row and on no mesh."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(np.arange(batch_size))


def fold(keys: jax.Array, data: int) -> jax.Array:
    """Keys (B,) for one of several draws of each row."""
    return jax.vmap(lambda k: jax.random.fold_in(k, data))(keys)


def uniform(keys: jax.Array, data: int) -> jax.Array:
    """One of several draws of each row, in [0, 1): float32 (B,)."""
    return jax.vmap(jax.random.uniform)(fold(keys, data))
