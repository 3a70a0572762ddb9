"""Protocols as data: what a score was taken of, so that two of one protocol can be compared.

A protocol says how many real clips and samples there are, how clips are cut, and how both are
brought before the feature network. Where a paper is silent the choice is ours and said so here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.evaluation.resize import by_name

CUSTOM = "custom"
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a score is taken.

    Attributes:
      name: of the table below; a named one that is changed is `custom`.
      source: who takes scores so.
      split: the part of the data that real clips come from, in the source's words.
      num_frames: frames that are compared, of a real clip and of a sample (its first ones).
      stride: frames of the video from one of a clip to the next.
      fps: frames a second that real clips are read at, nearest in time; 0 takes every frame.
      any_fps: whether videos of several frame rates may be mixed where `fps` is 0.
      size: (height, width) that real videos are scaled and cropped to, and that samples have; None
        takes all as they are, and then they must be alike.
      crop: where real clips are cropped, in the centre or at random.
      compare_size: (height, width) to which both are resized before the feature network's own
        resize; None leaves them.
      compare_resize: how: a name of `walt_jax.evaluation.resize`.
      clips: when a real clip starts: at `random`, or `even` spacing from the first to the last
        possible start (a single one in the middle).
      temporal_clips, spatial_clips: of each real video; several spatial ones lie evenly along the
        longer side.
      num_real: real clips, of videos drawn without replacement; 0 takes all.
      num_samples: samples of a fold; 0 takes what a folder holds.
      folds: sets of samples, each compared with the same real clips; the score is their mean.
      given_frames: frames of a real clip that a sample continues; they are compared too, as the
        tokenizer decodes them.
      labels: classes of the samples, `even` in turn or drawn from those of the `real` videos.
      jpeg_quality: both sides go through JPEG of this quality; 0 leaves them.
      unbiased: covariances are divided by N - 1, or else by N.
    """

    name: str = CUSTOM
    source: str = ""
    split: str = "all"
    num_frames: int = 16
    stride: int = 1
    fps: float = 0.0
    any_fps: bool = False
    size: Size | None = None
    crop: Literal["centre", "random"] = "centre"
    compare_size: Size | None = None
    compare_resize: str = "bilinear"
    clips: Literal["random", "even"] = "random"
    temporal_clips: int = 1
    spatial_clips: int = 1
    num_real: int = 0
    num_samples: int = 0
    folds: int = 1
    given_frames: int = 0
    labels: Literal["even", "real"] = "even"
    jpeg_quality: int = 0
    unbiased: bool = True

    def __post_init__(self) -> None:
        least = {"num_frames": 1, "stride": 1, "temporal_clips": 1, "spatial_clips": 1, "folds": 1}
        for key in ("fps", "num_real", "num_samples", "given_frames", "jpeg_quality", *least):
            value, low = getattr(self, key), least.get(key, 0)
            if value < low:
                raise UserError(f"protocol.{key} must be at least {low}, got {value}.")
        by_name(self.compare_resize)  # refuses what there is not
        if self.jpeg_quality > 100:
            raise UserError(f"protocol.jpeg_quality must be at most 100, got {self.jpeg_quality}.")
        if self.given_frames >= self.num_frames:
            raise UserError(
                f"protocol.given_frames={self.given_frames} gives all of the {self.num_frames} "
                "frames: at least one must be left to generate."
            )

    @property
    def span(self) -> int:
        """Frames of a video, or of a sample, that a clip reaches over."""
        return (self.num_frames - 1) * self.stride + 1

    @property
    def total_samples(self) -> int:
        """Over all folds; 0 where the protocol does not fix it."""
        return self.folds * self.num_samples


_MAGVIT = "MAGVIT (2212.05199); presumably MAGVIT-v2 (2310.05737) and W.A.L.T (2312.06662)"
_STYLEGANV = "StyleGAN-V (2112.14683)"
PROTOCOLS: Mapping[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            name="magvit_ucf101",
            source=_MAGVIT,
            split="train",
            any_fps=True,
            size=(128, 128),
            crop="random",
            num_samples=10_000,
            folds=4,
        ),
        Protocol(
            name="magvit_k600",
            source=_MAGVIT,
            split="eval",
            any_fps=True,
            size=(128, 128),
            compare_size=(64, 64),
            clips="even",
            temporal_clips=2,
            spatial_clips=3,
            num_samples=50_000,
            folds=4,
            given_frames=5,
        ),
        *(
            Protocol(
                name=f"styleganv_{name}",
                source=_STYLEGANV,
                split="train and test",
                num_frames=frames,
                stride=stride,
                any_fps=True,
                size=(256, 256),
                num_real=2048,
                num_samples=2048,
                labels="real",
                jpeg_quality=95,
                unbiased=False,
            )
            for name, frames, stride in (
                ("16f", 16, 1),
                ("128f", 128, 1),
                ("128f_subsample8f", 16, 8),
            )
        ),
        Protocol(
            name="videopoet_zeroshot_ucf",
            source="VideoPoet (2312.14125)",
            split="train",
            fps=25.0,
            size=(128, 128),
            compare_size=(256, 256),
            compare_resize="bicubic",
            clips="even",
            num_samples=10_000,  # and 10K real ones, it says: all, since the split has 9.5K
            labels="real",
        ),
        Protocol(),
    )
}


def choose(name: str, overrides: Sequence[str] = ()) -> Protocol:
    """The protocol of a name, with `key=value` changes; what is changed is called `custom`.

    Raises:
      UserError: no such protocol or key, or a value that does not fit.
    """
    if name not in PROTOCOLS:
        raise UserError(f"No protocol {name!r}: choose one of {', '.join(PROTOCOLS)}.")
    before = config_lib.to_dict(PROTOCOLS[name])
    values = config_lib.override(dict(before), overrides)
    if values != before:
        values["name"] = CUSTOM
        if name != CUSTOM and values["source"] == before["source"]:
            values["source"] = f"{name}, changed"
    return read(values)


def read(values: Mapping[str, Any]) -> Protocol:
    """A protocol from the plain values of a record.

    Raises:
      UserError: a key or value that no protocol has.
    """
    return config_lib.build(Protocol, values, "protocol")
