"""Packing of latents: which videos share a row, what is cut and dropped, and what a row holds."""

import itertools

import numpy as np
import pytest
from test_pipeline import assert_equal, make, video_record, write_latents, write_videos

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data import dry_run
from walt_jax.data.packing import (
    DropConfig,
    Packed,
    PackingConfig,
    PackPlan,
    best_fit,
    chosen,
    cut,
    fill_row,
)
from walt_jax.errors import UserError
from walt_jax.training.experiment import Experiment

CONFIG = PackingConfig(block=(2, 4, 4), blocks=12, videos=4)
SHAPES = ((2, 4, 4, 8), (5, 8, 8, 8), (2, 9, 8, 8), (4, 4, 10, 8), (1, 8, 8, 8), (2, 16, 16, 8))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 latents of six shapes: the fifth is shorter than a block, the last larger than a row."""
    sources = [f"{i}.mp4" for i in range(60)]
    return write_latents(tmp_path_factory.mktemp("packing") / "latents", sources, SHAPES)


def packed(dataset, *, config=CONFIG, batch_size=4, **options):
    return make(dataset, packing=config, batch_size=batch_size, eval_fraction=0.0, **options)


def take(pipeline, count, start=0, rows=None):
    return list(itertools.islice(pipeline.batches(start, rows), count))


def plan_of(blocks, *, seed=0, batch_size=2, config=CONFIG, shuffle=True):
    numbers = np.arange(len(blocks)) + 100
    return PackPlan(np.array(blocks), config, batch_size, seed, shuffle=shuffle, records=numbers)


# Rows


@pytest.mark.parametrize("most", [2, 5, 100])
def test_rows_hold_every_item_once_and_none_too_many(most):
    rng = np.random.default_rng(most)
    sizes = rng.integers(1, 65, 5000)
    rows = best_fit(sizes, 64, most)
    assert sorted(itertools.chain(*rows)) == list(range(5000))
    assert max(sizes[row].sum() for row in rows) <= 64 and max(map(len, rows)) <= most


def test_rows_are_nearly_full():
    sizes = np.random.default_rng(0).choice([4, 6, 8, 12, 15, 20, 36], 5000)
    rows = best_fit(sizes, 64, 16)
    assert 1 - sizes.sum() / (64 * len(rows)) < 0.01


def test_best_fit_by_hand():
    """9 and 8 open rows; 4 fits best with 8, 3 with 9, 2 opens another."""
    assert best_fit([8, 2, 3, 9, 4], 12, 9) == [[3, 2], [0, 4], [1]]
    assert best_fit([1, 1, 1], 12, 2) == [[0, 1], [2]]


def test_an_epoch_has_every_video_and_batch_k_does_not_depend_on_the_past():
    blocks = np.random.default_rng(0).integers(1, 13, 200)
    plan, total = plan_of(blocks), plan_of(blocks).batches_per_epoch
    rows = [row for k in range(total) for row in plan(k)[1]]
    assert {video.record for row in rows for video in row} == set(range(100, 300))
    assert all(sum(video.kept for video in row) <= 12 for row in rows)
    for k in (3 * total + 5, 2, total - 1, 7 * total):
        assert plan(k) == plan_of(blocks)(k)
        assert plan.batch_of(plan.first_row(k)) == plan.batch_of(plan.first_row(k) + 1) == k
    assert plan(0) != plan_of(blocks, seed=1)(0) != plan(total)
    steady = plan_of(blocks, shuffle=False)
    assert steady(3)[1] == steady(3 + steady.batches_per_epoch)[1]


# Blocks


def test_cut_keeps_whole_blocks_from_the_first_frame_about_the_centre():
    latents = np.random.default_rng(0).standard_normal((5, 9, 10, 3))
    blocks, places, extent = cut(latents, (2, 4, 4))
    assert blocks.shape == (8, 2, 4, 4, 3) and extent == (4, 8, 8)
    whole = latents[:4, 0:8, 1:9]
    for block, (t, h, w) in zip(blocks, places):
        np.testing.assert_array_equal(block, whole[t : t + 2, h : h + 4, w : w + 4])
    assert len({tuple(p) for p in places.tolist()}) == 8


def test_a_row_holds_its_videos():
    clips = {
        i: {"latents": np.full((2, 4, 4 * i, 3), i, np.float16), "label": np.int32(i + 5)}
        for i in (1, 3)
    }
    row = (Packed(3, 2, 0), Packed(1, 1, 0))
    arrays = fill_row(row, lambda i: dict(clips[i]), CONFIG, seed=0)
    assert arrays["segments"].tolist() == [0, 0, 1, *[-1] * 9]
    assert arrays["label"].tolist() == [8, 6, 0, 0]
    assert arrays["extents"].tolist() == [[2, 4, 12], [2, 4, 4], [0, 0, 0], [0, 0, 0]]
    assert arrays["latents"][:, 0, 0, 0, 0].tolist() == [3, 3, 1, *[0] * 9]
    kept = chosen(row[0], 3, seed=0)
    assert arrays["places"][:2, 2].tolist() == (kept * 4).tolist()
    other = [chosen(Packed(3, 2, e), 3, seed=0).tolist() for e in range(20)]
    assert {tuple(x) for x in other} == {(0, 1), (0, 2), (1, 2)}


# Dropping


def test_rates_by_distribution():
    rng, n = np.random.default_rng(0), 20000
    blocks, seen = np.full(n, 8), np.arange(n)
    assert (DropConfig(0.3).rates(blocks, seen, rng) == 0.3).all()
    beta = DropConfig(0.3, "beta", concentration=10).rates(blocks, seen, rng)
    assert abs(beta.mean() - 0.3) < 0.01 and abs(beta.var() - 0.3 * 0.7 / 11) < 0.002
    by_size = DropConfig(0.5, "resolution").rates(np.array([2, 4, 8]), seen[:3], rng)
    np.testing.assert_allclose(by_size, [0.125, 0.25, 0.5])
    falling = DropConfig(0.0, start=0.5, clips=10000).rates(blocks, seen, rng)
    np.testing.assert_allclose(falling[[0, 5000, 10000, 19999]], [0.5, 0.25, 0, 0])


def test_dropping_makes_room_for_more_videos(dataset):
    whole, half = (
        packed(dataset, config=PackingConfig((1, 4, 4), 12, 16, DropConfig(rate)))
        for rate in (0.0, 0.5)
    )
    counts = [sum(p.num_clips(k) for k in range(p.batches_per_epoch)) / p.batches_per_epoch
              for p in (whole, half)]  # fmt: skip
    assert 1.5 < counts[1] / counts[0] < 2.5
    for row in half.plan.epoch(0):
        for video in row:
            shape = np.array(SHAPES[video.record % 6][:3])
            total = np.prod(shape // (1, 4, 4))
            assert video.kept == max(1, round(total / 2))


@pytest.mark.parametrize(
    "wrong", [{"rate": 1.0}, {"rate": -0.1}, {"concentration": 0.0}, {"start": 2.0}]
)
def test_mistakes_in_dropping_are_told(wrong):
    with pytest.raises(UserError, match=r"config\.data\.packing\.drop"):
        DropConfig(**wrong)


# The pipeline


def test_batches_of_packed_rows(dataset):
    pipeline = packed(dataset, caption_bytes=4)
    assert pipeline.left_out == 20 and "20 smaller than a block" in pipeline.describe()
    (shapes,) = pipeline.shapes()
    seen = set()
    for k, batch in enumerate(take(pipeline, pipeline.batches_per_epoch)):
        assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
            n: (s.shape, s.dtype) for n, s in shapes.items()
        }
        real = batch["segments"] >= 0
        assert pipeline.num_clips(k) == (batch["extents"][..., 0] > 0).sum()
        for b, n in np.argwhere(real):
            label = batch["label"][b, batch["segments"][b, n]]
            assert (batch["latents"][b, n] == np.float16(label + 0.5)).all()
            seen.add(int(label))
        assert not batch["latents"][~real].any()
    assert seen == {i for i in range(60) if i % 6 not in (4, 5)}


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all_processes_make_the_batch(dataset, processes):
    whole, share = take(packed(dataset), 3, start=2), 4 // processes
    parts = [take(packed(dataset), 3, 2, (i * share, (i + 1) * share)) for i in range(processes)]
    for batch, *pieces in zip(whole, *parts):
        assert_equal(batch, {n: np.concatenate([p[n] for p in pieces]) for n in batch})


def test_videos_are_not_packed(tmp_path):
    videos = write_videos(tmp_path / "videos", [video_record(0)])
    with pytest.raises(UserError, match=r"packs latents.*walt_jax\.encode"):
        packed(videos)


def test_nothing_fits(dataset):
    with pytest.raises(UserError, match=r"60 of 60 are smaller than a block.*packing\.block"):
        packed(dataset, config=PackingConfig((16, 4, 4)))


def test_images_beside_packed_videos_are_refused():
    values = config_lib.load("configs/walt_any_size.py:debug")
    values["images"] = {"path": "out/images", "num_frames": 1}
    with pytest.raises(UserError, match="put their latents into the same dataset"):
        config_lib.build(Experiment, values | {"image_batch_size": 8})


def test_buckets_and_packing_exclude_each_other():
    values = config_lib.load("configs/walt_any_size.py:buckets", ["data.packing.blocks=4"])
    with pytest.raises(UserError, match="set one of them to None"):
        config_lib.build(Experiment, values)


def test_the_dry_run_says_what_packing_does(dataset, capsys, monkeypatch):
    arguments = ["--data", str(dataset.directory), "--config", "configs/walt_any_size.py:debug"]
    monkeypatch.setattr("sys.argv", ["buckets", *arguments, "--config.data.eval_fraction=0.0"])
    cli.run(dry_run.main)
    out = capsys.readouterr().out
    assert "rows of 6 blocks of 2x4x4" in out and "padding" in out and "cut off" in out
