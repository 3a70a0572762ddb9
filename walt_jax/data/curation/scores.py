"""Scores of clips, each a number in a column of the result.

All look at frames as the record holds them, so a shrunken dataset is scored as it will be seen.
Where a clip has fewer frames than are looked at, all of them count.
"""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from walt_jax.data import video
from walt_jax.data.curation.config import ClipModel, ModelFile, ScoreConfig
from walt_jax.data.curation.cutting import Clip
from walt_jax.data.records import exact
from walt_jax.errors import UserError

_FLOW_SIDE, _SHARP_SIDE = 128, 256  # pixels of the shorter side that the two are taken in
_BLACK = 25  # luma of 255 below which a pixel is black; FFmpeg's blackdetect has a tenth too
_ALMOST_ALL = 98  # per cent of the pixels of a black frame, row or column
_TEXT_FRAMES = 3  # the detector is the slowest of the scores
HASHES = ("phash_0", "phash_1", "phash_2")
_PLAIN = ("motion", "sharpness", "letterbox", "black_frames", "text_area")
SCORES = (*_PLAIN, "aesthetic", "text_match")
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def columns(config: ScoreConfig) -> dict[str, Any]:
    """The features that the scores of `config` add to a record, by name."""
    names = [name for name in _PLAIN if getattr(config, name)]
    if config.clip is not None and config.clip.aesthetic_head is not None:
        names.append("aesthetic")
    if config.clip is not None and config.clip.text is not None:
        names.append("text_match")
    hashes = HASHES if config.phash else ()
    return {n: exact(np.float64) for n in names} | {
        n: tfds.features.Scalar(np.int64) for n in hashes
    }


def left_off(config: ScoreConfig) -> list[str]:
    """A sentence for each score that is off for want of a model."""
    clip, said = config.clip, []
    if clip is None:
        return ["aesthetic and text_match are off: config.scores.clip names no model."]
    if clip.aesthetic_head is None:
        said.append("aesthetic is off: config.scores.clip.aesthetic_head names no file.")
    if clip.text is None:
        said.append("text_match is off: config.scores.clip.text names no file.")
    return said


def check(config: ScoreConfig) -> None:
    """Loads every model once. Raises UserError for a library or file that is not there."""
    if config.text_area:
        _text_detector()
    if config.clip is not None:
        _clip(config.clip)


def score(clip: Clip, caption: str, config: ScoreConfig) -> dict[str, float | int]:
    """The scores of a clip: name -> float, and int for the hashes."""
    wanted = columns(config)
    if not wanted:
        return {}
    count = len(clip.coded)
    where = np.unique(np.linspace(0, count - 1, config.frames).round().astype(int))
    frames = [decoded(clip.coded[i]) for i in where]
    luma = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    simple: dict[str, Callable[[], float]] = {
        "motion": lambda: motion(clip, where, frames),
        "sharpness": lambda: sharpness(luma),
        "letterbox": lambda: letterbox(luma),
        "black_frames": lambda: float(np.mean([_is_black(y.ravel()) for y in luma])),
        "text_area": lambda: text_area(frames),
    }
    out: dict[str, float | int] = {n: f() for n, f in simple.items() if n in wanted}
    if config.phash:
        thirds = [luma[round(p * (len(luma) - 1))] for p in (0.2, 0.5, 0.8)]
        out |= dict(zip(HASHES, map(phash, thirds)))
    if config.clip is not None:
        out |= _clip(config.clip).scores(frames, caption)
    return out


def decoded(coded: np.ndarray) -> np.ndarray:
    """A frame of a record: JPEG uint8 (N,) to uint8 (H, W, 3) sRGB."""
    return cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB)


