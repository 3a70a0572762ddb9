"""Tables of buckets: Open-Sora's rule, batch sizes, what the pipeline makes of them."""

import itertools
import math

import numpy as np
import pytest
from test_pipeline import assert_equal, make, video_record, write_videos

from walt_jax import cli
from walt_jax.data import dry_run
from walt_jax.data.buckets import (
    Bucket,
    BucketsConfig,
    assign,
    assign_by_table,
    crop_loss,
    fit_frames,
)
from walt_jax.data.plan import BatchPlan
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig

TABLE = BucketsConfig(
    (Bucket(32, 5, batch_size=6), Bucket(64, 5, 0.5, 2), Bucket(64, 9, 0.25, 4), Bucket(32, 1)),
    aspects=(0.5, 1.0, 2.0),
    multiple=8,
)


def to(frames, height, width, *, seed=0, table=TABLE, image=False, copies=1, **options):
    """Where copies of a record go in an epoch: its shapes."""
    columns = (np.full(copies, x) for x in (frames, image, height, width))
    assignment = assign_by_table(table, *columns, batch_size=8, seed=seed, **options)
    found = assignment.buckets(0) if callable(assignment.buckets) else assignment.buckets
    return [assignment.shapes[i] if i >= 0 else None for i in found]


def sure(**options):
    """The table with every keep probability 1."""
    return BucketsConfig(
        tuple(Bucket(b.resolution, b.num_frames) for b in TABLE.table), (0.5, 1, 2), 8, **options
    )


# The rule


@pytest.mark.parametrize(
    "record, bucket",
    [
        ((9, 64, 64), (9, 64, 64)),
        ((100, 500, 500), (9, 64, 64)),
        ((8, 64, 64), (5, 64, 64)),
        ((100, 63, 64), (5, 32, 32)),  # the largest resolution not above the video's
        ((9, 48, 100), (9, 40, 80)),  # 4800 pixels: a resolution of 69
        ((9, 100, 48), (9, 80, 40)),
        ((4, 64, 64), None),  # a video never goes where images go
        ((1, 64, 64), None),
        ((9, 31, 32), None),
    ],
)
def test_the_largest_bucket_not_above_the_video(record, bucket):
    assert to(*record, table=sure()) == [bucket]


def test_images_go_to_buckets_of_one_frame_only():
    assert to(1, 64, 64, image=True, table=sure()) == [(1, 32, 32)]
    assert to(1, 20, 20, image=True, table=sure()) == [None]


def test_what_is_not_kept_goes_to_the_next_smaller_bucket():
    n = 4000
    found = to(9, 64, 64, copies=n)
    shares = {shape: found.count(shape) / n for shape in set(found)}
    assert shares.keys() == {(9, 64, 64), (5, 64, 64), (5, 32, 32)}
    for shape, share in {(9, 64, 64): 0.25, (5, 64, 64): 0.375, (5, 32, 32): 0.375}.items():
        assert abs(shares[shape] - share) < 4 * math.sqrt(0.25 / n)
    columns = (np.full(n, x) for x in (9, False, 64, 64))
    expected = assign_by_table(TABLE, *columns, batch_size=8, seed=0)
    names = dict(zip(expected.shapes, expected.expected / n))
    assert names[9, 64, 64] == pytest.approx(0.25) and names[5, 32, 32] == pytest.approx(0.375)


