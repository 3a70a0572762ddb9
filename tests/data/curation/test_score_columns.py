"""Scores: known pictures get the numbers that they must have, in the order that they must have."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from walt_jax.data import video
from walt_jax.data.curation import scores
from walt_jax.data.curation.config import ClipModel, CutConfig, ModelFile, ScoreConfig
from walt_jax.data.curation.cutting import cut_clips
from walt_jax.data.curation.filtering import duplicates
from walt_jax.errors import UserError

CLIPS = Path(os.environ.get("WALT_TEST_DATA", Path(__file__).parents[4] / "shared" / "clips"))
ALL = ScoreConfig(motion=True, sharpness=True, letterbox=True, black_frames=True, phash=True)


def texture(height=96, width=160, seed=0):
    small = np.random.default_rng(seed).integers(0, 255, (24, 40, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def clip(frames, fps=10):
    (made,) = cut_clips([(i / fps, f) for i, f in enumerate(frames)], 0.0, CutConfig())
    return made


def score(frames, config=ALL, caption="", fps=10):
    return scores.score(clip(frames, fps), caption, config)


def test_motion_is_shorter_sides_a_second():
    wide = texture(96, 320)
    for pixels in (1, 3):
        frames = [wide[:, i * pixels : i * pixels + 160] for i in range(20)]
        assert score(frames)["motion"] == pytest.approx(pixels * 10 / 96, rel=0.15)
    # The same motion in half of the time is twice as fast; a still picture does not move.
    assert score(frames, fps=20)["motion"] == pytest.approx(2 * score(frames)["motion"], rel=1e-6)
    assert score([wide[:, :160]] * 20)["motion"] < 0.01
    assert score([wide[:, :160]])["motion"] == 0.0


def test_blur_is_less_sharp():
    sharp = [score([cv2.GaussianBlur(texture(), (0, 0), s)])["sharpness"] for s in (0.1, 1, 3)]
    assert sharp[0] > 1.5 * sharp[1] and sharp[1] > 1.5 * sharp[2] > 0


@pytest.mark.parametrize("bars", [(0, 0), (12, 0), (0, 16), (12, 16)])
def test_letterbox_is_the_share_of_the_bars(bars):
    rows, columns = bars
    frame = np.zeros((96, 160, 3), np.uint8)
    inner = texture(96 - 2 * rows, 160 - 2 * columns)
    frame[rows : 96 - rows, columns : 160 - columns] = inner
    expected = 1 - (1 - 2 * rows / 96) * (1 - 2 * columns / 160)
    assert score([frame] * 3)["letterbox"] == pytest.approx(expected, abs=0.03)


def test_black_frames():
    black, bright = np.full((96, 160, 3), 8, np.uint8), texture()
    assert score([black] * 4)["black_frames"] == 1.0
    assert score([black] * 4)["letterbox"] == 0.0
    mixed = score([black] * 2 + [bright] * 6)
    assert mixed["black_frames"] == 0.25


def test_hashes_see_through_compression_and_size():
    def hashes(frames):
        return [score(frames)[name] for name in scores.HASHES]

    frames = [texture(seed=i) for i in range(8)]
    smaller = [cv2.resize(f, (120, 72), interpolation=cv2.INTER_AREA) for f in frames]
    other = [texture(seed=i + 50) for i in range(8)]
    table = np.array([hashes(frames), hashes(other), hashes(smaller)], np.int64)
    assert duplicates(table, 8).tolist() == [0, 1, 0]
    assert all(-(2**63) <= h < 2**63 for h in table.ravel().tolist())


def test_what_is_off_is_no_column():
    assert scores.columns(ScoreConfig()) == {}
    assert score([texture()], ScoreConfig()) == {}
    assert set(scores.columns(ScoreConfig(motion=True, phash=True))) == {"motion", *scores.HASHES}
    (said,) = scores.left_off(ScoreConfig())
    assert said.startswith("aesthetic and text_match are off")
    said = scores.left_off(ScoreConfig(clip=ClipModel(ModelFile("x"))))
    assert [s.split()[0] for s in said] == ["aesthetic", "text_match"]


def test_missing_models_are_told_before_the_run(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (the extra `data`)")
    with pytest.raises(UserError, match="does not exist"):
        scores.check(ScoreConfig(clip=ClipModel(ModelFile(str(tmp_path / "no.onnx")))))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="is no ONNX model"):
        scores.check(ScoreConfig(clip=ClipModel(ModelFile(str(tmp_path / "bad.onnx")))))
    with pytest.raises(UserError, match="sha256"):
        file = ModelFile(str(tmp_path / "bad.onnx"), "0" * 64)
        scores.check(ScoreConfig(clip=ClipModel(file)))


def text_frame(lines):
    frame = np.full((256, 384, 3), 90, np.uint8)
    for i in range(lines):
        where = (20, 50 + 50 * i)
        cv2.putText(frame, "BREAKING NEWS TODAY", where, cv2.FONT_HERSHEY_SIMPLEX, 1, (255,) * 3, 2)
    return frame


def test_text_covers_its_share():
    pytest.importorskip("rapidocr_onnxruntime", reason="needs RapidOCR (the extra `ocr`)")
    config = ScoreConfig(text_area=True)
    none, one, four = (score([text_frame(n)], config)["text_area"] for n in (0, 1, 4))
    assert none == 0.0 and 0.03 < one < 0.2
    assert four == pytest.approx(4 * one, rel=0.3)


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no test clips at {CLIPS}")
def test_a_reencoded_real_clip_is_a_duplicate():
    def hashes(name):
        frames = video.iter_frames(CLIPS / name, short_side=96, end=2.0)
        (made,) = cut_clips(frames, 0.0, CutConfig())
        return [scores.score(made, "", ScoreConfig(phash=True))[n] for n in scores.HASHES]

    names = ("flower_960x540_h264.mp4", "bear_320x240_vp9.webm", "flower_960x540_vp8.webm")
    assert duplicates(np.array([hashes(n) for n in names]), 6).tolist() == [0, 1, 0]