def motion(clip: Clip, where: np.ndarray, frames: list[np.ndarray]) -> float:
    """Mean length of the optical flow (DIS) to the next frame, in shorter sides a second.

    Args:
      clip: at least one frame; one alone does not move.
      where: numbers of the frames looked at; frames: those, uint8 (H, W, 3) sRGB.
    """
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    speeds = []
    for i, frame in zip(where, frames):
        if i + 1 == len(clip.coded):
            continue
        pair = [
            cv2.cvtColor(video.shrink(f, _FLOW_SIDE), cv2.COLOR_RGB2GRAY)
            for f in (frame, decoded(clip.coded[i + 1]))
        ]
        if min(pair[0].shape) < 16:  # smaller than the patches of the flow
            continue
        vectors = flow.calc(*pair, None)
        length = np.linalg.norm(vectors, axis=-1).mean() / min(pair[0].shape)
        speeds.append(length / (clip.times[i + 1] - clip.times[i]))
    return float(np.mean(speeds)) if speeds else 0.0


def sharpness(luma: list[np.ndarray]) -> float:
    """Median over the frames of the variance of the Laplacian; luma: uint8 (H, W)."""
    small = [video.shrink(y, _SHARP_SIDE) for y in luma]
    return float(np.median([cv2.Laplacian(y, cv2.CV_32F).var() for y in small]))


def letterbox(luma: list[np.ndarray]) -> float:
    """Share of the picture outside the rows and columns that are not black in some frame.

    0.0 for frames that are black all over. luma: uint8 (H, W).
    """
    bright = np.max(np.stack(luma), axis=0)
    sides = []
    for axis in (0, 1):
        lines = np.percentile(bright, _ALMOST_ALL, axis=1 - axis) >= _BLACK
        inside = np.flatnonzero(lines)
        if not inside.size:
            return 0.0
        sides.append((inside[-1] - inside[0] + 1) / len(lines))
    return float(1 - sides[0] * sides[1])


def _is_black(luma: np.ndarray) -> bool:
    return bool(np.mean(luma < _BLACK) >= _ALMOST_ALL / 100)


def text_area(frames: list[np.ndarray]) -> float:
    """Share of the picture in the boxes of text that the detector finds, mean over three frames."""
    chosen = [frames[round(p * (len(frames) - 1))] for p in np.linspace(0.2, 0.8, _TEXT_FRAMES)]
    areas = []
    for frame in chosen:
        boxes, _ = _text_detector()(np.ascontiguousarray(frame[..., ::-1]))
        mask = np.zeros(frame.shape[:2], np.uint8)
        for box in boxes if boxes is not None else ():
            cv2.fillPoly(mask, [np.round(box).astype(np.int32)], 1)
        areas.append(mask.mean())
    return float(np.mean(areas))


def phash(luma: np.ndarray) -> int:
    """Perceptual hash: the signs of the 8x8 lowest DCT coefficients about their median.

    Args:
      luma: uint8 (H, W).

    Returns:
      64 bits as a signed int.
    """
    small = cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int(np.packbits(bits).view(">i8")[0])


