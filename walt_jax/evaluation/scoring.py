"""Scoring a checkpoint: samples or reconstructions go by, evaluators sum, a record is written."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from walt_jax import config as config_lib
from walt_jax.data.pipeline import DataConfig
from walt_jax.data.records import open_dataset
from walt_jax.errors import UserError
from walt_jax.evaluation import features, partial, protocols, reference, scores
from walt_jax.evaluation.clips import Clips
from walt_jax.evaluation.evaluators import Evaluator, Sampling
from walt_jax.evaluation.features import FeatureNet
from walt_jax.evaluation.measures import Shown
from walt_jax.evaluation.protocols import Protocol
from walt_jax.evaluation.reconstruct import Reconstructor
from walt_jax.evaluation.reference import Statistics
from walt_jax.evaluation.scores import Record, Score
from walt_jax.evaluation.wishes import Wishes
from walt_jax.generation import Generator
from walt_jax.media import frame_grid

FOLDER = "evaluation"  # in a workdir: sums on the way, reference statistics, samples to look at
_SHOWN = 8
_CUT_FPS = 0.02  # relative difference of frame rates that counts as none
Subject = Generator | Reconstructor


class Scoring:
    """Evaluators that share their samples, ready for any checkpoint of a run.

    Attributes:
      protocol: with what the run says filled in.
      real: the real clips; None where statistics were given.
      label_names, labels, texts, fps: of the samples.
      mesh: whose devices feature networks use.
      reconstructed: whether they are made from the real clips, by a tokenizer.
    """

    def __init__(
        self,
        evaluators: Sequence[Evaluator],
        subject: Subject,
        values: Mapping[str, Any],
        workdir: str | Path,
        *,
        cache: str | Path | None = None,
        mesh: Mesh | None = None,
        progress: bool = True,
        beat: Callable[[], None] | None = None,
    ) -> None:
        """Finds the real clips and checks that all fits.

        Args:
          evaluators: of one `sampling`.
          subject: what makes the videos; another checkpoint of it may come later.
          values: the run's config.
          workdir: of the run; sums and statistics are kept there.
          cache: for the statistics instead.
          mesh: whose devices feature networks use; the local ones by default.
          progress: show it.
          beat: called after each batch of samples, as a sign of life.

        Raises:
          UserError: the protocol does not fit the run, or there are no real clips.
        """
        self._evaluators, self._sampling = evaluators, evaluators[0].sampling
        self._values, self._progress, self._beat = values, progress, beat
        self.reconstructed = isinstance(subject, Reconstructor)
        for evaluator in evaluators:
            if values["task"]["name"] not in evaluator.tasks:
                raise UserError(
                    f"{type(evaluator).__name__} scores runs of {' and '.join(evaluator.tasks)}, "
                    f"but {workdir} is one of the task {values['task']['name']}: leave it out."
                )
        self._folder = epath.Path(workdir) / FOLDER
        self._cache = epath.Path(cache) if cache else self._folder / "reference"
        self.mesh = mesh or Mesh(np.array(jax.local_devices()), ("data",))
        self.fps = subject.fps
        self.protocol = fitted(self._sampling, subject, values)
        source = self._sampling.real or find_real(values)
        self._statistics = str(source) if str(source).endswith(".npz") else ""
        self.real = None if self._statistics else self._clips(source)
        if self.reconstructed:
            if self.real is None:
                raise UserError("A tokenizer reconstructs real clips: give their folder.")
            count = len(self.real)
            self.protocol = dataclasses.replace(self.protocol, num_samples=count, folds=1)
        if not self.protocol.total_samples:
            raise UserError(
                f"The protocol {self.protocol.name} does not say how many samples to make: give "
                "--protocol.num_samples."
            )
        self._wishes = None
        self.label_names, self.labels, self.texts = (), None, ()
        if isinstance(subject, Generator):
            self._wishes = Wishes(subject, self.protocol, self.real, self._sampling)
            self.label_names = subject.label_names
            self.labels, self.texts = self._wishes.labels, self._wishes.texts

    def due(self, step: int, last: bool) -> bool:
        """Whether training takes it after this step."""
        return self._evaluators[0].due(step, last)

    def prepare(self) -> None:
        """Loads the networks and sums over the real clips, so that nothing fails later.

        Raises:
          UserError: an evaluator does not fit.
        """
        for evaluator in self._evaluators:
            evaluator.measure(self)

    def net(self, name: str, weights: str, resize: str, allow: tuple[str, ...]) -> FeatureNet:
        """A feature network, loaded once."""
        return _load(name, weights or None, resize or None, self.mesh, allow)

    def reference(self, net: FeatureNet, kept: int) -> Statistics:
        """Of the real clips: from the file given, the cache, or computed."""
        features.check_clips(net, self.protocol.num_frames)
        if self.real is None:
            return reference.load(self._statistics, self.protocol, net, kept=kept)
        options = {"kept": kept, "progress": self._progress}
        return reference.statistics(self.real, net, self._cache, **options)[0]

    def __call__(self, subject: Subject, *, shared: bool = False) -> list[Score]:
        """Scores a checkpoint, or goes on with it; writes the scores, and a picture of samples.

        What is in the workdir's scores already, under the same record, is not made again.

        Args:
          subject: the checkpoint.
          shared: whether all processes sample together.

        Raises:
          UserError: a measure does not fit.
        """
        measures = {str(i): e.measure(self) for i, e in enumerate(self._evaluators)}
        common = self._record(subject)
        records = {k: {**common, **m.record} for k, m in measures.items()}
        # With the code's version: sums of two versions are not mixed.
        folder = self._folder / f"sums-{scores.identity(records)}"
        found = {k: scores.find(self._folder.parent, r) for k, r in records.items()}
        if all(found.values()):
            partial.remove(folder)
            return [score for group in found.values() for score in group]
        shown = Shown(min(_SHOWN, self.protocol.total_samples), self._shape(subject))
        partial.gather(
            folder,
            self.protocol.total_samples,
            {**measures, "shown": shown},
            functools.partial(self._make, subject),
            what=f"score step {subject.step}",
            shared=shared,
            progress=self._progress,
            beat=self._beat,
        )
        new = [
            Score(name, folds, records[k], subject.step)
            for k, m in measures.items()
            if not found[k]
            for name, folds in m.results().items()
        ]
        if jax.process_index() == 0:
            picture = self._folder / f"{subject.step:08d}-{scores.identity(common)}.png"
            _write_grid(picture, shown.videos)
            scores.append(self._folder.parent, new)
        partial.remove(folder)
        return [*(s for group in found.values() for s in group), *new]

    def _make(self, subject: Subject, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches of numbers and videos, and what they were made from."""
        if isinstance(subject, Reconstructor):
            yield from subject.stream(self.real, numbers)
            return
        s = self._sampling
        yield from subject.stream(
            numbers,
            self._wishes,
            seed=s.seed,
            sampler=sampler_of(s, subject),
            guidance=s.guidance,
            given_guidance=s.given_guidance,
            per_device=s.per_device,
        )

    def _shape(self, subject: Subject) -> tuple[int, int, int]:
        if isinstance(subject, Generator):
            return subject.video_shape
        return self.protocol.num_frames, *self.real.read(0).shape[1:3]

    def _record(self, subject: Subject) -> Record:
        """What all scores of this checkpoint depend on."""
        s, p = self._sampling, self.protocol
        made: Record = {
            "step": subject.step,
            "weights": subject.weights,
            "run": scores.identity(dict(self._values)),
            "count": p.total_samples,
            "tokenizer": subject.tokenizer.hash,
        }
        if isinstance(subject, Generator):
            made |= {
                "params": _digest(subject.params),
                "seed": s.seed,
                "sampler": config_lib.to_dict(sampler_of(s, subject)),
                "guidance": config_lib.to_dict(s.guidance),
                "given_guidance": config_lib.to_dict(s.given_guidance),
                "per_device": s.per_device,
                **self._wishes.record,
            }
        real = self.real.record if self.real is not None else self._given_record
        return {
            "protocol": config_lib.to_dict(p),
            "covariance": "unbiased" if p.unbiased else "biased",
            "real": real,
            "reconstructions" if self.reconstructed else "samples": made,
            "code": scores.code(),
        }

    @functools.cached_property
    def _given_record(self) -> Record:
        return reference.source_of(self._statistics)

    def _clips(self, source: str | Path) -> Clips:
        part, data = self._sampling.real_part, None
        if not part:
            split = self.protocol.split
            part = split if split in ("train", "eval") and not self._sampling.real else "all"
        if part != "all":
            data = data_of(self._values)
        return Clips(source, self.protocol, seed=self._sampling.seed, part=part, data=data)


