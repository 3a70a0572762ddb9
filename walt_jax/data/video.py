"""Decoding videos and images of any kind to upright, square-pixel, 8-bit sRGB frames with times.

Everything that makes a file differ from a plain array is resolved here, so that nothing later has
to know: the stream is chosen as ffmpeg chooses it (cover art and thumbnails do not count, audio is
ignored), times come from time stamps, the display matrix (rotation, mirror) and the pixel aspect
are applied, YCbCr becomes RGB by the file's own matrix and range, and HDR is tone-mapped.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Interpolation

from walt_jax.data.truncation import check_not_truncated
from walt_jax.errors import UserError

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("3gp", "asf", "avi", "divx", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg"),
        *("mpg", "mts", "mxf", "ogv", "ts", "vob", "webm", "wmv", "y4m"),
    )
)
IMAGES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))

# Accurate and the same on every CPU; swscale's defaults are up to 2 levels off and keep only one
# chroma sample for two pixels.
_EXACT = (
    Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)
# FFmpeg's AVCOL_SPC_* (what a stream says) -> swscale's SWS_CS_* (what the converter takes).
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_BT601, _BT709 = 5, 1
_PRIMARIES_BT2020 = 9
_TRANSFER_PQ, _TRANSFER_HLG = 16, 18
_FULL_RANGE = 2
_JPEG_FLAGS = [
    *(cv2.IMWRITE_JPEG_QUALITY, 90),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
]
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)  # ITU-R BT.2087, linear light


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the header says, without decoding.

    Attributes:
      width, height: coded size in pixels, before rotation and pixel aspect.
      fps: average frames a second, 0.0 where unknown.
      duration: seconds, 0.0 where unknown.
      codec, pixel_format: FFmpeg's names, as in 'h264' and 'yuv420p'.
    """

    width: int
    height: int
    fps: float
    duration: float
    codec: str
    pixel_format: str


@dataclasses.dataclass(frozen=True)
class Video:
    """A decoded video: frames uint8 (T, H, W, 3) sRGB; times float64 (T,), seconds from 0."""

    frames: np.ndarray
    times: np.ndarray


def probe(path: str | Path) -> VideoInfo:
    """Reads a file's header. Raises UserError for what is not a readable video."""
    with _opened(path) as (container, stream):
        duration = 0.0
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            duration = container.duration / av.time_base
        context = stream.codec_context
        return VideoInfo(
            width=context.width,
            height=context.height,
            fps=float(stream.average_rate or 0),
            duration=duration,
            codec=context.name,
            pixel_format=context.pix_fmt or "",
        )


def read_video(
    path: str | Path,
    *,
    start: float = 0.0,
    end: float | None = None,
    short_side: int | None = None,
    threads: int = 0,
) -> Video:
    """Decodes a whole file into memory; the arguments are those of `iter_frames`."""
    times, frames = zip(
        *iter_frames(path, start=start, end=end, short_side=short_side, threads=threads)
    )
    return Video(np.stack(frames), np.array(times, np.float64))


def iter_frames(
    path: str | Path,
    *,
    start: float = 0.0,
    end: float | None = None,
    short_side: int | None = None,
    threads: int = 0,
) -> Iterator[tuple[float, np.ndarray]]:
    """Decodes a file frame by frame.

    Args:
      path: a video file.
      start: seconds from the file's first frame; earlier frames are left out.
      end: seconds from the file's first frame; frames at or after it are left out.
      short_side: shrink so that the shorter side has at most this many pixels (area average);
        smaller videos are left as they are.
      threads: decoder threads; 0 lets FFmpeg choose. The result does not depend on it.

    Yields:
      (time, frame): seconds from the first frame kept, strictly increasing from 0.0, and uint8
      (H, W, 3) sRGB. All frames of a file have the size of the first one kept.

    Raises:
      UserError: not a video, no video stream, truncated or damaged, or no frame in [start, end).
    """
    if short_side is not None and short_side < 1:
        raise UserError(
            f"short_side must be at least 1 pixel, got {short_side}: give a larger one."
        )
    if start < 0 or (end is not None and end <= start):
        raise UserError(
            f"{path}: start {start:g} s and end {end} s must satisfy 0 <= start < end: correct them"
        )
    offset, size, matrix = None, None, None
    with _opened(path, threads=threads) as (container, stream):
        for time, frame in _timed_frames(container, stream, start):
            if end is not None and time >= end:
                break
            if time < start:
                continue
            if offset is None:
                offset = time
                size = _square_pixel_size(frame, stream.sample_aspect_ratio, short_side)
                # Of one frame only: asking for side data ties a frame into a reference cycle.
                matrix = _display_matrix(frame)
            yield time - offset, _orient(_to_srgb(frame, *size), matrix)
    if offset is None:
        until = "its end" if end is None else f"{end:g} s"
        raise UserError(
            f"{path} holds no video frame from {start:g} s to {until}: leave it out or correct "
            "its start and end."
        )