class _Locked:
    """A detector with state, for several threads."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call, self._lock = call, threading.Lock()

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            return self._call(*args)


@functools.lru_cache(maxsize=1)
def _text_detector() -> Callable[[np.ndarray], tuple[Any, float]]:
    try:
        import rapidocr_onnxruntime
        from rapidocr_onnxruntime.ch_ppocr_det import TextDetector
    except ImportError as error:
        raise UserError(
            f"config.scores.text_area needs RapidOCR ({error}): pip install 'walt_jax[ocr]', or "
            "turn it off."
        ) from error
    models = f"{rapidocr_onnxruntime.__path__[0]}/models"
    detector = TextDetector(
        {
            "model_path": f"{models}/ch_PP-OCRv4_det_infer.onnx",
            "use_cuda": False,
            "use_dml": False,
            "intra_op_num_threads": 1,
            "inter_op_num_threads": 1,
            "limit_type": "max",  # as they are: enlarging costs most of the time
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        }
    )
    return _Locked(detector)


@functools.lru_cache(maxsize=1)
def _clip(config: ClipModel) -> "_Clip":
    return _Clip(config)


class _Clip:
    """CLIP's towers in ONNX Runtime, and a linear head for aesthetics."""

    def __init__(self, config: ClipModel) -> None:
        self._config = config
        self._image = _session(config.image)
        self._text = self._tokenizer = self._head = None
        if config.text is not None:
            self._text, self._tokenizer = _session(config.text), _tokenizer(config)
        if config.aesthetic_head is not None:
            from walt_jax.weights import load_weights  # with JAX, which workers do not need

            head = load_weights(config.aesthetic_head.source, config.aesthetic_head.sha256)
            if set(head) != {"weight", "bias"}:
                raise UserError(
                    f"{config.aesthetic_head.source} must hold the arrays weight and bias alone, "
                    f"it holds {', '.join(sorted(head)) or 'none'}: give a linear head."
                )
            self._head = head["weight"].reshape(-1).astype(np.float32), float(head["bias"].item())

    def scores(self, frames: list[np.ndarray], caption: str) -> dict[str, float]:
        images = _unit(self._run(self._image, pixel_values=self._pixels(frames)))
        out = {}
        if self._head is not None:
            weight, bias = self._head
            if weight.size != images.shape[1]:
                raise UserError(
                    f"{self._config.aesthetic_head.source} is a head for embeddings of "
                    f"{weight.size} numbers, {self._config.image.source} gives {images.shape[1]}: "
                    "give those of one model."
                )
            out["aesthetic"] = float(np.mean(images @ weight + bias))
        if self._text is not None:
            # Without a caption nothing can match.
            out["text_match"] = float(np.mean(images @ self._embed(caption))) if caption else 0.0
        return out

    def _embed(self, caption: str) -> np.ndarray:
        ids = np.array([self._tokenizer.encode(caption).ids], np.int64)
        return _unit(self._run(self._text, input_ids=ids, attention_mask=np.ones_like(ids)))[0]

    def _pixels(self, frames: list[np.ndarray]) -> np.ndarray:
        """As CLIP was trained: shorter side to `size` (bicubic), centre crop, normalised."""
        size, out = self._config.size, []
        for frame in frames:
            height, width = frame.shape[:2]
            scale = size / min(height, width)
            shape = max(size, round(width * scale)), max(size, round(height * scale))
            image = PIL.Image.fromarray(frame).resize(shape, PIL.Image.Resampling.BICUBIC)
            left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
            crop = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
            out.append(((crop - _CLIP_MEAN) / _CLIP_STD).transpose(2, 0, 1))
        return np.stack(out)

    def _run(self, session: Any, **inputs: np.ndarray) -> np.ndarray:
        names = {i.name for i in session.get_inputs()}
        outputs = {o.name: o for o in session.get_outputs()}
        chosen = next((n for n in ("image_embeds", "text_embeds") if n in outputs), None)
        if chosen is None:
            chosen = next(n for n, o in outputs.items() if len(o.shape) == 2)
        return session.run([chosen], {n: x for n, x in inputs.items() if n in names})[0]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _session(file: ModelFile) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "config.scores.clip needs ONNX Runtime: pip install 'walt_jax[data]', or turn it off."
        ) from error
    path = _local(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the other cores have clips of their own
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=onnxruntime.get_available_providers()
        )
    except Exception as error:  # of its own kinds, not exported
        raise UserError(f"{path} is no ONNX model ({error}): export the tower as ONNX.") from error


def _local(file: ModelFile) -> Path:
    from walt_jax.weights import read_file  # with JAX, which most workers do not need

    return Path(read_file(file.source, file.sha256)[0])


def _tokenizer(config: ClipModel) -> Any:
    if config.tokenizer is None:
        raise UserError(
            "config.scores.clip.text needs config.scores.clip.tokenizer: give the tokenizer.json "
            "of the same model."
        )
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "config.scores.clip.text needs the tokenizers library: pip install 'walt_jax[text]'."
        ) from error
    path = _local(config.tokenizer)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # a plain Exception
        raise UserError(f"{path} is no tokenizer.json ({error}): get it again.") from error
    tokenizer.enable_truncation(config.context)
    return tokenizer