def make(
    evaluators: Sequence[Evaluator],
    subject: Subject,
    values: Mapping[str, Any],
    workdir: str | Path,
    **options: Any,
) -> list[Scoring]:
    """Evaluators in groups that share their samples; arguments as of `Scoring`."""
    groups: dict[tuple[Sampling, int], list[Evaluator]] = {}
    for evaluator in evaluators:
        groups.setdefault((evaluator.sampling, evaluator.every), []).append(evaluator)
    return [Scoring(group, subject, values, workdir, **options) for group in groups.values()]


def sampler_of(sampling: Sampling, generator: Generator) -> Any:
    """The sampler that is asked for, or the task's, with its number of steps."""
    sampler = sampling.sampler or generator.task.sampler
    if sampling.num_steps:
        sampler = dataclasses.replace(sampler, num_steps=sampling.num_steps)
    return sampler


def fitted(sampling: Sampling, subject: Subject, values: Mapping[str, Any]) -> Protocol:
    """The protocol of a run: `custom` takes its size and frame rate, a named one must have them.

    Raises:
      UserError: the run's videos are not what the protocol compares.
    """
    protocol = protocols.choose(sampling.protocol, sampling.changes)
    frames, *size = subject.video_shape
    size, rate = tuple(size), values["data"]["fps"]  # 0: every frame
    if protocol.name == protocols.CUSTOM:
        protocol = dataclasses.replace(
            protocol,
            size=protocol.size or size,
            fps=protocol.fps or (0.0 if protocol.any_fps else rate),
        )
    if protocol.size != size:
        raise UserError(
            f"The protocol {protocol.name} is of videos of {protocol.size}, but this run is of "
            f"{size}: choose another, or give --protocol.size."
        )
    if isinstance(subject, Generator) and frames < protocol.span:
        raise UserError(
            f"The protocol {protocol.name} needs videos of {protocol.span} frames, but this run "
            f"makes {frames}: choose another, or give --protocol.num_frames."
        )
    made = rate or subject.fps
    if isinstance(subject, Reconstructor):  # takes any rate
        alike = True
    elif protocol.fps:
        alike = abs(protocol.fps - made) <= _CUT_FPS * made
    else:
        alike = not rate or (protocol.name == protocols.CUSTOM and protocol.any_fps)
    if not alike:
        read = f"at {protocol.fps:g} fps" if protocol.fps else "frame by frame"
        raise UserError(
            f"The protocol {protocol.name} reads real clips {read}, but this run was trained at "
            f"{made:g} fps: give --protocol.fps={made:g}."
        )
    return protocol


