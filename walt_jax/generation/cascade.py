"""A cascade: a base model's clips, made larger by super-resolution (2312.06662, sections 3.5, 5.3).

Each stage after the first is told the latents of the clip before it, with a little noise on them:
training adds noise of a random strength, up to `config.task.low_noise`, so that the mistakes of the
stage before do not matter (noise augmentation, 2106.15282). Where two stages share a tokenizer the
latents go on as they are; otherwise the clip is decoded and encoded again.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from walt_jax.diffusion import Ddim, Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.generation.generator import Generator
from walt_jax.generation.requests import Request
from walt_jax.generation.tasks import TASKS
from walt_jax.generation.walt import find
from walt_jax.parallel.mesh import MeshConfig, make_mesh
from walt_jax.progress import bar as progress_bar
from walt_jax.tasks import Wanted
from walt_jax.tasks.denoiser import NONE

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Generators one after the other, the first a base model.

    Attributes:
      stages: base, first super-resolution, second ...; all on one mesh.
    """

    stages: tuple[Generator, ...]

    def __post_init__(self) -> None:
        """Raises UserError for stages that do not follow each other."""
        base = self.stages[0]
        if jax.process_count() > 1:
            raise UserError("A cascade runs in one process: start one, on its own devices.")
        if base.task.model.upsampling is not None:
            raise UserError(
                "The first model of the cascade makes clips larger (upsampling="
                f"{base.task.model.upsampling}): begin with a base model."
            )
        for number, (before, after) in enumerate(itertools.pairwise(self.stages), 1):
            model, factors = after.task.model, after.tokenizer.config.factors
            if model.upsampling is None:
                raise UserError(
                    f"Model {number + 1} of the cascade takes no smaller clips (upsampling=None): "
                    "give one that was trained for super-resolution."
                )
            t, h, w = (n // f for n, f in zip(model.grid, model.upsampling))
            takes = (1 + (t - 1) * factors[0], h * factors[1], w * factors[2])
            if takes != before.video_shape:
                raise UserError(
                    f"Model {number + 1} of the cascade enlarges clips of {_times(takes)}, but "
                    f"model {number} makes {_times(before.video_shape)}: give models that fit."
                )
            if before.fps != after.fps:
                raise UserError(
                    f"Model {number + 1} of the cascade was trained at {after.fps:g} frames a "
                    f"second, but model {number} at {before.fps:g}: give models of one rate."
                )

    @classmethod
    def load(cls, sources: Sequence[str | Path], *, mesh: Mesh | None = None) -> "Cascade":
        """Loads runs' newest checkpoints, or exports, base first.

        Raises:
          UserError: one of them cannot be loaded, or they do not follow each other.
        """
        mesh = mesh or make_mesh(MeshConfig())
        return cls(tuple(Generator.load(find(s), mesh=mesh).placed() for s in sources))

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of what comes out."""
        return self.stages[-1].video_shape

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self.stages[0].fps

    def sample(
        self,
        labels: np.ndarray | None = None,
        *,
        prompts: Sequence[str] | None = None,
        count: int | None = None,
        batch_size: int = 16,
        progress: bool = True,
        **options: Any,
    ) -> np.ndarray:
        """N videos: as `stream`, all at once.

        Args:
          labels: int32 (N,), classes, for the stages that have some.
          prompts: N texts, for the stages that read text.
          count: N, where neither says it.
          batch_size: videos at a time, rounded up to the devices.
          progress: show a progress bar.
          **options: of `stream`.

        Returns:
          uint8 (N, T, H, W, 3).
        """
        counts = {len(said) for said in (labels, prompts) if said is not None}
        counts |= {count} if count else set()
        if len(counts) != 1:
            raise UserError(
                f"A cascade needs one number of videos, got {sorted(counts) or 'none'}: give each "
                "a label or a prompt, or say count."
            )
        (total,) = counts
        mesh = self.stages[0].mesh or make_mesh(MeshConfig())
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        options["per_device"] = -(-min(batch_size, total) // shards)
        videos = []
        with progress_bar(total=total, what="cascade", unit="video", disable=not progress) as bar:
            for numbers, batch in self.stream(np.arange(total), labels, prompts, **options):
                videos.append(batch)
                bar.update(len(numbers))
        return np.concatenate(videos)

    def stream(
        self,
        numbers: np.ndarray,
        labels: np.ndarray | None = None,
        prompts: Sequence[str] | None = None,
        *,
        negative_prompts: Sequence[str] | None = None,
        videos: np.ndarray | None = None,
        seed: int = 0,
        sampler: Sampler | Sequence[Sampler] = Ddim(),  # noqa: B008
        guidance: Scale | Sequence[Scale] = NONE,
        low_noise: float | Sequence[float | None] | None = None,
        per_device: int | Sequence[int] = 1,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Any of the videos of a seed, batch by batch through all stages, with constant memory.

        Video i depends on (seed, i) and its label and prompt only.

        Args:
          numbers: int (N,), which videos.
          labels: int32, of all numbers; prompts, negative_prompts: texts, likewise.
          videos: uint8 (N, T, H, W, 3), of all numbers: clips to enlarge, in place of the base's.
          seed: of the noise; every stage has its own.
          sampler, guidance: of every stage, or of each.
          low_noise: time of the noise on what a stage is told, a share of the process's; by default
            as `Generator.sample` has it. Of every stage, or of each but the first.
          per_device: videos at a time on each device, in every stage or in each: the last stages
            take more memory.

        Yields:
          (numbers (K,), uint8 videos (K, T, H, W, 3)).

        Raises:
          UserError: a sampler or what is wanted does not fit a stage; before any work.
        """
        count = len(self.stages)
        samplers, guidances = _each(sampler, count, "samplers"), _each(guidance, count, "guidances")
        noises = [None, *_each(low_noise, count - 1, "noises")]
        sizes = _each(per_device, count, "numbers of videos per device")
        for stage, chosen in zip(self.stages, samplers):
            chosen.check(stage.task.diffusion)
        said = [_said(stage, labels, prompts, negative_prompts) for stage in self.stages]
        if videos is not None and videos.shape[1:4] != self.stages[0].video_shape:
            raise UserError(
                f"The cascade enlarges clips of {_times(self.stages[0].video_shape)}, not of "
                f"{_times(videos.shape[1:4])}: give such clips."
            )

        def run(
            number: int, rows: np.ndarray, low: Callable[[np.ndarray], np.ndarray] | None
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            def wanted(rows: np.ndarray) -> Wanted:
                of_rows = jax.tree.map(lambda leaf: leaf[rows], said[number])
                return of_rows if low is None else dataclasses.replace(of_rows, low=low(rows))

            yield from self.stages[number].stream(
                rows,
                wanted,
                seed=int(np.random.SeedSequence((seed, number)).generate_state(1)[0]),
                sampler=samplers[number],
                guidance=guidances[number],
                low_noise=noises[number],
                decode=number == count - 1,
                per_device=sizes[number],
            )

        def through(number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            if number == 0:
                yield from run(0, np.asarray(numbers), None)
            elif number == 1 and videos is not None:
                encode = self.stages[1].encode
                yield from run(1, np.asarray(numbers), lambda rows: encode(videos[rows]))
            else:
                for rows, latents in through(number - 1):
                    yield from run(number, rows, _by_number(rows, self._handed(number, latents)))

        yield from through(count - 1)

    def _handed(self, number: int, latents: np.ndarray) -> np.ndarray:
        """What stage `number` is told of the latents of the one before."""
        before, after = self.stages[number - 1 : number + 1]
        if before.tokenizer.hash == after.tokenizer.hash:
            return latents
        return after.encode(before.decode(latents))


def enlarged(request: Request, sources: Sequence[str | Path]) -> np.ndarray:
    """A task's clips, enlarged by models of super-resolution; uint8 (N, T, H, W, 3).

    Clips of prompts or classes alone go on as latents, those of other tasks as pixels.

    Args:
      request: what is asked of the base model.
      sources: workdirs or exports of the models after it.

    Raises:
      UserError: a model cannot be loaded, or does not fit.
    """
    base = request.generator.placed()
    if request.task in ("text_to_image", "extend", "long", "connect", "loop"):
        raise UserError(
            f"A cascade enlarges clips of {_times(base.video_shape)}, and the task {request.task} "
            "makes others: leave the cascade out."
        )
    if (request.frames, *request.size) != base.video_shape:
        raise UserError(
            f"The cascade enlarges clips of {_times(base.video_shape)}, not of "
            f"{_times((request.frames, *request.size))}: leave size and seconds out."
        )
    others = (Generator.load(find(source), mesh=base.mesh) for source in sources)
    cascade = Cascade((base, *(other.placed() for other in others)))
    clips = None if request.task == "text_to_video" else TASKS[request.task].make(request)
    names = ("sampler", "guidance", "batch_size", "progress")
    return cascade.sample(
        request.labels,
        prompts=request.prompts,
        negative_prompts=request.negative_prompts,
        count=request.count,
        videos=clips,
        seed=request.seed,
        **{name: request.options[name] for name in names},
    )


def _said(
    stage: Generator,
    labels: np.ndarray | None,
    prompts: Sequence[str] | None,
    negative_prompts: Sequence[str] | None,
) -> Wanted:
    """Of labels and texts what a stage takes."""
    model = stage.task.model
    if model.num_classes and labels is None:
        raise UserError("A model of the cascade has classes: give labels.")
    if model.text_features and prompts is None:
        raise UserError("A model of the cascade reads text: give prompts.")
    text, negative = (
        stage.texts(said) if model.text_features and said is not None else None
        for said in (prompts, negative_prompts)
    )
    label = np.asarray(labels, np.int32) if model.num_classes else None
    return Wanted(label=label, text=text, negative=negative)


def _by_number(numbers: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The values (K, ...) of videos with these numbers (K,), for any of the numbers."""
    place = {number: i for i, number in enumerate(numbers.tolist())}
    return lambda rows: values[[place[row] for row in rows.tolist()]]


def _each(value: T | Sequence[T], count: int, what: str) -> list[T]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise UserError(f"The cascade takes {count} {what}, got {len(value)}: give one for each.")
    return list(value)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