def test_the_draws_are_of_the_seed_and_the_epoch():
    columns = [np.full(64, x) for x in (9, False, 64, 64)]
    draw, again, other = (
        assign_by_table(TABLE, *columns, batch_size=8, seed=s).buckets for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(draw(3), again(3))
    assert (draw(3) != draw(4)).any() and (draw(3) != other(3)).any()
    steady = assign_by_table(TABLE, *columns, batch_size=8, seed=0, shuffle=False).buckets
    np.testing.assert_array_equal(steady, draw(0))


def test_what_the_last_bucket_does_not_keep_is_left_out():
    found = to(9, 64, 64, copies=400, table=BucketsConfig((Bucket(64, 9, 0.5),), multiple=8))
    assert 0.4 < found.count(None) / 400 < 0.6


# Sizes and batch sizes


@pytest.mark.parametrize("resolution, multiple", [(64, 8), (256, 16), (256, 64), (100, 64)])
def test_sizes_are_multiples_and_no_larger_than_the_resolution(resolution, multiple):
    config = BucketsConfig((Bucket(resolution, 1),), multiple=multiple)
    some = config.sizes(resolution)
    every = BucketsConfig((Bucket(resolution, 1),), (), multiple).sizes(resolution)
    assert set(some) <= set(every) and len(some) <= 5 and len(set(every)) == len(every)
    for h, w in every:
        assert h % multiple == w % multiple == 0 and h * w <= resolution**2
    if multiple <= resolution / 16:  # any aspect is met within a few per cent
        for aspect in np.geomspace(1 / 2.4, 2.4, 30):
            h, w = min(every, key=lambda s: abs(math.log(s[1] / s[0] / aspect)))
            assert crop_loss(np.ones(1), np.array([aspect]), (h, w))[0] < 0.045
            assert h * w >= 0.7 * resolution**2


def test_crop_loss_is_what_fit_frames_cuts_off():
    """The frame's left half is black: after the crop to half the width none of it is lost more."""
    assert crop_loss(np.array([60, 30]), np.array([60, 60]), (20, 20)).tolist() == [0, 0.5]
    frames = np.zeros((1, 30, 60, 3), np.uint8)
    frames[:, :, :15] = frames[:, :, 45:] = 255
    assert fit_frames(frames, (20, 20)).max() <= 130 and frames.mean() > 120


def test_what_a_stretch_reaches_is_not_cut_off():
    """16:9 as 5:3, stretched by 6.7 %: a circle becomes an ellipse, and all four corners stay."""
    frames = np.zeros((1, 90, 160, 3), np.uint8)
    frames[:, [0, 0, -1, -1], [0, -1, 0, -1]] = 255
    fitted = fit_frames(frames, (192, 320), stretch=0.07)
    assert fitted.shape == (1, 192, 320, 3)
    assert fitted[0, [0, 0, -1, -1], [0, -1, 0, -1]].min() > 200
    assert crop_loss(np.array([90]), np.array([160]), (192, 320), 0.07) == 0
    # What it does not reach is stretched by as much, and then cut.
    square = np.repeat(np.arange(100, dtype=np.uint8)[None, None, :, None], 100, 1).repeat(3, 3)
    fitted = fit_frames(square, (50, 25), stretch=0.25)
    assert crop_loss(np.ones(1), np.ones(1), (50, 25), 0.25)[0] == pytest.approx(0.375)
    assert int(fitted[0, 0, -1, 0]) - int(fitted[0, 0, 0, 0]) == pytest.approx(62.5, abs=3)
    # Of the sizes that it reaches the largest.
    assert assign(np.array([3]), np.array([4]), [(14, 18), (12, 16)], 0.04).tolist() == [0]
    assert assign(np.array([3]), np.array([4]), [(14, 18), (12, 16)]).tolist() == [1]


def test_a_square_of_nearly_four_windows_a_side_is_nine():
    sizes = BucketsConfig((Bucket(240, 1),), (), 64).sizes(240)
    assert (192, 192) in sizes and (192, 256) in sizes and (128, 128) not in sizes
    assert max(h * w for h, w in sizes) <= 240**2


def test_batch_sizes_by_the_token_budget():
    config = BucketsConfig((Bucket(64, 17), Bucket(64, 1), Bucket(32, 1, 1.0, 3)), (1.0,), 8)
    assert [config.batch_size(b, (64, 64), 5) for b in config.table] == [5, 5, 3]
    budget = BucketsConfig(config.table, (1.0,), 8, token_budget=1000, batch_multiple=2)
    assert budget.tokens(17, (64, 64)) == (5, 8, 8) and budget.tokens(1, (32, 48)) == (1, 4, 6)
    assert [budget.batch_size(b, (64, 64), 5) for b in config.table] == [2, 14, 3]
    assert budget.batches(5, latents=True) == {(5, 8, 8): 2, (1, 8, 8): 14, (1, 4, 4): 3}
    assert budget.batches(5, latents=False) == {(17, 64, 64): 2, (1, 64, 64): 14, (1, 32, 32): 3}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"table": ()}, "one at least"),
        ({"table": (Bucket(64, 5), Bucket(64, 5, 0.5))}, "once"),
        ({"table": (Bucket(64, 5),), "multiple": 128}, "raise it"),
        ({"table": (Bucket(64, 5),), "token_budget": -1}, "token_budget"),
        ({"table": (Bucket(64, 5),), "stretch": -0.1}, "stretch"),
    ],
)
def test_mistakes_in_a_table_are_told(wrong, words):
    with pytest.raises(UserError, match=words):
        BucketsConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": 1.5}, {"num_frames": 0}])
