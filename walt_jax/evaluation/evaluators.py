"""Evaluators: what a config, or a command, asks to be scored; named and built like all of a config.

config.evaluators = (
    {"name": "fvd", "every": 5000, "sampling": {"protocol": "magvit_ucf101"}},
    {"name": "read_back", "every": 500, "sampling": {"changes": ("num_samples=96",)}},
)
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

import numpy as np
from jax.sharding import Mesh

from walt_jax.diffusion import Constant, Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.evaluation import frames, motion, protocols
from walt_jax.evaluation.clip import TextMatch
from walt_jax.evaluation.features import FeatureNet, check_clips
from walt_jax.evaluation.measures import Frechet, InceptionScore, Means, Measure, ReadBack
from walt_jax.evaluation.reference import Statistics


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which samples are scored, and with which real clips; evaluators of equal ones share them.

    Attributes:
      protocol: one of `protocols.PROTOCOLS`.
      changes: `key=value` changes of it, as in ("num_samples=256", "folds=1").
      real: a folder of videos, a prepared dataset, or statistics (.npz); by default the run's data.
      real_part: of a prepared dataset; by default that of the protocol's split for the run's data,
        and all of any other.
      seed: of the noise and of the choice of real clips.
      sampler: by default the task's kind.
      num_steps: of the sampler; 0 takes the sampler's own.
      guidance: strength of classifier-free guidance by class and text.
      given_guidance: by given frames.
      prompts: a file with a text a line, for models of text; by default the real clips' captions.
      per_device: samples that a device makes at a time; it is recorded, since rounding depends on
        it, and on nothing else of the machine.
    """

    protocol: str = protocols.CUSTOM
    changes: tuple[str, ...] = ()
    real: str = ""
    real_part: Literal["", "all", "train", "eval"] = ""
    seed: int = 0
    sampler: Sampler | None = None
    num_steps: int = 0
    guidance: Scale = Constant(1.0)
    given_guidance: Scale = Constant(1.0)
    prompts: str = ""
    per_device: int = 1

    def __post_init__(self) -> None:
        protocols.choose(self.protocol, self.changes)  # refuses what there is not
        if self.per_device < 1 or self.num_steps < 0:
            raise UserError(
                f"sampling.per_device={self.per_device} must be at least 1 and "
                f"num_steps={self.num_steps} at least 0."
            )


class Samples(Protocol):
    """What a measure is made for: samples of one protocol from one model."""

    protocol: protocols.Protocol
    label_names: tuple[str, ...]
    labels: np.ndarray | None  # int (total,), the class of each sample
    texts: Sequence[str]  # prompts of the samples, in turn; none for a model without text
    mesh: Mesh  # whose devices feature networks use
    fps: float
    reconstructed: bool  # by a tokenizer, from the real clips

    def reference(self, net: FeatureNet, kept: int) -> Statistics:
        """Statistics of the real clips, with the features of the first `kept`."""
        ...

    def net(self, name: str, weights: str, resize: str, allow: tuple[str, ...]) -> FeatureNet:
        """A feature network, loaded once."""
        ...


@dataclasses.dataclass(frozen=True)
class Evaluator(abc.ABC):
    """One score, or a few of one kind.

    Attributes:
      every: steps of training between two; 0 is at the last step alone, where it is always taken.
      inline: whether training itself takes it; otherwise it is left to `evaluate follow`.
      sampling: of the videos.
    """

    registry: ClassVar[dict[str, type["Evaluator"]]] = {}
    tasks: ClassVar[tuple[str, ...]] = ("denoiser",)  # whose runs it scores
    every: int = 0
    inline: bool = True
    sampling: Sampling = Sampling()

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Evaluator.registry[name] = cls

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"evaluators.every must be at least 0, got {self.every}.")

    def due(self, step: int, last: bool) -> bool:
        """Whether it is taken after this step."""
        return last or bool(self.every and step % self.every == 0)

    @abc.abstractmethod
    def measure(self, samples: Samples) -> Measure:
        """Fresh sums.

        Raises:
          UserError: it does not fit these samples.
        """