def data_of(values: Mapping[str, Any]) -> DataConfig:
    """How the run's videos were cut: its own data, or of latents those of its tokenizer's run.

    Raises:
      UserError: they are not there any more, or others than the latents were made of.
    """
    data = config_lib.build(DataConfig, values["data"], "config.data")
    dataset = open_dataset(data.path)
    if dataset.metadata.get("kind") != "latents":
        return data
    theirs = config_lib.read_resolved(values["task"]["tokenizer"])
    videos = config_lib.build(DataConfig, theirs["data"], "config.data")
    found = open_dataset(videos.path).fingerprint
    if found != dataset.metadata["videos"]:
        raise UserError(
            f"The latents in {data.path} were made of other videos than {videos.path} holds: give "
            "those as --real."
        )
    return videos


def find_real(values: Mapping[str, Any]) -> str:
    """The prepared videos that a run was trained on.

    Raises:
      UserError: they are not there any more.
    """
    try:
        return data_of(values).path
    except UserError as error:
        raise UserError(
            f"This run's own real clips cannot be used: {str(error).rstrip('.')}; or give --real."
        ) from error


@functools.lru_cache(maxsize=4)
def _load(
    name: str, weights: str | None, resize: str | None, mesh: Mesh, allow: tuple[str, ...]
) -> FeatureNet:
    return features.load(name, weights, resize=resize, mesh=mesh, allow=allow)


def _digest(params: Any) -> str | None:
    """Of weights on the host; None of those that lie on a mesh."""
    leaves = jax.tree.leaves(params)
    if isinstance(leaves[0], jax.Array):
        return None
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _write_grid(path: epath.Path, videos: np.ndarray) -> None:
    """A row a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coded = cv2.imencode(".png", frame_grid(videos)[..., ::-1])[1]
    path.write_bytes(coded.tobytes())