def test_mistakes_in_a_bucket_are_told(wrong):
    with pytest.raises(UserError, match=r"config\.data\.buckets\.table"):
        Bucket(**({"resolution": 64, "num_frames": 5} | wrong))


# The plan


def test_rows_and_batches_find_each_other_across_epochs_of_other_lengths():
    columns = [np.full(40, x) for x in (9, False, 64, 64)]
    assignment = assign_by_table(TABLE, *columns, batch_size=8, seed=0)
    plan = BatchPlan(assignment.buckets, assignment.batch_sizes, 0)
    row = 0
    for k in range(80):
        bucket, records = plan(k)
        assert len(records) == assignment.batch_sizes[bucket]
        assert plan.first_row(k) == row
        assert plan.batch_of(row) == plan.batch_of(row + len(records) - 1) == k
        row += len(records)
    starts = [BatchPlan(assignment.buckets, assignment.batch_sizes, 0)._start(e) for e in range(5)]
    assert len({b - a for (a, _), (b, _) in itertools.pairwise(starts)}) > 1
    fresh = BatchPlan(assignment.buckets, assignment.batch_sizes, 0)
    assert fresh.batch_of(plan.first_row(70)) == 70  # from the middle, nothing asked before


# The pipeline


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """30 videos and images of two sizes and three lengths."""
    records = [video_record(i, (12, 6, 1)[i % 3], size=((40, 64)[i % 2], 64)) for i in range(30)]
    return write_videos(tmp_path_factory.mktemp("mixed") / "records", records)


MIXED = BucketsConfig(
    (Bucket(48, 9, 0.5, 2), Bucket(48, 5, 1.0, 4), Bucket(48, 1, 1.0, 6)), (1.0, 1.6), 8
)


def take(pipeline, count, start=0, rows=None):
    return list(itertools.islice(pipeline.batches(start, rows), count))


def test_batches_of_all_buckets(mixed):
    pipeline = make(mixed, fps=0.0, buckets=MIXED, batch_size=2, eval_fraction=0.0)
    shapes = {tuple(s["video"].shape) for s in pipeline.shapes()}
    assert {s[:2] for s in shapes} == {(2, 9), (4, 5), (6, 1)} and pipeline.left_out == 0
    batches = take(pipeline, 30)
    assert {b["video"].shape for b in batches} == shapes
    for k, batch in enumerate(batches):
        assert len(batch["label"]) == pipeline.num_clips(k) == len(batch["video"])
        bucket, records = pipeline.plan(k)
        assert batch["video"].shape[1:4] == pipeline.assignment.shapes[bucket]
        np.testing.assert_array_equal(batch["label"], records)
    assert_equal(take(pipeline, 1, 17)[0], batches[17])


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_of_all_processes_make_batches_of_any_size(mixed, processes):
    pipeline = make(mixed, fps=0.0, buckets=MIXED, batch_size=2, eval_fraction=0.0)
    whole, share = take(pipeline, 12, start=5), 2 // processes
    parts = [take(pipeline, 12, 5, (i * share, (i + 1) * share)) for i in range(processes)]
    for batch, *pieces in zip(whole, *parts):
        assert_equal(batch, {n: np.concatenate([p[n] for p in pieces]) for n in batch})