def read_image(path: str | Path, short_side: int | None = None) -> np.ndarray:
    """An image file, upright as its EXIF says and shrunk as by `shrink`: uint8 (H, W, 3) sRGB.

    Raises:
      UserError: not an image that can be decoded.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise UserError(
            f"{path} cannot be decoded as an image: fetch it again, convert it, or leave it out."
        )
    return shrink(image, short_side)


def shrink(frame: np.ndarray, short_side: int | None) -> np.ndarray:
    """Area-averages uint8 (H, W, 3) to at most `short_side` pixels on its shorter side."""
    height, width = frame.shape[:2]
    if short_side is None or min(height, width) <= short_side:
        return frame
    scale = short_side / min(height, width)
    size = round(width * scale), round(height * scale)
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def encode_frame(frame: np.ndarray) -> np.ndarray:
    """Compresses a uint8 (H, W, 3) sRGB frame the way records hold it: JPEG as uint8 (N,)."""
    return cv2.imencode(".jpg", frame[..., ::-1], _JPEG_FLAGS)[1].reshape(-1)


@contextlib.contextmanager
def _opened(
    path: str | Path, threads: int = 0
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens `path` on its best video stream; whatever FFmpeg complains about is a UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: check the path.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): fetch it again or leave it out.")
    try:
        # Playlists in disguise must not reach the network.
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            stream = _best_stream(container, path)
            check_not_truncated(stream, path)
            stream.codec_context.thread_count = threads
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(
            f"{path} cannot be decoded as video ({error.strerror}): fetch it again, convert it "
            "with ffmpeg, or leave it out."
        ) from error


def _best_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The default stream, then the largest, then the first: the rule of the ffmpeg command."""
    still = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [
        s
        for s in container.streams.video
        if not s.disposition & still and s.codec_context is not None and s.codec_context.width
    ]
    if not streams:
        raise UserError(f"{path} holds no video stream that can be decoded: leave it out.")

    def rank(stream: av.VideoStream) -> tuple[bool, int, int]:
        default = bool(stream.disposition & av.stream.Disposition.default)
        return default, stream.codec_context.width * stream.codec_context.height, -stream.index

    return max(streams, key=rank)


