"""Decoding: real clips, and every hard case made here with PyAV."""

import os
import re
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from walt_jax import media
from walt_jax.data import video
from walt_jax.errors import UserError

CLIPS = Path(
    os.environ.get("WALT_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "clips")
)
RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 180, 40), (40, 40, 210), (225, 225, 225)


def quadrants(height=64, width=96):
    """Red, green / blue, white: tells every orientation from every other."""
    image = np.empty((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:], image[h:, :w], image[h:, w:] = RED, GREEN, BLUE, WHITE
    return image


def write(
    path,
    images,
    *,
    pts=None,
    codec="libx264",
    pix_fmt="yuv444p",
    time_base=Fraction(1, 1000),
    matrix=None,
    aspect=None,
    options=(),
):
    """Encodes RGB images with times in ticks of `time_base`."""
    pts = pts if pts is not None else [40 * i for i in range(len(images))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        if codec == "libx264":
            stream.options = {"crf": "10", "bf": "0", **dict(options)}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for image, tick in zip(images, pts):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def corners(image):
    """Mean colours at the four quadrant centres, row by row."""
    h, w = image.shape[:2]
    return [image[y, x].astype(int) for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]


def assert_corners(image, *expected, tolerance=12):
    for got, want in zip(corners(image), expected):
        np.testing.assert_allclose(got, want, atol=tolerance)


def manifest():
    rows = (CLIPS / "MANIFEST.md").read_text().splitlines() if CLIPS.is_dir() else []
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows if row.count("|") > 10]
    return [c for c in cells if re.search(r"\.\w+$", c[0])]


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}")
@pytest.mark.parametrize("row", manifest(), ids=lambda row: row[0])
def test_real_clips(row):
    path, size, frames = CLIPS / row[0], row[3], int(row[5])
    out = video.read_video(path, short_side=48, threads=1)
    width, height = map(int, size.split("x"))
    assert len(out.frames) == frames
    assert min(out.frames.shape[1:3]) == 48
    assert out.frames.shape[2] / out.frames.shape[1] == pytest.approx(width / height, rel=0.02)
    assert out.times[0] == 0 and (np.diff(out.times) > 0).all()
    info = video.probe(path)
    assert (info.width, info.height) == (width, height)
    nominal = float(Fraction(row[4].split()[0]))
    assert (frames - 1) / out.times[-1] == pytest.approx(nominal, rel=0.04)
    assert info.duration == pytest.approx(out.times[-1] + 1 / nominal, abs=0.15)


def test_variable_rate_and_odd_start(tmp_path):
    ticks = [5017, 5050, 5150, 5151, 5400]
    write(tmp_path / "vfr.mkv", [quadrants()] * 5, pts=ticks)
    times = video.read_video(tmp_path / "vfr.mkv").times
    np.testing.assert_allclose(times, (np.array(ticks) - 5017) / 1000, atol=1e-9)


def test_missing_time_stamps(tmp_path):
    write(tmp_path / "raw.h264", [quadrants()] * 6, time_base=Fraction(1, 25), pts=range(6))
    times = video.read_video(tmp_path / "raw.h264").times
    assert times[0] == 0 and len(times) == 6
    np.testing.assert_allclose(np.diff(times), 1 / 25, rtol=0.05)


