"""The filter: thresholds and near-duplicates choose among scored clips, and nothing is decoded."""

import json
import shutil

import av
import cv2
import numpy as np
import pytest

from walt_jax import media, prepare
from walt_jax.data.curation.config import CutConfig, FilterConfig, PrepareConfig, ScoreConfig
from walt_jax.data.curation.filtering import duplicates
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import VIDEO_FEATURES, open_dataset
from walt_jax.errors import UserError

SCORES = ScoreConfig(sharpness=True, black_frames=True, phash=True)


def brute_force(hashes, bits):
    groups = np.arange(len(hashes))
    rows = [np.unpackbits(np.ascontiguousarray(h, ">i8").view(np.uint8)) for h in hashes]
    for _ in hashes:
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if (a != b).sum() <= bits:
                    groups[[i, j]] = min(groups[i], groups[j])
    return groups


@pytest.mark.parametrize("bits", [0, 1, 5, 23])
def test_every_near_duplicate_is_found(bits):
    rng = np.random.default_rng(bits)
    base = rng.integers(-(2**63), 2**63, (6, 3), np.int64)
    rows = [base[i] for i in range(6)]
    for _ in range(30):
        row = rows[rng.integers(len(rows))].copy()
        for bit in rng.choice(192, rng.integers(0, 2 * bits + 2), replace=False):
            row[bit // 64] ^= np.int64(np.uint64(1) << np.uint64(bit % 64))
        rows.append(row)
    hashes = np.array(rows)[rng.permutation(len(rows))]
    found = duplicates(hashes, bits)
    assert found.tolist() == brute_force(hashes, bits).tolist()
    assert 6 <= len(set(found.tolist())) < len(hashes)


def texture(seed):
    small = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    return cv2.resize(small, (64, 48), interpolation=cv2.INTER_NEAREST)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve: four textures, two of them again, two blurred, two black, two short."""
    folder = tmp_path_factory.mktemp("videos")
    pictures = {f"a{i}": texture(i) for i in range(4)}
    pictures |= {f"again{i}": np.clip(texture(i) + 3.0, 0, 255).astype(np.uint8) for i in range(2)}
    pictures |= {f"blurred{i}": cv2.GaussianBlur(texture(i + 4), (0, 0), 9) for i in range(2)}
    pictures |= {f"dark{i}": np.full((48, 64, 3), 3 * i, np.uint8) for i in range(2)}
    pictures |= {f"short{i}": texture(i + 6) for i in range(2)}
    for name, picture in pictures.items():
        frames = 6 if name.startswith("short") else 20
        media.write_mp4(folder / f"{name}.mp4", np.repeat(picture[None], frames, 0), 10)
    (folder / "broken.mp4").write_text("no video")
    return folder


def prepared(videos, output, thresholds, **options):
    config = PrepareConfig(
        cut=CutConfig(min_clip_seconds=1.0), scores=SCORES, filter=FilterConfig(**thresholds)
    )
    options = {"runner": "threads", "shards": 3} | options
    return prepare_dataset(videos, output, config=config, **options)


def names(directory):
    return [s.removesuffix(".mp4") for s in open_dataset(directory).index["source"].tolist()]


@pytest.fixture(scope="module")
def scored(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("scored") / "out"
    thresholds = {"black_frames": (None, 0.5), "duplicate_bits": 8}
    return output, prepared(videos, output, thresholds)


def test_thresholds_and_duplicates(scored):
    output, report = scored
    assert names(output) == ["a0", "a1", "a2", "a3", "blurred0", "blurred1"]
    assert (report.sources, report.clips, report.records) == (13, 10, 6)
    reasons = {entry["source"]: entry["reason"] for entry in report.rejected}
    assert reasons.keys() == {f"{n}{i}.mp4" for n in ("again", "dark", "short") for i in (0, 1)}
    assert reasons["again1.mp4"] == "a near-duplicate of a1.mp4 at 0.00 s"
    assert reasons["dark0.mp4"] == "black_frames 1 is above 0.5"
    assert "less than min_clip_seconds" in reasons["short0.mp4"]
    assert [entry["source"] for entry in report.skipped] == ["broken.mp4"]
    assert json.loads((output / "report.json").read_text())["records"] == 6
    everything = f"{output}.scored"
    assert len(open_dataset(everything, VIDEO_FEATURES)) == 10
    record = open_dataset(output).read(0)
    assert record["sharpness"] > 0 and isinstance(record["phash_0"], int)


def test_the_report_shows_everything(scored):
    output, report = scored
    page = (output / "report.html").read_text()
    for entry in (*report.rejected, *report.skipped):
        assert entry["source"] in page
    for name, count in (("clips", 10), ("pieces too short for a clip", 2), ("clips kept", 6)):
        assert f"<td>{name}</td><td>{count}</td>" in page
    assert "Scores that were off: motion, letterbox, text_area, aesthetic, text_match." in page
    pictures = sorted(p.name for p in (output / "report").iterdir())
    assert pictures == [*(f"{i:06d}.jpg" for i in range(10)), "histograms.png"]
    assert all(f"report/{name}" in page for name in pictures)
    # The picture of a clip is its own frame, byte for byte.
    record = open_dataset(output).read(2)
    offsets, middle = record["offsets"], record["num_frames"] // 2
    frame = record["payload"][offsets[middle] : offsets[middle + 1]].tobytes()
    assert frame in [p.read_bytes() for p in (output / "report").glob("*.jpg")]


def test_other_thresholds_decode_nothing(videos, scored, monkeypatch):
    output, _ = scored
    before = {i: open_dataset(f"{output}.scored").read_bytes(i) for i in range(10)}

    def decodes(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(av, "open", decodes)
    monkeypatch.setattr(cv2, "imdecode", decodes)
    thresholds = {"sharpness": (100.0, None)}
    with pytest.raises(UserError, match="holds a dataset: give --overwrite"):
        prepared(videos, output, thresholds)
    report = prepared(videos, output, thresholds, overwrite=True)
    kept = names(output)
    assert kept == ["a0", "a1", "a2", "a3", "again0", "again1"] and report.records == 6
    dataset, everything = open_dataset(output), names(f"{output}.scored")
    for i, name in enumerate(kept):
        assert dataset.read_bytes(i) == before[everything.index(name)]
    # Of the scored dataset as an input, by the command.
    other = output.with_name("other")
    arguments = ["--input", f"{output}.scored", "--output", str(other)]
    prepare.main([*arguments, "--config.filter.sharpness=(None,100.0)"])
    assert names(other) == ["blurred0", "blurred1", "dark0", "dark1"]


def test_an_image_need_not_move(tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "image.png"), texture(0))
    media.write_mp4(tmp_path / "in" / "still.mp4", np.repeat(texture(1)[None], 10, 0), 5)
    config = PrepareConfig(
        cut=CutConfig(min_clip_seconds=1.5),
        scores=ScoreConfig(motion=True),
        filter=FilterConfig(motion=(0.01, None)),
    )
    report = prepare_dataset(tmp_path / "in", tmp_path / "out", config=config, runner="threads")
    assert open_dataset(tmp_path / "out").index["source"].tolist() == ["image.png"]
    assert [entry["source"] for entry in report.rejected] == ["still.mp4"]


def test_what_cannot_be(videos, scored, tmp_path):
    output, _ = scored
    everything, other = f"{output}.scored", tmp_path / "other"
    with pytest.raises(UserError, match=r"has no such column: prepare it with config\.scores\.mot"):
        prepare_dataset(everything, other, config=with_filter(motion=(0.1, None)))
    with pytest.raises(UserError, match="keeps none of the 10 clips"):
        prepare_dataset(everything, other, config=with_filter(sharpness=(1e9, None)))
    with pytest.raises(UserError, match=r"only config\.filter can choose"):
        prepare_dataset(everything, other, short_side=9)
    with pytest.raises(UserError, match="is above its most"):
        FilterConfig(motion=(2.0, 1.0))
    shutil.copytree(everything, tmp_path / "new.scored")
    with pytest.raises(UserError, match="clips of another input or config: give --overwrite"):
        prepared(videos, tmp_path / "new", {}, short_side=16)
    assert not other.exists()


def with_filter(**thresholds):
    return PrepareConfig(filter=FilterConfig(**thresholds))
