"""Files that people look at: videos, frame grids and the gallery page."""

import urllib.parse
from html.parser import HTMLParser

import av
import cv2
import numpy as np
import pytest

from walt_jax.gallery import Section, write_gallery
from walt_jax.media import frame_grid, write_mp4, write_png


def moving(frames, height, width):
    """Smooth colours that move, uint8 (T, H, W, 3)."""
    t, y, x = np.mgrid[:frames, :height, :width] * 0.07
    channels = [np.sin(x + t), np.sin(y - t), np.cos(0.5 * (x + y) + t)]
    return np.uint8(127 + 100 * np.stack(channels, -1))


def read_mp4(path):
    with av.open(str(path)) as container:
        (stream,) = container.streams
        rate = stream.average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return np.stack(frames), rate, stream.codec_context.name


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


# Videos


@pytest.mark.parametrize(
    "fps, rate",
    [(8, 8), (12.5, 12.5), (30000 / 1001, 30000 / 1001), (29.97, 29.97), (np.float32(8), 8)],
)
def test_mp4_comes_back(tmp_path, fps, rate):
    frames = moving(9, 48, 64)
    write_mp4(tmp_path / "a.mp4", frames, fps)
    read, read_rate, codec = read_mp4(tmp_path / "a.mp4")
    assert read.shape == frames.shape
    assert float(read_rate) == pytest.approx(rate, rel=1e-6)
    assert codec == "h264"
    assert min(psnr(a, b) for a, b in zip(read, frames)) > 35


def test_mp4_keeps_the_channels_apart(tmp_path):
    """Pure red, green and blue frames come back in this order."""
    frames = np.repeat(np.eye(3, dtype=np.uint8)[:, None, None] * 200, 16, 1).repeat(16, 2)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    read, *_ = read_mp4(tmp_path / "a.mp4")
    assert read.mean((1, 2)).argmax(-1).tolist() == [0, 1, 2]


def test_crf_trades_size_for_fidelity(tmp_path):
    frames = moving(8, 64, 64)
    fine, coarse = tmp_path / "fine.mp4", tmp_path / "coarse.mp4"
    write_mp4(fine, frames, 8, crf=5)
    write_mp4(coarse, frames, 8, crf=40)
    assert fine.stat().st_size > 2 * coarse.stat().st_size
    assert psnr(read_mp4(fine)[0], frames) > psnr(read_mp4(coarse)[0], frames) + 3


@pytest.mark.parametrize("size", [(33, 47), (33, 48), (32, 47)])
def test_mp4_of_odd_size_is_padded_by_its_edge(tmp_path, size):
    frames = moving(4, *size)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    read, *_ = read_mp4(tmp_path / "a.mp4")
    assert read.shape == (4, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert psnr(read[:, : size[0], : size[1]], frames) > 35
    padded = np.pad(frames, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
    assert psnr(read, padded) > 35


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 3), np.int64),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_mp4_refuses_other_arrays(tmp_path, frames):
    with pytest.raises(ValueError, match=rf"uint8 \(T, H, W, 3\), got {frames.dtype} .*a\.mp4"):
        write_mp4(tmp_path / "a.mp4", frames, 8)
    assert not (tmp_path / "a.mp4").exists()


# Pictures


def test_png_comes_back_exactly(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png"))[..., ::-1], image)


def test_png_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"a\.png"):
        write_png(tmp_path / "missing" / "a.png", np.zeros((2, 2, 3), np.uint8))


def test_frame_grid_has_a_row_a_video_and_evenly_spaced_frames():
    n, t, h, w = 2, 9, 3, 5
    values = (10 * np.arange(n)[:, None] + np.arange(t)).astype(np.uint8)  # video, frame
    videos = np.broadcast_to(values[:, :, None, None, None], (n, t, h, w, 3))
    grid = frame_grid(videos, columns=3, pad=2)
    assert grid.shape == (n * (h + 2), 3 * (w + 2), 3) and grid.dtype == np.uint8
    cells = grid.reshape(n, h + 2, 3, w + 2, 3)
    for i in range(n):
        for j, frame in enumerate((0, 4, 8)):
            assert (cells[i, :h, j, :w] == values[i, frame]).all()
    assert (cells[:, h:] == 255).all() and (cells[:, :, :, w:] == 255).all()


def test_frame_grid_keeps_rows_and_columns_of_the_pixels():
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6, 3), np.uint8)
    grid = frame_grid(videos, pad=0)
    assert grid.shape == (8, 18, 3)  # fewer frames than columns: each frame once
    np.testing.assert_array_equal(grid[4:, 6:12], videos[1, 1])


# The page


class Page(HTMLParser):
    """Tags with their attributes, and the text of each tag that has some."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self._open, []).append(data)

    def files(self, tag):
        return [urllib.parse.unquote(attrs["src"]) for name, attrs in self.tags if name == tag]


NASTY = """<script>alert("1")</script> & 'quoted' ünï"""


def test_gallery_links_every_file(tmp_path):
    videos = ["0000.mp4", "media/a b.mp4", "50%25 #1?'x\"<y>&amp;.mp4"]
    pictures = ["grid.png", "media/curves 'a'.png"]
    sections = [
        Section("Videos", items=[(name, f"video {i}") for i, name in enumerate(videos)]),
        Section("Frames", items=[(name, "frames") for name in pictures]),
    ]
    write_gallery(tmp_path / "index.html", "Samples", sections)
    page = Page(tmp_path / "index.html")
    assert page.files("video") == videos
    assert page.files("img") == pictures
    assert page.texts["figcaption"] == ["video 0", "video 1", "video 2", "frames", "frames"]
    for _, attrs in page.tags:  # nothing that a browser would cut off as a query or fragment
        assert not set("?#") & set(attrs.get("src", ""))


def test_gallery_escapes_every_text(tmp_path):
    section = Section(NASTY, NASTY, [("a.mp4", NASTY), ("a.png", NASTY)], [[NASTY], [NASTY]])
    write_gallery(tmp_path / "index.html", NASTY, [section])
    page = Page(tmp_path / "index.html")
    assert "script" not in [tag for tag, _ in page.tags]
    expected = dict(title=1, h1=1, h2=1, p=1, th=1, td=1, figcaption=2)
    assert {tag: page.texts[tag] for tag in expected} == {
        tag: [NASTY] * count for tag, count in expected.items()
    }
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == [NASTY]


def test_gallery_keeps_the_order_and_the_table(tmp_path):
    table = [("step", "loss"), ("1", "0.5"), ("2", "0.25")]
    write_gallery(tmp_path / "index.html", "T", [Section("one", table=table), Section("two")])
    page = Page(tmp_path / "index.html")
    assert page.texts["h2"] == ["one", "two"]
    assert page.texts["th"] == ["step", "loss"]
    assert page.texts["td"] == ["1", "0.5", "2", "0.25"]