@pytest.mark.slow
def test_workers_read_batches_of_any_size(mixed):
    pipeline = make(mixed, fps=0.0, buckets=MIXED, batch_size=2, eval_fraction=0.0)
    expected = take(pipeline, 6, start=3)
    workers = make(mixed, fps=0.0, buckets=MIXED, batch_size=2, eval_fraction=0.0, num_workers=2)
    iterator = workers.batches(start=3)
    try:
        for batch in expected:
            assert_equal(next(iterator), batch)
    finally:
        iterator.close()


def test_an_empty_bucket_is_an_error(mixed):
    table = BucketsConfig((*MIXED.table, Bucket(48, 33)), MIXED.aspects, 8)
    with pytest.raises(UserError, match=r"resolution 48, 33 frames is empty.*take it out"):
        make(mixed, fps=0.0, buckets=table, eval_fraction=0.0)
    with pytest.raises(UserError, match="30 of 30 are smaller or shorter"):
        make(mixed, fps=0.0, buckets=BucketsConfig((Bucket(512, 9),)), eval_fraction=0.0)


# The dry run


def test_the_dry_run_counts_what_training_will_see(mixed):
    pipeline = make(mixed, fps=0.0, buckets=MIXED, batch_size=2, eval_fraction=0.0)
    lines = {line.name: line for line in dry_run.survey(pipeline, MIXED, None)}
    assert sum(line.batches for line in lines.values()) == pipeline.batches_per_epoch
    assert sum(line.videos for line in lines.values()) == 30
    images = lines["1x48x48"]  # 64 x 64
    assert (images.videos, images.batches, images.tokens, images.crop) == (5, 1, 36, 0.0)
    assert images.padding == pytest.approx(1 / 6) and images.cost == 6 * 36
    wide = lines["1x32x56"]  # 40 x 64: 1.6 in 1.75
    assert wide.crop == pytest.approx(1 - 1.6 / 1.75)


def test_attention_costs_tokens():
    model = DenoiserConfig(width=1024, windows=((1, 0, 0), (0, 8, 8)))
    expected = 1280 * (1 + (256 + 320) / 2 / (6 * 1024))
    assert dry_run.clip_cost((5, 16, 16), model) == pytest.approx(expected)
    assert dry_run.clip_cost((1, 16, 16), model) == pytest.approx(256 * (1 + (256 + 64) / 2 / 6144))


def test_a_suggested_table_is_taken(mixed, capsys, monkeypatch):
    arguments = ["--data", str(mixed.directory), "--config", "configs/sprites_tokenizer.py:debug"]
    arguments += ["--token_budget=500", "--config.data.fps=0.0", "--config.data.eval_fraction=0.0"]
    monkeypatch.setattr("sys.argv", ["buckets", *arguments])
    cli.run(dry_run.main)
    out = capsys.readouterr().out
    assert "'num_frames': 1," in out and "an epoch" in out
    like = BucketsConfig((Bucket(64, 1),), multiple=8)
    found = dry_run.suggest(mixed, 0.0, 500, like)
    pipeline = make(mixed, fps=0.0, buckets=found, batch_size=1, eval_fraction=0.0)
    lines = [line for line in dry_run.survey(pipeline, found, None) if line.batches]
    assert {line.name.split("x")[0] for line in lines} == {"1", "5", "9"} or len(lines) >= 3
    assert all(0.4 * 500 <= line.cost <= 500 for line in lines)


def test_a_table_for_latents_is_refused():
    class Latents:
        metadata = {"kind": "latents"}  # noqa: RUF012
        directory = "out/latents"

    with pytest.raises(UserError, match="give prepared videos"):
        dry_run.suggest(Latents(), 8.0, 1000, TABLE)