def test_backward_time_stamps(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", [quadrants()] * 4)
    stamps = iter([1.0, 1.04, 0.5, None])
    monkeypatch.setattr(video, "_stamp", lambda frame: next(stamps, None))
    origin, *_ = times = video.read_video(tmp_path / "a.mp4", threads=1).times
    assert origin == 0 and (np.diff(times) > 0).all()


@pytest.mark.parametrize("start, end, first, count", [(0, None, 0, 100), (2.0, 3.0, 50, 25)])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_start_and_end(tmp_path, suffix, start, end, first, count):
    images = [np.full((32, 32, 3), 2 * i + 20, np.uint8) for i in range(100)]
    ticks = [7000 + 40 * i for i in range(100)]
    path = write(
        tmp_path / f"a.{suffix}", images, pts=ticks, pix_fmt="yuv420p", options={"g": "30"}
    )
    out = video.read_video(path, start=start, end=end)
    assert len(out.frames) == count
    np.testing.assert_allclose(out.times, np.arange(count) / 25, atol=1e-6)
    np.testing.assert_allclose(
        out.frames[:, 9, 9, 1], 2 * np.arange(first, first + count) + 20, atol=3
    )


ONE = 1 << 16
ORIENTATIONS = {  # FFmpeg's 16.16 matrix rows (a b u, c d v, x y w) -> where the colours go
    "none": ((ONE, 0, 0, ONE), (RED, GREEN, BLUE, WHITE)),
    "clockwise 90": ((0, ONE, -ONE, 0), (BLUE, RED, WHITE, GREEN)),
    "180": ((-ONE, 0, 0, -ONE), (WHITE, BLUE, GREEN, RED)),
    "clockwise 270": ((0, -ONE, ONE, 0), (GREEN, WHITE, RED, BLUE)),
    "mirror": ((-ONE, 0, 0, ONE), (GREEN, RED, WHITE, BLUE)),
    "upside down": ((ONE, 0, 0, -ONE), (BLUE, WHITE, RED, GREEN)),
    "transpose": ((0, ONE, ONE, 0), (RED, BLUE, GREEN, WHITE)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_display_matrix(tmp_path, name):
    (a, b, c, d), expected = ORIENTATIONS[name]
    path = write(tmp_path / "a.mp4", [quadrants()] * 2, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    frame = video.read_video(path).frames[0]
    assert frame.shape == ((64, 96, 3) if b == 0 else (96, 64, 3))
    assert_corners(frame, *expected)


# EXIF's orientations, by what has to be done to the stored image.
EXIF = dict(
    enumerate(["none", "mirror", "180", "upside down", "transpose", "clockwise 90"], start=1)
) | {8: "clockwise 270"}


@pytest.mark.parametrize("orientation", EXIF)
def test_images_stand_upright(tmp_path, orientation):
    exif, expected = Image.Exif(), ORIENTATIONS[EXIF[orientation]][1]
    exif[0x112] = orientation
    Image.fromarray(quadrants()).save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert_corners(video.read_image(tmp_path / "a.jpg"), *expected)
    assert min(video.read_image(tmp_path / "a.jpg", 16).shape[:2]) == 16
    if orientation in (1, 3, 6, 8):  # FFmpeg's rotation knows no mirror
        assert_corners(video.read_video(tmp_path / "a.jpg").frames[0], *expected)


@pytest.mark.parametrize("suffix", sorted(video.IMAGES))
def test_every_kind_of_image(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(quadrants()).save(path)
    assert_corners(video.read_image(path), RED, GREEN, BLUE, WHITE)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=rf"a\{suffix} cannot be decoded as an image"):
        video.read_image(path)


@pytest.mark.parametrize("aspect, size", [(Fraction(2), (32, 96)), (Fraction(1, 2), (64, 48))])
def test_pixel_aspect(tmp_path, aspect, size):
    path = write(tmp_path / "a.mkv", [quadrants()] * 2, aspect=aspect)
    frame = video.read_video(path).frames[0]
    assert frame.shape[:2] == size
    assert_corners(frame, RED, GREEN, BLUE, WHITE)


def yuv(rgb, kr, kb, full, levels=255):
    """One colour by the book, the inverse of what the decoder does."""
    r, g, b = np.array(rgb) / 255
    y = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    scale = (levels + 1) / 256
    if full:
        return [y * levels, *(c * levels + 128 * scale for c in chroma)]
    return [(16 + 219 * y) * scale, *((128 + 224 * c) * scale for c in chroma)]


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, WHITE])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "space, kr, kb", [(5, 0.299, 0.114), (1, 0.2126, 0.0722), (2, 0.299, 0.114)]
)
def test_matrix_and_range(tmp_path, space, kr, kb, full, colour):
    planes = [np.full((32, 32), round(v), np.uint8) for v in yuv(colour, kr, kb, full)]
    frame = np.stack(planes)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = 2 if full else 1
        picture = av.VideoFrame.from_ndarray(frame, format="yuv444p")
        picture.colorspace, picture.color_range = space, 2 if full else 1
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    np.testing.assert_allclose(video.read_video(path).frames[0, 9, 9], colour, atol=2)


def write_ten_bit(path, rgb, *, space, primaries, transfer, kr, kb):
    """One frame of one colour as limited-range yuv420p10 with its tags."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p10le"
        frame = av.VideoFrame(32, 32, "yuv420p10le")
        for plane, value in zip(frame.planes, yuv(rgb, kr, kb, False, levels=1023)):
            plane.update(np.full(plane.buffer_size // 2, round(value), "<u2").tobytes())
        tags = {"colorspace": space, "color_primaries": primaries, "color_trc": transfer}
        for name, value in {**tags, "color_range": 1}.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("colour", [RED, WHITE, (128, 128, 128)])
def test_ten_bit(tmp_path, colour):
    path = write_ten_bit(
        tmp_path / "a.mkv", colour, space=1, primaries=1, transfer=1, kr=0.2126, kb=0.0722
    )
    frame = video.read_video(path).frames[0]
    assert frame.dtype == np.uint8
    np.testing.assert_allclose(frame[9, 9], colour, atol=2)


def pq(nits):
    """SMPTE ST 2084's inverse EOTF, in 0..255."""
    power = (np.asarray(nits) / 10000) ** 0.1593017578125
    return 255 * ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def test_hdr_pq(tmp_path):
    def shown(nits):
        path = write_ten_bit(
            tmp_path / "a.mkv", pq(nits), space=9, primaries=9, transfer=16, kr=0.2627, kb=0.0593
        )
        return video.read_video(path).frames[0, 9, 9].astype(int)

    grays = [shown([n] * 3) for n in (0.001, 20, 50, 203, 500, 1000, 4000)]
    assert all(g.max() - g.min() <= 2 for g in grays)
    levels = [g.mean() for g in grays]
    assert levels == sorted(levels) and levels[0] <= 1 and levels[-1] == 255
    # Below the knee nothing but the sRGB curve: 50 of 203 cd/m^2.
    linear = 50 / 203
    assert levels[2] == pytest.approx(255 * (1.055 * linear ** (1 / 2.4) - 0.055), abs=2)
    assert 215 < levels[3] < 240  # reference white leaves room for the highlights
    red = shown([100, 10, 10])
    assert red[0] > 1.5 * red[1]


def test_hdr_hlg(tmp_path):
    levels = []
    for signal in (0, 90, 191, 255):
        path = write_ten_bit(
            tmp_path / "a.mkv",
            [signal] * 3,
            space=9,
            primaries=9,
            transfer=18,
            kr=0.2627,
            kb=0.0593,
        )
        levels.append(video.read_video(path).frames[0, 9, 9].mean())
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] >= 254
    assert 215 < levels[2] < 240  # HLG's 75 % is reference white