def _timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream, start: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields (seconds from the file's first frame, frame), strictly increasing.

    Jumps to the key frame before `start` where the file's time stamps allow it. A missing or
    backward time stamp is replaced by the last time plus the average frame duration.
    """
    step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None:
        return
    origin, last = _stamp(first), None
    if start > 1 and origin is not None:
        container.seek(int((origin + start) / stream.time_base), stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames, None)
        landed = None if first is None else _stamp(first)
        if landed is None or landed - origin > start:  # no key frame before it: from the beginning
            container.seek(0)
            frames = container.decode(stream)
            first, landed = next(frames), origin
        last = landed - origin - step
    for frame in itertools.chain([first], frames):
        stamp = _stamp(frame)
        time = 0.0 if stamp is None or origin is None else stamp - origin
        if last is None:
            time = 0.0
        elif time <= last:
            time = last + step
        last = time
        yield time, frame


def _stamp(frame: av.VideoFrame) -> float | None:
    """A frame's time in seconds on the file's own clock; AVI has decoding times only."""
    ticks = frame.pts if frame.pts is not None else frame.dts
    return None if ticks is None or frame.time_base is None else float(ticks * frame.time_base)


def _square_pixel_size(
    frame: av.VideoFrame, pixel_aspect: object, short_side: int | None
) -> tuple[int, int]:
    """(width, height) with square pixels. The axis sampled too densely shrinks; nothing grows."""
    width, height = float(frame.width), float(frame.height)
    aspect = float(pixel_aspect or 1)
    if 0.1 < aspect < 10:  # beyond that the header is broken
        width, height = width * min(aspect, 1), height / max(aspect, 1)
    if short_side is not None:
        scale = min(1.0, short_side / min(width, height))
        width, height = width * scale, height * scale
    return max(1, round(width)), max(1, round(height))


def _to_srgb(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Colour conversion and shrinking in one pass of swscale: uint8 (height, width, 3) sRGB."""
    matrix = _MATRICES.get(frame.colorspace)
    if matrix is None:  # players assume BT.709 for HD and BT.601 below when a file does not say
        matrix = _BT709 if frame.height >= 720 or frame.width >= 1280 else _BT601
    wide = frame.color_primaries == _PRIMARIES_BT2020
    hdr = frame.color_trc in (_TRANSFER_PQ, _TRANSFER_HLG)
    same_size = (width, height) == (frame.width, frame.height)
    rgb = frame.reformat(
        width=width,
        height=height,
        format="rgb48le" if wide or hdr else "rgb24",
        src_colorspace=matrix,
        src_color_range=frame.color_range or ColorRange.UNSPECIFIED,
        dst_color_range=ColorRange.JPEG,
        interpolation=_EXACT | (Interpolation.BICUBIC if same_size else Interpolation.AREA),
        threads=1,  # `prepare` decodes many files side by side
    ).to_ndarray()
    return _wide_to_srgb(rgb, frame.color_trc) if wide or hdr else rgb


def _wide_to_srgb(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """BT.2020 (PQ, HLG or SDR) uint16 (H, W, 3) -> uint8 sRGB.

    1. To linear light in units of reference white: the transfer's EOTF, with white at 203 cd/m^2
       for PQ and HLG (ITU-R BT.2408) and at 1 for SDR.
    2. To BT.709 primaries by BT.2087's matrix, clipping negatives.
    3. HDR only: m = max(R, G, B) is kept up to the knee k = 0.5; above it, with
       t = (m - k) / (1 - k), it becomes k + (1 - k) t (1 + t / p^2) / (1 + t) (extended Reinhard)
       where p is the t of 1000 cd/m^2, which lands on 1. Scaling R, G and B by new m / m keeps the
       hue; the slope at k is 1, so mid-tones stay as they are.
    4. The sRGB curve.
    """
    linear = cv2.transform(_eotf(transfer)[rgb], _BT2020_TO_BT709)
    np.maximum(linear, 0, out=linear)
    if transfer in (_TRANSFER_PQ, _TRANSFER_HLG):
        knee = 0.5
        peak = (1000 / 203 - knee) / (1 - knee)
        m = linear.max(axis=-1, keepdims=True)
        t = np.maximum(m - knee, 0) / (1 - knee)
        mapped = knee + (1 - knee) * t * (1 + t / peak**2) / (1 + t)
        linear *= np.where(m > knee, mapped / np.maximum(m, knee), 1).astype(np.float32)
    return _srgb_curve()[(np.minimum(linear, 1) * 65535 + 0.5).astype(np.uint16)]


@functools.cache
def _eotf(transfer: int) -> np.ndarray:
    """Table of a transfer function: float32 (65536,), linear light, 1 = reference white."""
    x = np.linspace(0, 1, 65536)
    if transfer == _TRANSFER_PQ:  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        power = x ** (1 / m2)
        linear = 10000 / 203 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    elif transfer == _TRANSFER_HLG:  # ARIB STD-B67; the display's gamma of 1.2, a channel each
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        linear = np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12)
        linear = 1000 / 203 * linear**1.2
    else:  # what displays do with SDR: BT.1886 with black at 0
        linear = x**2.4
    return linear.astype(np.float32)


@functools.cache
def _srgb_curve() -> np.ndarray:
    """Table of IEC 61966-2-1: linear light in 65536 steps -> uint8 (65536,)."""
    x = np.linspace(0, 1, 65536)
    curve = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return np.round(255 * curve).astype(np.uint8)


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """The linear part of the display matrix, (2, 2): (x', y') = (x, y) @ matrix, or None."""
    try:
        data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # data that PyAV has no name for, such as EXIF, hide all others from it
        c, s = np.cos(np.deg2rad(frame.rotation)), np.sin(np.deg2rad(frame.rotation))
        return np.array([[c, -s], [s, c]])
    return None if data is None else np.frombuffer(data, "<i4").reshape(3, 3)[:2, :2]


def _orient(image: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Turns and mirrors an image (H, W, 3) by the nearest of the eight upright orientations."""
    if matrix is None:
        return image
    (a, b), (c, d) = matrix.tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        flip_x, flip_y = a < 0, d < 0
    else:
        image, flip_x, flip_y = image.transpose(1, 0, 2), c < 0, b < 0
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
