"""Generating videos from a trained denoiser's workdir."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from walt_jax import config as config_lib
from walt_jax.diffusion import Ddim, Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.generation import programs
from walt_jax.generation.sizes import Sizes
from walt_jax.models.text import FrozenText
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import batch_sharding, frozen_shardings, place, replicated
from walt_jax.progress import bar as progress_bar
from walt_jax.tasks import DenoiserTask, Task, Wanted, to_uint8
from walt_jax.tasks.captions import Text
from walt_jax.tasks.denoiser import NONE
from walt_jax.tasks.given import Grid
from walt_jax.training import exports
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.texts import kept_hash, open_text
from walt_jax.training.tokenizers import load_tokenizer

PyTree = Any
Weights = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained denoiser with its tokenizer.

    Attributes:
      task: sizes and schedule.
      params: numpy arrays, or arrays that lie on `mesh`; tokenizer: what decodes.
      label_names: a name a class, may be empty; fps: of the videos.
      step: the checkpoint's.
      weights: which of the checkpoint's `params` are, the moving average or the raw ones.
      mesh: the devices that sample; None for all.
      text: the published encoder that reads prompts, where it is at hand; otherwise it is loaded
        when the first one comes.
      text_hash: which encoder the denoiser was trained with; empty for any.
      images: whether single frames were trained on too.
    """

    task: DenoiserTask
    params: dict = dataclasses.field(repr=False)  # a notebook would show all weights
    tokenizer: FrozenTokenizer = dataclasses.field(repr=False)
    label_names: tuple[str, ...]
    fps: float
    step: int
    weights: Weights = "ema"
    mesh: Mesh | None = None
    text: FrozenText | None = dataclasses.field(default=None, repr=False)
    text_hash: str = ""
    images: bool = False

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        step: int | None = None,
        *,
        weights: Weights = "ema",
        mesh: Mesh | None = None,
    ) -> "Generator":
        """Loads a run's newest checkpoint, or that of `step`, or an export's weights.

        Raises:
          UserError: the folder holds no denoiser, or no such checkpoint.
        """
        values = config_lib.read_resolved(workdir)
        task = config_lib.build(Task, values["task"], "config.task")
        if not isinstance(task, DenoiserTask):
            raise UserError(f"{workdir} is a run of another task: sample from a denoiser's.")
        name = "ema" if weights == "ema" else "params"
        if exports.is_export(workdir):
            about = exports.about_export(workdir)
            if step not in (None, about["step"]) or name != about["part"]:
                raise UserError(
                    f"{workdir} holds {about['part']} of step {about['step']} alone: ask for that, "
                    "or load the run's workdir."
                )
            params, step = exports.read_weights(workdir), about["step"]
        else:
            with Checkpoints(workdir, read_only=True) as checkpoints:
                params = checkpoints.restore_part((name,), step)[name]
                step = checkpoints.restored
        about_file = epath.Path(workdir) / config_lib.DATASET
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
            weights,
            mesh,
            text_hash=kept_hash(workdir),
            images=_has_images(values),
        )

    def placed(self) -> "Generator":
        """The same with its weights on its mesh, where they stay from one call to the next."""
        mesh = self._devices
        with jax.set_mesh(mesh):
            everywhere = jax.tree.map(lambda _: replicated(mesh), self.tokenizer)
            tokenizer = programs.placed(self.tokenizer, everywhere)
            params = programs.placed(self.params, state_shardings(self.params, mesh))
        return dataclasses.replace(self, params=params, tokenizer=tokenizer, mesh=mesh)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """What sizes and lengths can be sampled."""
        return Sizes.of(self.task.model, self.tokenizer.config.factors, self.fps)

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of what is sampled by default."""
        return self.sizes.video_shape

    def encode(self, clips: np.ndarray) -> np.ndarray:
        """Latents, float32 (N, t, h, w, C), of clips, uint8 (N, 1 + ft n, H, W, 3).

        Each clip by itself, so that its latents are the same bits in any company.

        Raises:
          UserError: a number of frames or a size that does not fit the tokenizer.
        """
        tokenizer = jax.device_put(self.tokenizer)
        latents = [jax.device_get(programs.encode(tokenizer, clip[None])) for clip in clips]
        return np.concatenate(latents)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The way back: uint8 (N, T, H, W, 3)."""
        tokenizer = jax.device_put(self.tokenizer)
        return np.concatenate([to_uint8(programs.decode(tokenizer, z[None])) for z in latents])

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

    def texts(self, prompts: Sequence[str]) -> Text:
        """N prompts as `Wanted` takes them: bytes, or a published encoder's embeddings.

        Raises:
          UserError: the model reads no text, a prompt is too long, or the encoder cannot be had.
        """
        if self.task.text is None:
            raise UserError("This model reads no text: leave the prompts out.")
        tokens = self.task.text.tokenize(prompts)
        return tokens if self.task.text.trained else self._encoder.embed(tokens, self._devices)

    @functools.cached_property
    def _encoder(self) -> FrozenText:
        text = self.text or open_text(self.task.text, self.text_hash)
        return programs.placed(text, frozen_shardings({"text": text}, self._devices)["text"])

    @functools.cached_property
    def _devices(self) -> Mesh:
        return self.mesh or make_mesh(MeshConfig())

    def sample(
        self,
        labels: np.ndarray | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
        given: np.ndarray | None = None,
        given_mask: np.ndarray | None = None,
        low: np.ndarray | None = None,
        start: np.ndarray | None = None,
        strength: float = 1.0,
        count: int | None = None,
        grid: Grid | None = None,
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
          negative_prompts: N texts that guidance leads away from, likewise.
          given: float32 (N, T, H, W, C), clean latents, where the model takes such; given_mask:
            bool (N, T, H, W), which of them.
          low: float32 (N, T, h, w, C), low-resolution latents, where the model takes such.
          start: float32 (N, T, H, W, C), clean latents to start from, noised (SDEdit, 2108.01073);
            strength: the share of the process's time to start at, of which the steps are taken.
          count: N, where nothing else says it.
          grid: (T, H, W) of the latents, by default the model's; T = 1 makes images.
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
            negative=None if negative_prompts is None else self.texts(negative_prompts),
            given=given,
            given_mask=given_mask,
            low=low,
            start=start,
        )
        counts = {len(leaf) for leaf in jax.tree.leaves(wanted)} | ({count} if count else set())
        if len(counts) != 1:
            raise UserError(
                f"Sampling needs one number of videos, got {sorted(counts) or 'none'}: labels, "
                "prompts, given, low and start must have one entry a video, or say count."
            )
        total, classes = counts.pop(), self.task.model.num_classes
        grid = tuple(grid or self.task.model.grid)
        wanted.check(self.task.model, grid)
        if labels is not None and not 0 <= np.min(labels) <= np.max(labels) <= classes:
            raise UserError(
                f"The labels go from {np.min(labels)} to {np.max(labels)}, but this model has "
                f"classes 0 to {classes - 1}, and {classes} for none."
            )
        mesh = self._devices
        shards = programs.shards(mesh)
        videos = []
        batches = dataclasses.replace(self, mesh=mesh).stream(
            np.arange(total),
            lambda rows: jax.tree.map(lambda leaf: np.asarray(leaf)[rows], wanted),
            seed=seed,
            sampler=sampler,
            guidance=guidance,
            given_guidance=given_guidance,
            low_noise=low_noise,
            grid=grid,
            strength=strength,
            per_device=-(-min(batch_size, total) // shards),
        )
        with progress_bar(total=total, what="sample", unit="video", disable=not progress) as bar:
            for numbers, batch in batches:
                videos.append(batch)
                bar.update(len(numbers))
        return np.concatenate(videos)

    def stream(
        self,
        numbers: np.ndarray,
        wanted: Callable[[np.ndarray], Wanted],
        *,
        seed: int = 0,
        sampler: Sampler = Ddim(),  # noqa: B008
        guidance: Scale = NONE,
        given_guidance: Scale = NONE,
        low_noise: float | None = None,
        grid: Grid | None = None,
        strength: float = 1.0,
        decode: bool = True,
        per_device: int = 1,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Any of the videos of a seed, batch by batch, with constant memory.

        On a mesh of data alone a device works on `per_device` videos by itself, always, so that a
        video is the same bits on any number of devices and in whatever company.

        Args:
          numbers: int (N,), which videos.
          wanted: what videos of given numbers (B,) are to show; asked for a batch at a time.
          decode: give pixels, not latents.
          per_device: videos at a time on each device.
          The others are those of `sample`.

        Yields:
          (numbers (K,), uint8 videos (K, T, H, W, 3)), of every batch those that lie on this
          process; with a mesh of this process alone, all of them. Without `decode` float32 latents
          (K, t, h, w, C).
        """
        ready = self.placed()
        mesh, params, tokenizer = ready.mesh, ready.params, ready.tokenizer
        size = per_device * programs.shards(mesh)
        grid = grid or self.task.model.grid
        run = programs.program(
            self.task, mesh, sampler, guidance, given_guidance, low_noise, grid, strength, decode
        )
        with jax.set_mesh(mesh):
            key = place(np.asarray(seed, np.uint32), replicated(mesh))

        def start(first: int) -> jax.Array:
            filled = np.minimum(np.arange(first, first + size), len(numbers) - 1)
            rows = np.asarray(numbers, np.int32)[filled]  # the last batch is filled up
            inputs = jax.tree.map(np.asarray, (wanted(rows), rows))
            with jax.set_mesh(mesh):
                inputs = place(inputs, jax.tree.map(lambda _: batch_sharding(mesh), inputs))
                return run(params, tokenizer, *inputs, key)

        def finish(first: int, videos: jax.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            rows, values = programs.mine(videos)
            new = rows < len(numbers) - first
            if new.any():
                found = to_uint8(values[new]) if decode else values[new]
                yield np.asarray(numbers)[first + rows[new]], found

        # In pairs, so that the devices have the next batch while this one is looked at.
        before: tuple[int, jax.Array] | None = None
        for first in range(0, len(numbers), size):
            now = first, start(first)
            if before is not None:
                yield from finish(*before)
            before = now
        if before is not None:
            yield from finish(*before)


def _has_images(values: Mapping[str, Any]) -> bool:
    """Whether a run, by its resolved config, trains on single frames."""
    data = values["data"]
    table = (data.get("buckets") or {}).get("table", ())
    lengths = [data.get("num_frames"), *(bucket["num_frames"] for bucket in table)]
    return bool(values.get("images")) or 1 in lengths or values["task"]["model"]["grid"][0] == 1