def test_gray_alpha_and_odd_size(tmp_path):
    gray = np.repeat(quadrants(33, 47).mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    for pix_fmt in ("gray", "bgra", "yuva420p", "gbrp10le"):
        path = write(tmp_path / f"{pix_fmt}.mkv", [gray], codec="ffv1", pix_fmt=pix_fmt)
        frames = video.read_video(path).frames
        assert frames.shape == (1, 33, 47, 3)
        np.testing.assert_allclose(frames[0].astype(int), gray, atol=2)


def test_shrinks_by_area_and_never_enlarges(tmp_path):
    rng = np.random.default_rng(0)
    noise = cv2.resize(rng.integers(0, 255, (16, 24, 3)).astype(np.uint8), (240, 160))
    path = write(tmp_path / "a.mkv", [noise], codec="ffv1", pix_fmt="bgra")
    small = video.read_video(path, short_side=40).frames[0]
    area = video.shrink(noise, 40)
    assert small.shape == area.shape == (40, 60, 3)
    assert np.abs(small.astype(int) - area).mean() < 1
    assert video.read_video(path, short_side=500).frames.shape == (1, 160, 240, 3)


def test_largest_video_stream_without_cover_art(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for size in (32, 64):
            stream = container.add_stream("libx264", rate=25)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.disposition = 0
            streams.append(stream)
        for stream in streams:
            for i in range(3):
                image = np.zeros((stream.height, stream.width, 3), np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert video.read_video(path).frames.shape == (3, 64, 64, 3)

    still = av.stream.Disposition.attached_pic
    kinds = [(32, 0), (512, still), (64, 0)]

    class Fake:
        def __init__(self, index, size, disposition):
            self.index, self.disposition = index, av.stream.Disposition(disposition)
            self.codec_context = type("Context", (), {"width": size, "height": size})

    fakes = [Fake(i, *kind) for i, kind in enumerate(kinds)]
    container = type("C", (), {"streams": type("S", (), {"video": fakes})})
    assert video._best_stream(container, path) is fakes[2]


def broken_files(folder):
    whole = folder / "whole.mp4"
    media.write_mp4(whole, np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8), 25)
    data = whole.read_bytes()
    (folder / "no_index.mp4").write_bytes(data[: len(data) // 2])
    moved = folder / "moved.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(moved), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = moved.read_bytes()
    moved.unlink()
    whole.unlink()
    (folder / "index_first.mp4").write_bytes(data[: len(data) * 2 // 3])
    cut = write(folder / "cut.mkv", [quadrants()] * 8)
    cut.write_bytes(cut.read_bytes()[:-200])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "no_index.mp4": "cannot be decoded",
        "index_first.mp4": "truncated",
        "cut.mkv": "truncated",
        "zero.mp4": "empty",
        "text.mp4": "cannot be decoded",
        "sound.mp4": "no video stream",
        "absent.mp4": "not a file",
    }


def test_broken_files(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(UserError, match=reason) as caught:
            video.read_video(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_bad_times(tmp_path):
    path = write(tmp_path / "a.mkv", [quadrants()] * 3)
    with pytest.raises(UserError, match="no video frame from 5 s to its end"):
        video.read_video(path, start=5)
    with pytest.raises(UserError, match="start < end"):
        video.read_video(path, start=1, end=1)
