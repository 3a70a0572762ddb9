"""Real clips through a trained tokenizer and back."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from walt_jax import config as config_lib
from walt_jax.data.pipeline import DataConfig
from walt_jax.evaluation.clips import Clips
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import Layout, MeshConfig, make_mesh
from walt_jax.parallel.sharding import batch_sharding, place, replicated
from walt_jax.tasks import to_uint8, to_unit
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.tokenizers import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Reconstructor:
    """A tokenizer of one checkpoint.

    Attributes:
      tokenizer: encodes and decodes.
      video_shape: frames, height and width that it was trained on; frames may be more.
      fps: of its videos; 0 for any.
      step: the checkpoint's.
      weights: the moving average, always.
      mesh: devices of this process; None for all of it.
    """

    tokenizer: FrozenTokenizer
    video_shape: tuple[int, int, int]
    fps: float
    step: int
    weights: str = "ema"
    mesh: Mesh | None = None

    @classmethod
    def load(
        cls, workdir: str | Path, step: int | None = None, *, mesh: Mesh | None = None
    ) -> "Reconstructor":
        """Loads a tokenizer run's newest checkpoint, or that of `step`.

        Raises:
          UserError: the workdir holds no run of a tokenizer, or no such checkpoint.
        """
        values = config_lib.read_resolved(workdir)
        data = config_lib.build(DataConfig, values["data"], "config.data")
        with Checkpoints(workdir, read_only=True) as checkpoints:
            step = checkpoints.latest if step is None else step
        shape = (data.num_frames, *data.sizes[0])
        return cls(load_tokenizer(workdir, step), shape, data.fps, step, mesh=mesh)

    def stream(
        self, clips: Clips, numbers: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Reconstructions of real clips.

        A clip whose number of frames does not fit is lengthened by its last frame for encoding.
        Each device takes one clip at a time, so that nothing depends on how many there are.

        Yields:
          (numbers (K,), reconstructions and clips, uint8 (K, T, H, W, 3) each).
        """
        mesh = self.mesh or make_mesh(MeshConfig(), jax.local_devices())
        # Its hash is a part of its type: without it the next checkpoint is not compiled again.
        tokenizer = dataclasses.replace(self.tokenizer, hash="")
        weights = place(tokenizer, jax.tree.map(lambda _: replicated(mesh), tokenizer))
        factor = self.tokenizer.config.factors[0]
        for batch, real in clips.batches(numbers, mesh.size, raw=True):
            filled = np.minimum(np.arange(mesh.size), len(batch) - 1)
            missing = -(real.shape[1] - 1) % factor
            frames = np.minimum(np.arange(real.shape[1] + missing), real.shape[1] - 1)
            video = place(real[filled][:, frames], batch_sharding(mesh))
            back = to_uint8(_program(mesh)(weights, video))
            yield batch, back[: len(batch), : real.shape[1]], real


@functools.lru_cache(maxsize=4)
def _program(mesh: Mesh) -> Callable[[FrozenTokenizer, jax.Array], jax.Array]:
    def one(video: jax.Array, tokenizer: FrozenTokenizer) -> jax.Array:
        return tokenizer.decode(tokenizer.encode(to_unit(video)))

    return jax.jit(lambda tokenizer, video: Layout(mesh).by_clip(one, video, tokenizer))