@dataclasses.dataclass(frozen=True)
class Fvd(Evaluator, name="fvd"):
    """The Frechet distance to real clips; `frechet_fixture` with stand-in weights.

    Attributes:
      features: name of a feature network, or `module:function`.
      weights: file, or URL#sha256=..., of its weights; '' for the published ones.
      resize: instead of the network's own.
      allow: kinds of weights that are otherwise refused.
      kernel_videos: also the kernel distance (`kvd`), of so many videos a side; 0 leaves it out.
    """

    tasks: ClassVar[tuple[str, ...]] = ("denoiser", "tokenizer")
    features: str = "i3d"
    weights: str = ""
    resize: str = ""
    allow: tuple[str, ...] = ()
    kernel_videos: int = 0

    def measure(self, samples: Samples) -> Measure:
        net = samples.net(self.features, self.weights, self.resize, self.allow)
        real = samples.reference(net, self.kernel_videos)
        return Frechet(
            net,
            samples.protocol,
            real.moments,
            real.rows[: self.kernel_videos] if self.kernel_videos else None,
            cut=samples.reconstructed,
            prefix="r" if samples.reconstructed else "",  # rFVD, as the papers call it
        )


@dataclasses.dataclass(frozen=True)
class Fid(Fvd, name="fid"):
    """The Frechet distance of single frames, all of each clip; otherwise as `fvd`."""

    features: str = "inception"


@dataclasses.dataclass(frozen=True)
class SpriteReadBack(Evaluator, name="read_back"):
    """Whether sprite samples show the colour, shape and direction of their class."""

    def measure(self, samples: Samples) -> Measure:
        if samples.labels is None:
            raise UserError("The evaluator read_back needs a model of classes: leave it out.")
        return ReadBack(
            samples.label_names,
            samples.labels,
            samples.fps,
            samples.protocol.folds,
            samples.protocol.num_samples,
        )


@dataclasses.dataclass(frozen=True)
class Reconstruction(Evaluator, name="reconstruction"):
    """Each reconstructed clip beside its original.

    Attributes:
      metrics: of `psnr` (dB), `ssim`, `ms_ssim` and `lpips`, each averaged over frames.
      lpips: path or URL of the weights of LPIPS, where it is among them; lpips_sha256: of the file.
    """

    tasks: ClassVar[tuple[str, ...]] = ("tokenizer",)
    metrics: tuple[Literal["psnr", "ssim", "ms_ssim", "lpips"], ...] = ("psnr", "ssim")
    lpips: str = ""
    lpips_sha256: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if ("lpips" in self.metrics) != bool(self.lpips):
            raise UserError(
                "evaluators.lpips names the weights of the metric lpips: give both, or neither."
            )

    def measure(self, samples: Samples) -> Measure:
        known = {"psnr": frames.psnr, "ssim": frames.ssim, "ms_ssim": frames.ms_ssim}
        if self.lpips:
            known["lpips"] = frames.lpips(self.lpips, self.lpips_sha256)
        return Means({name: known[name] for name in self.metrics}, pairs=True)


@dataclasses.dataclass(frozen=True)
class Motion(Evaluator, name="motion"):
    """How much moves in the samples, and how well frames continue each other; see `motion.py`."""

    def measure(self, samples: Samples) -> Measure:
        functions = {
            "motion_strength": motion.motion_strength,
            "warping_error": motion.warping_error,
        }
        protocol = samples.protocol
        return Means(functions, folds=protocol.folds, fold_size=protocol.num_samples)


@dataclasses.dataclass(frozen=True)
class Is(Evaluator, name="is"):
    """The inception score of samples; of UCF-101 by C3D.

    Attributes:
      features: a network of class logits.
      weights: file, or URL#sha256=..., of its weights; '' for the published ones.
      allow: kinds of weights that are otherwise refused.
    """

    features: str = "c3d"
    weights: str = ""
    allow: tuple[str, ...] = ()

    def measure(self, samples: Samples) -> Measure:
        net = samples.net(self.features, self.weights, "", self.allow)
        check_clips(net, samples.protocol.num_frames)
        return InceptionScore(net, samples.protocol)


@dataclasses.dataclass(frozen=True)
class ClipMatch(Evaluator, name="clip"):
    """How well the frames of samples match their prompts; `clip_fixture` with stand-in weights.

    Attributes:
      weights: folder of a CLIP; '' for the one in the cache.
      allow: "trained" vouches for it.
    """

    weights: str = ""
    allow: tuple[str, ...] = ()

    def measure(self, samples: Samples) -> Measure:
        if not samples.texts:
            raise UserError("The evaluator clip needs a model of text: leave it out.")
        match = _text_match(self.weights or None, samples.mesh, self.allow)
        name = "clip_match" if match.images.trained else "clip_fixture"
        return Means(
            {name: match},
            texts=samples.texts,
            net=match.images,
            folds=samples.protocol.folds,
            fold_size=samples.protocol.num_samples,
        )


@functools.lru_cache(maxsize=1)
def _text_match(folder: str | None, mesh: Mesh, allow: tuple[str, ...]) -> TextMatch:
    return TextMatch.load(folder, mesh=mesh, allow=allow)
