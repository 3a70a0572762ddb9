"""A trained model for people: what `walt_jax.load` returns."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from walt_jax import config as config_lib
from walt_jax.diffusion import Constant, Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.generation.generator import Generator, Weights
from walt_jax.generation.requests import Direction, Request
from walt_jax.generation.sources import Source, read_source, size_of
from walt_jax.generation.tasks import TASKS
from walt_jax.tasks.denoiser import NONE

ASSETS = Path(__file__).resolve().parent.parent / "assets"
Texts = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Walt:
    """A denoiser with its tokenizer, and all tasks by one method.

    Videos are uint8 (T, H, W, 3) RGB with the number of the video first where there are several, as
    `mediapy.show_videos(walt.sample(num=4), fps=walt.fps)` takes them.

    Attributes:
      generator: what samples arrays.
    """

    generator: Generator

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        step: int | None = None,
        weights: Weights = "ema",
        mesh: Mesh | None = None,
    ) -> "Walt":
        """Loads a model.

        Args:
          source: a run's workdir, a folder of `walt_jax.export` (local or gs://), or the name of a
            model that comes with the package.
          step: of the checkpoint, the newest by default.
          weights: the moving average or the raw ones.
          mesh: the devices that sample; None for all, each with a part of the batch.

        Raises:
          UserError: there is no such model.
        """
        return cls(Generator.load(find(source), step, weights=weights, mesh=mesh).placed())

    @property
    def step(self) -> int:
        """Updates that the checkpoint had."""
        return self.generator.step

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self.generator.fps

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return self.generator.video_shape

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, may be empty."""
        return self.generator.label_names

    def encode(self, video: Source) -> np.ndarray:
        """A video's latents.

        Args:
          video: a file, scaled and cropped to the model's size, at its rate, and cut to a length
            that the tokenizer takes; or uint8 (T, H, W, 3), or several, (N, T, H, W, 3), of a
            fitting size and length.

        Returns:
          float32 (t, h, w, C), or (N, t, h, w, C): of zero mean and unit variance a channel.

        Raises:
          UserError: it cannot be read, or its size or length does not fit.
        """
        if isinstance(video, np.ndarray) and video.ndim == 5:
            return np.stack([self.encode(clip) for clip in video])
        if isinstance(video, np.ndarray):
            clip = read_source(video, self.fps, size_of(video))
        else:
            clip = read_source(video, self.fps, self.video_shape[1:])
            clip = clip[: self.generator.sizes.fitting(len(clip))]
        return self.generator.encode(clip[None])[0]

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (t, h, w, C), or several, to uint8 (T, H, W, 3), or several.

        Raises:
          UserError: they have another form.
        """
        latents, channels = np.asarray(latents), self.generator.task.model.latent_channels
        if latents.ndim not in (4, 5) or latents.shape[-1] != channels or not latents.size:
            raise UserError(
                f"Latents of this model are (t, h, w, {channels}), or several, got "
                f"{latents.shape}: give what encode returns, or of that form."
            )
        several = latents.ndim == 5
        videos = self.generator.decode(latents if several else latents[None])
        return videos if several else videos[0]

    def request(
        self,
        prompt: Texts | None = None,
        *,
        task: str = "text_to_video",
        label: str | int | Sequence[str | int] | None = None,
        negative_prompt: Texts | None = None,
        num: int | None = None,
        image: Source | Sequence[Source] | None = None,
        video: Source | Sequence[Source] | None = None,
        mask: Any = None,
        size: str | Sequence[int] | None = None,
        seconds: float | None = None,
        direction: Direction | None = None,
        strength: float | None = None,
        scheme: str | None = None,
        seed: int = 0,
        guidance: float | Scale | None = None,
        given_guidance: float | Scale | None = None,
        sampler: str | Sampler | None = None,
        steps: int = 50,
        batch_size: int = 16,
        progress: bool = True,
    ) -> Request:
        """What `sample` is asked for, with the same arguments; nothing is sampled yet."""
        if task not in TASKS:
            raise UserError(f"There is no task {task!r}: choose one of {', '.join(TASKS)}.")
        _check_numbers(seed, seconds, {"num": num, "steps": steps, "batch_size": batch_size})
        guidance, given_guidance = map(_scale, (guidance, given_guidance))
        sources = (*_listed(image), *_listed(video))
        read = {"seconds": seconds, "mask": mask, "direction": direction, "strength": strength}
        read["scheme"] = scheme
        _check_reads(task, len(sources), read)
        if strength is not None and not 0 < strength <= 1:
            raise UserError(f"strength lies above 0 and up to 1, got {strength:g}.")
        if direction not in (None, "forward", "backward"):
            raise UserError(f"direction is forward or backward, got {direction!r}.")
        generator, model = self.generator, self.generator.task.model
        if model.upsampling is not None:
            raise UserError(
                "This model makes clips larger and none of its own: sample from a base model, and "
                "name this one as its cascade."
            )
        like = size_of(sources[0]) if sources and task != "outpaint" else None
        pictures = len(sources) if task == "image_to_video" else 0
        prompts, negatives, labels = _listed(prompt), _listed(negative_prompt), _listed(label)
        said = max(len(prompts), len(labels), len(negatives), pictures, 1)
        count = num or said
        if (negatives or prompts) and generator.task.text is None:
            raise UserError("This model reads no text: leave the prompts out.")
        if labels and not model.num_classes:
            raise UserError("This model has no classes: leave the labels out.")
        if guidance != NONE and not (model.num_classes or model.text_features):
            raise UserError("This model has no classes and reads no text: leave guidance out.")
        options = {
            "sampler": self._sampler(sampler, steps),
            "guidance": guidance,
            "given_guidance": given_guidance,
            "batch_size": batch_size,
            "progress": progress,
        }
        return Request(
            generator,
            task,
            count,
            generator.sizes.frames(None if task in ("extend", "long") else seconds),
            generator.sizes.size(size, like),
            self._labels(labels, count),
            _turns(prompts or [""], count) if generator.task.text is not None else None,
            _turns(negatives, count) if negatives else None,
            sources,
            mask,
            seconds,
            direction or "forward",
            0.6 if strength is None else strength,
            scheme or "frame_prediction",
            seed,
            options,
        )

    def sample(
        self, prompt: Texts | None = None, *, fps: float | None = None, **wishes: Any
    ) -> np.ndarray:
        """Samples videos of a task (`walt_jax.generation.tasks`; docs/sampling.md has them all).

        Video i depends on the seed, on i and on what is asked of it, not on the batch or the mesh.

        Args:
          prompt: a text or several, where the model reads text.
          fps: frames a second of what is returned: the model's, or a part of it, for which frames
            are left out.
          task: text_to_video, text_to_image, image_to_video, extend, long, interpolate, connect,
            loop, inpaint, outpaint or edit.
          label: a class's name or number, or several, where the model has classes; by default all
            in turn.
          negative_prompt: what not to show, in place of nothing said; one, or one a video.
          num: how many videos; by default one a prompt, label or picture. These take turns.
          image, video: a file or array (uint8), or several.
          mask: for inpaint and outpaint: a box, (top, left, bottom, right) as shares of the frame,
            or a picture, white where to paint.
          size: `9:16@256`, `HEIGHTxWIDTH`, (height, width) or a side, where the model admits
            others than its own; by default that of the video's aspect.
          seconds: of a clip, where the model admits others; for extend, what is added; of a long
            video, a minute by default.
          direction: of extend, "forward" or "backward".
          strength: of edit, the share of the process's time to start at; 0.6 by default.
          scheme: of long, in which order frames come about: frame_prediction, autoregressive,
            long_range, hierarchy2, hierarchy3 or adaptive (`walt_jax.tasks.plans`).
          seed: of the noise.
          guidance: strength of classifier-free guidance by class and text, or a schedule of it;
            given_guidance: by what is given.
          sampler: a name, by default the config's, of so many steps, 50 by default; or a `Sampler`.
          batch_size: videos at a time, over all devices.
          progress: show a progress bar.

        Returns:
          uint8 (N, T, H, W, 3).

        Raises:
          UserError: something does not fit, or the checkpoint was not trained for the task.
        """
        every = self.generator.sizes.every(fps)
        request = self.request(prompt, **wishes)
        return TASKS[request.task].make(request)[:, ::every]

    def _labels(self, labels: Sequence[str | int], count: int) -> np.ndarray | None:
        classes = self.generator.task.model.num_classes
        if not classes:
            return None
        chosen = np.arange(classes, dtype=np.int32)
        if labels:
            chosen = self.generator.labels([str(label) for label in labels])
        return np.resize(chosen, count)

    def _sampler(self, sampler: str | Sampler | None, steps: int) -> Sampler:
        if isinstance(sampler, Sampler):
            return sampler
        own = self.generator.task.sampler
        if sampler in (None, own.name):
            return dataclasses.replace(own, num_steps=steps)
        if sampler not in Sampler.registry:
            known = ", ".join(sorted(Sampler.registry))
            raise UserError(f"There is no sampler {sampler!r}: choose one of {known}.")
        return Sampler.registry[sampler](num_steps=steps)


def _check_numbers(seed: int, seconds: float | None, counts: Mapping[str, int | None]) -> None:
    for name, number in counts.items():
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, got {number}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must lie in 0 to {2**32 - 1}, got {seed}.")
    if seconds is not None and not 0 < seconds < math.inf:
        raise UserError(f"A video lasts longer than 0 seconds, and not for ever: got {seconds:g}.")


def _scale(said: float | Scale | None) -> Scale:
    scale = Constant(float(said)) if isinstance(said, int | float) else said or NONE
    if not math.isfinite(scale.scale):
        raise UserError(f"A strength of guidance is a number such as 3, got {scale.scale}.")
    return scale


def packaged() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(f.parent.name for f in ASSETS.glob(f"*/{config_lib.RESOLVED}"))


def find(source: str | Path) -> epath.Path:
    """The folder of a run, an export or a packaged model.

    Raises:
      UserError: there is none, or a bucket cannot be reached.
    """
    for folder in (epath.Path(source), epath.Path(ASSETS / str(source))):
        try:
            there = (folder / config_lib.RESOLVED).exists()
        except Exception as e:  # storage libraries have errors of their own
            reason = str(e).partition("\n")[0]
            raise UserError(
                f"{source} cannot be reached ({reason}): see to the network and to your rights, or "
                "copy the folder to this machine."
            ) from e
        if there:
            return folder
    known = ", ".join(packaged()) or "there is none"
    raise UserError(
        f"{source} holds no run and no export (no {config_lib.RESOLVED}), and no model that comes "
        f"with walt_jax has this name ({known}): give a --workdir of train, or a folder of export."
    )


def _check_reads(task: str, sources: int, read: dict[str, Any]) -> None:
    least, most = TASKS[task].sources
    if sources < least or (most is not None and sources > most):
        takes = f"{least} or more" if most is None else " or ".join({f"{least}": 0, f"{most}": 0})
        raise UserError(
            f"The task {task} takes {takes} of image and video together, got {sources}."
        )
    for name, value in read.items():
        if value is not None and name not in TASKS[task].reads:
            known = ", ".join(t.name for t in TASKS.values() if name in t.reads)
            raise UserError(f"The task {task} reads no {name}: leave it out, or take {known}.")


def _listed(value: Any) -> list[Any]:
    """One thing, several, or none, as a list; an array is one thing."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _turns(texts: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(texts[i % len(texts)] for i in range(count))
