"""Buckets: where clips go, how they are cut to size, and which records make batch k."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from walt_jax.data.buckets import assign, fit_frames
from walt_jax.data.plan import BatchPlan

BUCKETS = np.array([2] * 5 + [0] * 9 + [7] * 1 + [2] * 4 + [0] * 3)  # not sorted, not dense


def same(a, b):
    return a[0] == b[0] and np.array_equal(a[1], b[1])


# Aspects


def test_assign_takes_the_nearest_aspect_whatever_the_size():
    sizes = ((64, 64), (48, 80), (80, 48))
    heights = np.array([720, 100, 32, 1920, 90, 2160])
    widths = np.array([1280, 110, 32, 1080, 100, 3840])
    assert assign(heights, widths, sizes).tolist() == [1, 0, 0, 2, 0, 1]


def test_assign_measures_aspects_by_their_ratio():
    """2:1 is as far from 1:1 as 4:1; 2.1:1 is nearer to 4:1, though not in plain difference."""
    sizes = ((10, 10), (10, 40))
    assert assign(np.array([10, 10, 21]), np.array([19, 21, 10]), sizes).tolist() == [0, 1, 0]


def test_assign_to_a_single_bucket():
    assert assign(np.array([1, 9]), np.array([9, 1]), ((64, 64),)).tolist() == [0, 0]


# Sizes


def ramp(height, width, axis):
    """Two frames whose values rise by 2 a pixel along an axis (1 = down, 2 = right)."""
    along = 2 * np.arange((height, width)[axis - 1], dtype=np.uint8)
    shape = (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1)
    return np.broadcast_to(along.reshape(shape), (2, height, width, 3)).copy()


SHAPES = [
    ((64, 96), (32, 32)),  # down, sides cut off
    ((96, 64), (32, 32)),  # down, top and bottom cut off
    ((20, 30), (48, 48)),  # up
    ((30, 20), (48, 64)),
    ((37, 53), (24, 24)),  # odd
    ((53, 37), (31, 17)),
    ((33, 33), (32, 32)),
    ((31, 47), (32, 49)),
    ((32, 48), (32, 32)),  # crop only
    ((32, 33), (32, 32)),
    ((32, 32), (32, 32)),
    ((16, 120), (16, 8)),
    ((100, 101), (7, 64)),
]


@pytest.mark.parametrize("shape, size", SHAPES)
def test_fit_frames_covers_the_size_about_the_centre(shape, size):
    scale = max(size[0] / shape[0], size[1] / shape[1])
    for axis in (1, 2):
        frames = ramp(*shape, axis)
        fitted = fit_frames(frames, size)
        assert fitted.shape == (2, *size, 3) and fitted.dtype == np.uint8
        assert fitted.flags.c_contiguous
        # At most half a pixel off the centre, before or after scaling; one level is rounding.
        assert abs(fitted.mean() - frames.mean()) <= 2 * 0.5 * max(1, 1 / scale) + 1
        along = fitted[0, :, 0, 0] if axis == 1 else fitted[0, 0, :, 0]
        rises = np.diff(along.astype(float))
        assert abs(rises.mean() - 2 / scale) < 0.15 * 2 / scale + 2 / len(along)


def test_fit_frames_leaves_fitting_frames_alone():
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    np.testing.assert_array_equal(fit_frames(frames, (16, 24)), frames)
    np.testing.assert_array_equal(fit_frames(frames, (16, 16)), frames[:, :, 4:20])


def test_fit_frames_averages_when_it_shrinks():
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    means = frames.reshape(2, 16, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(fit_frames(frames, (16, 24)) - means).max() <= 1


def test_fit_frames_treats_every_frame_alike():
    frames = np.random.default_rng(0).integers(0, 256, (4, 20, 31, 3), np.uint8)
    fitted = fit_frames(frames, (12, 12))
    for t in range(4):
        np.testing.assert_array_equal(fitted[t], fit_frames(frames[t : t + 1], (12, 12))[0])


# Batches


def test_batch_k_does_not_depend_on_what_was_asked_before():
    total = 3 * BatchPlan(BUCKETS, 4, seed=5).batches_per_epoch
    fresh = [BatchPlan(BUCKETS, 4, seed=5)(k) for k in range(total)]
    plan = BatchPlan(BUCKETS, 4, seed=5)
    for k in np.random.default_rng(0).permutation(np.repeat(range(total), 2)):
        assert same(plan(k), fresh[k])


def test_batch_k_does_not_depend_on_threads():
    plan = BatchPlan(BUCKETS, 4, seed=5)
    ks = np.random.default_rng(0).integers(0, 10 * plan.batches_per_epoch, 1000)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(plan, ks))
    assert all(same(a, BatchPlan(BUCKETS, 4, seed=5)(k)) for a, k in zip(together, ks))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_record_in_batches_of_one_bucket(batch_size, shuffle):
    plan = BatchPlan(BUCKETS, batch_size, seed=1, shuffle=shuffle)
    n = plan.batches_per_epoch
    assert n == sum(-(-count // batch_size) for count in np.unique(BUCKETS, return_counts=True)[1])
    for epoch in range(3):
        seen = []
        for k in range(epoch * n, (epoch + 1) * n):
            bucket, rows = plan(k)
            assert rows.shape == (batch_size,)
            assert set(BUCKETS[rows]) == {bucket}
            seen += rows.tolist()
        assert set(seen) == set(range(len(BUCKETS)))


def test_no_record_repeats_where_the_batches_come_out_even():
    plan = BatchPlan(np.repeat([0, 1], [6, 9]), 3, seed=0)
    rows = np.concatenate([plan(k)[1] for k in range(plan.batches_per_epoch)])
    assert sorted(rows) == list(range(15))


def test_the_last_batch_is_filled_up_from_the_bucket_start():
    plan = BatchPlan(np.zeros(5, int), 4, seed=0, shuffle=False)
    assert [plan(k)[1].tolist() for k in range(3)] == [[0, 1, 2, 3], [4, 0, 1, 2], [0, 1, 2, 3]]
    assert BatchPlan(np.zeros(2, int), 5, seed=0, shuffle=False)(0)[1].tolist() == [0, 1, 0, 1, 0]


def test_without_shuffling_records_keep_their_order():
    plan = BatchPlan(BUCKETS, 3, seed=0, shuffle=False)
    n = plan.batches_per_epoch
    for bucket in set(BUCKETS):
        (members,) = np.where(np.isin(BUCKETS, bucket))
        rows = np.concatenate([plan(k)[1] for k in range(n) if plan(k)[0] == bucket])
        np.testing.assert_array_equal(rows[: len(members)], members)
    assert all(same(plan(k), plan(k + n)) for k in range(n))
    assert all(same(plan(k), BatchPlan(BUCKETS, 3, seed=9, shuffle=False)(k)) for k in range(n))


def epoch_of(plan, epoch):
    n = plan.batches_per_epoch
    return [
        (bucket, rows.tolist()) for bucket, rows in map(plan, range(epoch * n, (epoch + 1) * n))
    ]


def test_seeds_and_epochs_differ():
    epochs = [epoch_of(BatchPlan(BUCKETS, 4, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert epochs[i] != epochs[j]


def test_the_order_of_the_buckets_is_shuffled_too():
    """Otherwise a whole stretch of training would see one shape."""
    plan = BatchPlan(np.repeat([0, 1], 64), 4, seed=0)
    first_half = [bucket for bucket, _ in epoch_of(plan, 0)[:16]]
    assert 0 < sum(first_half) < 16
