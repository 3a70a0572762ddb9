"""Generating videos from a trained denoiser's workdir."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

from walt_jax import config as config_lib
from walt_jax.diffusion import Ddim, Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.models.text import to_bytes
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import Layout, MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import batch_sharding, place, replicated
from walt_jax.progress import bar as progress_bar
from walt_jax.tasks import DenoiserTask, Task, Wanted, to_uint8
from walt_jax.tasks.denoiser import NONE
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
    tokenizer: FrozenTokenizer
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
            params = checkpoints.restore_part(("ema",), step)["ema"]
            step = checkpoints.restored
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

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts as bytes, uint8 (N, M).

        Raises:
          UserError: the model reads no text, or a prompt is too long.
        """
        if self.task.text is None:
            raise UserError("This model reads no text: leave the prompts out.")
        longest = self.task.text.max_bytes
        for prompt in prompts:
            if len(prompt.encode()) > longest:
                raise UserError(
                    f"The prompt {prompt[:40]!r}... has {len(prompt.encode())} bytes, this model "
                    f"reads {longest}: make it shorter."
                )
        return np.stack([to_bytes(prompt, longest) for prompt in prompts])

    def sample(
        self,
        labels: np.ndarray | None = None,
        *,
        prompts: Sequence[str] | None = None,
        given: np.ndarray | None = None,
        given_mask: np.ndarray | None = None,
        low: np.ndarray | None = None,
        count: int | None = None,
        image: bool = False,
        seed: int = 0,
        sampler: Sampler = Ddim(),  # noqa: B008
        guidance: Scale = NONE,
        given_guidance: Scale = NONE,
        low_noise: float | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> np.ndarray:
        """N videos, over all devices.

        Video i depends on (seed, i) and what is wanted of it only, whatever the batch.

        Args:
          labels: int32 (N,), classes, where the model has some; `num_classes` for no class.
          prompts: N texts, where the model reads text; "" for none.
          given: float32 (N, T, H, W, C), clean latents, where the model takes such; given_mask:
            bool (N, T, H, W), which of them.
          low: float32 (N, T, h, w, C), low-resolution latents, where the model takes such.
          count: N, where nothing else says it.
          image: one frame instead of all.
          seed: of the noise.
          sampler: with its number of steps.
          guidance: strength of classifier-free guidance by class and text.
          given_guidance: by the given latents, likewise.
          low_noise: time of the noise on `low`, a share of the process's; by default 0.05, or what
            training had at most.
          batch_size: videos at a time, rounded up to the devices.
          progress: show a progress bar.

        Returns:
          uint8 (N, T, H, W, 3).

        Raises:
          UserError: what is wanted, or the sampler, does not fit the model.
        """
        sampler.check(self.task.diffusion)
        wanted = Wanted(
            label=labels,
            text=None if prompts is None else self.texts(prompts),
            given=given,
            given_mask=given_mask,
            low=low,
        )
        counts = {len(leaf) for leaf in jax.tree.leaves(wanted)} | ({count} if count else set())
        if len(counts) != 1:
            raise UserError(
                f"Sampling needs one number of videos, got {sorted(counts) or 'none'}: labels, "
                "prompts, given and low must have one entry a video, or say count."
            )
        total, classes = counts.pop(), self.task.model.num_classes
        wanted.check(self.task.model)
        if labels is not None and not 0 <= np.min(labels) <= np.max(labels) <= classes:
            raise UserError(
                f"The labels go from {np.min(labels)} to {np.max(labels)}, but this model has "
                f"classes 0 to {classes - 1}, and {classes} for none."
            )
        mesh = make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            devices = mesh.devices.size
            batch_size = -(-min(batch_size, total) // devices) * devices
            params = place(self.params, state_shardings(self.params, mesh))
            tokenizer = place(
                self.tokenizer, jax.tree.map(lambda _: replicated(mesh), self.tokenizer)
            )

            @jax.jit
            def run(
                params: dict, tokenizer: FrozenTokenizer, wanted: Wanted, rows: jax.Array
            ) -> jax.Array:
                return self.task.sample(
                    params,
                    tokenizer,
                    wanted,
                    jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(rows),
                    sampler,
                    guidance,
                    given_guidance=given_guidance,
                    low_noise=low_noise,
                    image=image,
                    layout=Layout(mesh),
                )

            videos = []
            bar = progress_bar(total=total, what="sample", unit="video", disable=not progress)
            for start in range(0, total, batch_size):
                rows = np.arange(start, start + batch_size)
                filled = np.minimum(rows, total - 1)  # the last batch is filled up
                inputs = jax.tree.map(lambda leaf, filled=filled: leaf[filled], wanted), rows
                inputs = place(inputs, jax.tree.map(lambda _: batch_sharding(mesh), inputs))
                videos.append(to_uint8(run(params, tokenizer, *inputs)))
                bar.update(min(batch_size, total - start))
            bar.close()
        return np.concatenate(videos)[:total]
