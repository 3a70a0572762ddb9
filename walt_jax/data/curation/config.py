"""What `walt_jax.prepare` can be told: cuts, scores, captions, and the thresholds of the filter."""

import dataclasses
import os
from typing import Any, Literal

from walt_jax.errors import UserError

MAX_SECONDS = 20.0  # a record is read whole, for 17 of its frames too
Range = tuple[float | None, float | None]
_ANY: Range = (None, None)
URL, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class CutConfig:
    """How a source becomes clips.

    Attributes:
      detector: PySceneDetect's detector of scene cuts; no clip goes over one. `adaptive` compares a
        frame's change with that of its neighbours (camera motion is no cut), `content` with a
        fixed threshold.
      threshold: of the detector; 0 is PySceneDetect's default (3 for adaptive, 27 for content).
      min_scene_seconds: a cut sooner after the one before does not count.
      clip_seconds: length of a clip, cut from the start of each scene; 0 keeps whole scenes.
      min_clip_seconds: what is left of a scene and shorter is dropped, and reported; no image is.
      fps: keep this many frames a second, nearest in time; 0 keeps all. None is ever repeated.
      max_seconds: a scene, or a source without cuts, is cut into pieces no longer than this.
    """

    detector: Literal["none", "adaptive", "content"] = "none"
    threshold: float = 0.0
    min_scene_seconds: float = 0.5
    clip_seconds: float = 0.0
    min_clip_seconds: float = 0.0
    fps: float = 0.0
    max_seconds: float = MAX_SECONDS

    def __post_init__(self) -> None:
        for field in ("threshold", "min_scene_seconds", "clip_seconds", "min_clip_seconds", "fps"):
            if getattr(self, field) < 0:
                raise UserError(
                    f"config.cut.{field} must be at least 0, got {getattr(self, field):g}: give a "
                    "larger one."
                )
        if not self.max_seconds > 0:
            raise UserError(
                f"--max-seconds must be above 0, got {self.max_seconds:g}: give a larger one."
            )


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A file of weights: a path or an http(s) URL, and its SHA-256 (which a URL must have)."""

    source: str
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class ClipModel:
    """A CLIP model as ONNX files, the towers with projection that transformers.js uses.

    Attributes:
      image: image tower, `pixel_values` float32 (N, 3, size, size) to an embedding (N, D).
      text: text tower, `input_ids` int64 (N, L) to an embedding (N, D); for text_match.
      tokenizer: the `tokenizer.json` of the text tower; for text_match.
      aesthetic_head: a linear layer on the normalised image embedding: arrays `weight` (1, D) or
        (D,) and `bias` (1,) in a .safetensors, .npz or .pt file; for aesthetic.
      size: pixels a side of the image tower's input.
      context: tokens of the text tower.
    """

    image: ModelFile
    text: ModelFile | None = None
    tokenizer: ModelFile | None = None
    aesthetic_head: ModelFile | None = None
    size: int = 224
    context: int = 77


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Which scores a clip gets; each is a column of the result (`scores.py` defines them).

    Attributes:
      motion: mean optical flow, in shorter sides a second.
      sharpness: variance of the Laplacian of the luma.
      letterbox: share of the picture in black bars.
      black_frames: share of the frames that are black.
      text_area: share of the picture in text, by RapidOCR's detector.
      phash: perceptual hashes, by which near-duplicates are found.
      clip: the model of `aesthetic` and `text_match`; None turns both off.
      frames: frames looked at, evenly over the clip.
    """

    motion: bool = False
    sharpness: bool = False
    letterbox: bool = False
    black_frames: bool = False
    text_area: bool = False
    phash: bool = False
    clip: ClipModel | None = None
    frames: int = 8

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise UserError(f"config.scores.frames must be at least 2, got {self.frames}.")


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible vision endpoint; URL and key are $OPENAI_BASE_URL and $OPENAI_API_KEY.

    Attributes:
      model: name of the model that is asked.
      prompt: what it is asked, before the frames.
      frames: frames that it sees, evenly over the clip.
      max_tokens: of an answer.
      concurrency: requests at a time, in each worker process.
      retries: after time-outs, 429 and 5xx, with growing waits.
      timeout: seconds without an answer.
      cache: folder of the answers; "" is captions/ in $WALT_CACHE or ~/.cache/walt_jax.
    """

    model: str
    prompt: str = (
        "These are frames of one video, in order. Describe the video in one or two sentences: who "
        "or what is seen, what happens, how the camera moves. Answer with the description alone."
    )
    frames: int = 4
    max_tokens: int = 200
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0
    cache: str = ""

    def __post_init__(self) -> None:
        least = {"frames": 1, "max_tokens": 1, "concurrency": 1, "retries": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(
                    f"config.captions.endpoint.{name} must be at least {value}, got "
                    f"{getattr(self, name)}."
                )


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """Where captions come from: the manifest's, else the side-car's, else the endpoint's.

    Attributes:
      sidecar: extension of a text file beside the video, such as ".txt"; "" looks for none.
      endpoint: asked for clips that have no caption otherwise; None asks nobody.
    """

    sidecar: str = ""
    endpoint: EndpointConfig | None = None


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which clips are kept: each pair is (least, most), None for no bound, ends included.

    Attributes:
      seconds, frames, short_side: of the clip.
      motion, sharpness, letterbox, black_frames, text_area, aesthetic, text_match: of its scores;
        `motion` does not ask images.
      duplicate_bits: of clips whose perceptual hashes (192 bits) differ in at most so many bits,
        directly or through others, the first is kept; None keeps all.
    """

    seconds: Range = _ANY
    frames: Range = _ANY
    short_side: Range = _ANY
    motion: Range = _ANY
    sharpness: Range = _ANY
    letterbox: Range = _ANY
    black_frames: Range = _ANY
    text_area: Range = _ANY
    aesthetic: Range = _ANY
    text_match: Range = _ANY
    duplicate_bits: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in self.ranges().items():
            if least is not None and most is not None and least > most:
                raise UserError(
                    f"config.filter.{name} keeps nothing: its least, {least:g}, is above its most, "
                    f"{most:g}."
                )
        if self.duplicate_bits is not None and not 0 <= self.duplicate_bits < 24:
            raise UserError(
                f"config.filter.duplicate_bits must lie in [0, 24), got {self.duplicate_bits}."
            )

    def ranges(self) -> dict[str, Range]:
        """The bounds that are set."""
        fields = dataclasses.asdict(self)
        del fields["duplicate_bits"]
        return {name: bounds for name, bounds in fields.items() if tuple(bounds) != _ANY}

    @property
    def is_on(self) -> bool:
        """Whether anything can be left out."""
        return bool(self.ranges()) or self.duplicate_bits is not None


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """A preparation.

    Attributes:
      short_side: shrink to this many pixels on the shorter side; nothing is enlarged.
      cut, scores, captions: what is made of each source; another value decodes all anew.
      filter: what is kept of it; another value decodes nothing.
    """

    short_side: int | None = None
    cut: CutConfig = CutConfig()
    scores: ScoreConfig = ScoreConfig()
    captions: CaptionConfig = CaptionConfig()
    filter: FilterConfig = FilterConfig()

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise UserError(
                f"--short-side must be at least 1, got {self.short_side}: give a larger one."
            )

    def described(self) -> dict[str, Any]:
        """Everything that a record depends on, as JSON values: not the filter."""
        values = dataclasses.asdict(self)
        del values["filter"]
        return values


def endpoint_settings(config: EndpointConfig) -> tuple[str, str]:
    """The endpoint's URL and key.

    The key is "" where there is none, as for servers of one's own. Raises UserError without a URL.
    """
    url = os.environ.get(URL, "").rstrip("/")
    if not url:
        raise UserError(
            f"config.captions.endpoint asks {config.model}, but ${URL} is not set: set it, for "
            "example to http://localhost:8000/v1, or turn the endpoint off."
        )
    return url, os.environ.get(KEY, "")
