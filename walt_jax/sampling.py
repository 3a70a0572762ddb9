"""Generating videos from a trained denoiser's workdir."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.parallel import Layout, MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import batch_sharding, place, replicated
from walt_jax.progress import bar as progress_bar
from walt_jax.tasks import DenoiserTask, Task, to_uint8
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.loop import DATASET
from walt_jax.training.tokenizers import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained denoiser (its moving average) with its tokenizer.

    Attributes:
      task: sizes and schedule.
      params: numpy arrays; tokenizer: what decodes.
      label_names: a name a class, may be empty; fps: of the videos.
      step: the checkpoint's.
    """

    task: DenoiserTask
    params: dict
    tokenizer: object
    label_names: tuple[str, ...]
    fps: float
    step: int

    @classmethod
    def load(cls, workdir: str | Path, step: int | None = None) -> "Generator":
        """Loads a run's newest checkpoint, or that of `step`.

        Raises:
          UserError: the workdir holds no run of a denoiser, or no such checkpoint.
        """
        values = config_lib.read_resolved(workdir)
        task = config_lib.build(Task, values["task"], "config.task")
        if not isinstance(task, DenoiserTask):
            raise UserError(f"{workdir} is a run of another task: sample from a denoiser's.")
        with Checkpoints(workdir, read_only=True) as checkpoints:
            step = checkpoints.latest if step is None else step
            params = checkpoints.restore_part(("ema",), step)["ema"]
        about_file = epath.Path(workdir) / DATASET
        if not about_file.exists():
            raise UserError(f"{about_file} is missing: copy the whole workdir of the training.")
        about = json.loads(about_file.read_text())
        return cls(
            task,
            params,
            load_tokenizer(workdir),
            tuple(about["label_names"]),
            about["fps"],
            step,
        )

    def labels(self, names: Sequence[str]) -> np.ndarray:
        """Class indices of names or numbers, int32.

        Raises:
          UserError: no such class; the sentence names some that there are.
        """
        classes = self.task.model.num_classes
        known = {str(i): i for i in range(classes)}
        known |= {name: i for i, name in enumerate(self.label_names[:classes])}
        for name in names:
            if name not in known:
                some = (
                    ", ".join(repr(n) for n in list(self.label_names[:8] or known)[:8])
                    or "none: it is unconditional"
                )
                raise UserError(f"No class {name!r} in this model; it has {some} ...")
        return np.array([known[n] for n in names], np.int32)

    def name(self, label: int) -> str:
        """A class's name."""
        return self.label_names[label] if label < len(self.label_names) else str(label)

    def sample(
        self,
        labels: np.ndarray,
        *,
        seed: int = 0,
        num_steps: int = 50,
        guidance: float = 1.0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> np.ndarray:
        """One video for each label, over all devices.

        Video i depends on (seed, i) and its label only, whatever the batch.

        Args:
          labels: int32 (N,), classes; `num_classes` for no class.
          seed: of the noise.
          num_steps: DDIM steps.
          guidance: scale of classifier-free guidance; 1 is none.
          batch_size: videos at a time, rounded up to the devices.
          progress: show a progress bar.

        Returns:
          uint8 (N, T, H, W, 3).
        """
        mesh = make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            devices, total = mesh.devices.size, len(labels)
            batch_size = -(-min(batch_size, total) // devices) * devices
            params = place(self.params, state_shardings(self.params, mesh))
            tokenizer = place(
                self.tokenizer, jax.tree.map(lambda _: replicated(mesh), self.tokenizer)
            )

            @jax.jit
            def run(
                params: dict, tokenizer: object, label: jax.Array, rows: jax.Array
            ) -> jax.Array:
                keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(rows)
                return self.task.sample(
                    params, tokenizer, label, keys, num_steps, guidance, Layout(mesh)
                )

            videos = []
            bar = progress_bar(total=total, what="sample", unit="video", disable=not progress)
            for start in range(0, total, batch_size):
                rows = np.arange(start, start + batch_size)
                label = labels[np.minimum(rows, total - 1)]  # the last batch is filled up
                inputs = place((label, rows), (batch_sharding(mesh),) * 2)
                videos.append(to_uint8(run(params, tokenizer, *inputs)))
                bar.update(min(batch_size, total - start))
            bar.close()
        return np.concatenate(videos)[:total]
