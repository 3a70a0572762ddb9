"""From records to batches: which frames, which rows, which shapes, and always the same ones."""

import itertools
import math

import numpy as np
import pytest
from reading import SIZES, make, take

from walt_jax.data.buckets import fit_frames
from walt_jax.data.latents import LATENT_FEATURES
from walt_jax.data.records import VIDEO_FEATURES, decode_frames
from walt_jax.data.video import encode_frame
from walt_jax.data.writer import write_dataset
from walt_jax.errors import UserError


def assert_equal(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], strict=name != "caption")


def records_of(pipeline):
    """All records of the split."""
    return {int(r) for k in range(pipeline.batches_per_epoch) for r in pipeline.plan(k)[1]}


def sources_of(pipeline):
    return {str(pipeline.dataset.index["source"][r]) for r in records_of(pipeline)}


def video_record(i, times=8, source=None, size=(16, 16)):
    """A video of which frame t is all gray 10 t; `times` in seconds, or a number at 8 fps."""
    times = np.arange(times) / 8 if isinstance(times, int) else np.asarray(times, float)
    n, (height, width) = len(times), size
    coded = [encode_frame(np.full((height, width, 3), 10 * t, np.uint8)) for t in range(n)]
    fps = (n - 1) / times[-1] if n > 1 else 1.0
    return {
        "payload": np.concatenate(coded),
        "offsets": np.cumsum([0, *map(len, coded)], dtype=np.int64),
        "timestamps": times,
        "fps": fps,
        "duration": n / fps,
        "width": width,
        "height": height,
        "num_frames": n,
        "caption": f"video {i}",
        "label": i,
        "source": source or f"{i}.mp4",
        "start": 0.0,
        "sha256": "00" * 32,
    }


def write_videos(folder, records):
    return write_dataset(folder, VIDEO_FEATURES, records, metadata={"kind": "videos"})


def frames_shown(batch):
    """Frame numbers (B, T) in batches of `video_record`s."""
    assert batch["video"].std((2, 3, 4)).max() < 1
    return np.rint(batch["video"].mean((2, 3, 4)) / 10).astype(int)


def write_latents(folder, sources, shapes=((2, 4, 4, 8),)):
    examples = [
        {
            "latents": np.full(shapes[i % len(shapes)], i + 0.5, np.float16),
            **dict(zip(("num_frames", "height", "width"), shapes[i % len(shapes)])),
            "fps": 8.0,
            "caption": f"latent {i}",
            "label": i,
            "source": source,
            "tokenizer_hash": "abc",
        }
        for i, source in enumerate(sources)
    ]
    metadata = {"kind": "latents", "latent_channels": 8, "dtype": "float16"}
    return write_dataset(folder, LATENT_FEATURES, examples, metadata=metadata)


# Which frames


def test_too_short_videos_are_left_out_and_counted(tmp_path):
    """At 4 fps 5 frames take a second; half a frame (1/8 s) may be missing."""
    last = [1.0, 0.9, 0.876, 0.87, 0.5, 3.0]
    records = [video_record(i, np.linspace(0, end, 8)) for i, end in enumerate(last)]
    records.append(video_record(6, 1))
    records.append(video_record(7, [0.0, 0.8]))  # its frames are shown for 1.6 s
    dataset = write_videos(tmp_path / "records", records)
    pipeline = make(dataset, fps=4.0, split="all")
    assert records_of(pipeline) == {0, 1, 2, 5}
    assert pipeline.left_out == 4
    assert "4 in 16x16" in pipeline.describe() and "4 too short" in pipeline.describe()


def test_at_the_native_rate_frames_are_counted(tmp_path):
    counts = (4, 5, 6, 1)
    dataset = write_videos(tmp_path / "records", [video_record(i, n) for i, n in enumerate(counts)])
    pipeline = make(dataset, fps=0.0, split="all")
    assert records_of(pipeline) == {1, 2} and pipeline.left_out == 2


def test_no_video_left_is_an_error(sprite_records):
    with pytest.raises(UserError, match=r"records.*train.*24 of 24 .*50 frames.*num_frames"):
        make(sprite_records, num_frames=50)


def test_no_held_out_video_is_an_error(sprite_records):
    with pytest.raises(UserError, match=r"eval split.*eval_fraction"):
        make(sprite_records, split="eval", eval_fraction=0.0)


def test_a_single_video_cannot_be_split(tmp_path):
    dataset = write_videos(tmp_path / "records", [video_record(0)])
    with pytest.raises(UserError, match=r"train split.*eval_fraction"):
        make(dataset)
    assert records_of(make(dataset, eval_fraction=0.0)) == {0}


# Splits


@pytest.mark.parametrize("fraction, held_out", [(0.01, 1), (0.25, 6), (0.5, 12)])
def test_splits_are_disjoint_and_complete(sprite_records, fraction, held_out):
    train, held, everything = (
        sources_of(make(sprite_records, split=split, eval_fraction=fraction))
        for split in ("train", "eval", "all")
    )
    assert not train & held
    assert train | held == everything
    assert (len(held), len(everything)) == (held_out, 24)


def test_without_a_fraction_all_is_for_training(sprite_records):
    assert len(records_of(make(sprite_records, eval_fraction=0.0))) == 24


def test_pieces_of_a_source_stay_together(tmp_path):
    records = [video_record(i, source=f"{i // 3}.mp4") for i in range(30)]
    dataset = write_videos(tmp_path / "records", records)
    train, held = (make(dataset, split=split, eval_fraction=0.3) for split in ("train", "eval"))
    assert not sources_of(train) & sources_of(held)
    assert len(records_of(held)) == 9 and len(sources_of(held)) == 3


def test_split_goes_by_name_and_survives_other_videos(tmp_path):
    """New videos may push the boundary, but nothing else changes sides."""
    old = [f"old{i}" for i in range(12)]
    new = [f"new{i}" for i in range(7)]

    def held_out(name, sources):
        dataset = write_latents(tmp_path / name, sources)
        return sources_of(make(dataset, split="eval", eval_fraction=0.3))

    before = held_out("before", old)
    assert held_out("reversed", old[::-1]) == before
    after = held_out("after", [*new, *old]) & set(old)
    assert before <= after or after <= before
    assert before & after


def test_latents_are_split_like_the_videos_they_were_made_of(tmp_path):
    """Also where some videos are too short for a clip, so that no latents were made of them."""
    lengths = [2 if i % 3 == 2 else 8 for i in range(24)]
    videos = write_videos(tmp_path / "videos", [video_record(i, n) for i, n in enumerate(lengths)])
    names = sorted(sources_of(make(videos, split="all")))
    assert len(names) == 16
    latents = write_latents(tmp_path / "latents", names)
    for split, fraction in itertools.product(("train", "eval"), (0.1, 0.2, 0.4)):
        chosen = [make(d, split=split, eval_fraction=fraction) for d in (videos, latents)]
        assert sources_of(chosen[0]) == sources_of(chosen[1])


# What a batch holds


def test_batches_hold_clips_of_their_records(sprite_records):
    pipeline = make(sprite_records, fps=0.0)
    dataset = pipeline.dataset
    buckets = set()
    for k, batch in enumerate(take(pipeline, pipeline.batches_per_epoch)):
        bucket, records = pipeline.plan(k)
        buckets.add(bucket)
        assert batch["video"].dtype == np.uint8
        assert batch["video"].shape == (8, 5, *SIZES[bucket], 3)
        for row, r in enumerate(records):
            record = dataset.read(r)
            assert batch["caption"][row] == record["caption"]
            assert batch["label"][row] == record["label"]
            assert batch["fps"][row] == np.float32(record["fps"])
            frames = fit_frames(decode_frames(record, range(record["num_frames"])), SIZES[bucket])
            starts = [
                s
                for s in range(len(frames) - 4)
                if (frames[s : s + 5] == batch["video"][row]).all()
            ]
            assert starts, f"row {row} of batch {k} is no clip of record {r}"
    assert len(buckets) == 3


def test_label_and_fps_are_small_numbers(sprite_records):
    (batch,) = take(make(sprite_records, fps=6.0), 1)
    assert (batch["label"].dtype, batch["fps"].dtype) == (np.int32, np.float32)
    assert (batch["fps"] == 6.0).all()


def test_clips_are_cut_at_the_wanted_rate(tmp_path):
    """24 fps read at 8: every third frame, from anywhere."""
    records = [video_record(i, np.arange(24) / 24) for i in range(8)]
    dataset = write_videos(tmp_path / "records", records)
    shown = np.concatenate([frames_shown(b) for b in take(make(dataset, split="all"), 4)])
    assert (np.diff(shown, axis=1) == 3).all()
    assert len(set(shown[:, 0])) > 4 and shown.max() <= 23


def test_images_make_clips_of_one_frame(tmp_path):
    dataset = write_videos(tmp_path / "records", [video_record(i, 1 + i) for i in range(3)])
    pipeline = make(dataset, num_frames=1, split="all", batch_size=3)
    (batch,) = take(pipeline, 1)
    assert batch["video"].shape == (3, 1, 16, 16, 3)
    assert (frames_shown(batch)[:, 0] <= batch["label"]).all()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_shapes_are_those_that_arrive(sprite_records, batch_size):
    pipeline = make(sprite_records, batch_size=batch_size)

    def signature(arrays):
        return tuple(
            (n, a.shape, str(a.dtype)) for n, a in sorted(arrays.items()) if n != "caption"
        )

    promised = [signature(shapes) for shapes in pipeline.shapes()]
    assert len(promised) == len(set(promised)) == 3
    assert {signature(b) for b in take(pipeline, pipeline.batches_per_epoch)} == set(promised)


def test_empty_buckets_are_not_promised(tmp_path):
    dataset = write_videos(tmp_path / "records", [video_record(i) for i in range(4)])
    pipeline = make(dataset, split="all")
    assert [s["video"].shape for s in pipeline.shapes()] == [(8, 5, 16, 16, 3)]
    assert pipeline.describe().endswith("records: 4 in 16x16")


def test_latents_flow_through(tmp_path):
    shapes = ((2, 4, 6, 8), (2, 6, 4, 8), (1, 6, 4, 8))
    dataset = write_latents(tmp_path / "latents", [f"{i}" for i in range(11)], shapes)
    pipeline = make(dataset, split="all", batch_size=3)
    assert {s["latents"].shape[1:] for s in pipeline.shapes()} == set(shapes)
    assert all(s["latents"].dtype == np.float16 for s in pipeline.shapes())
    assert all(f" in {'x'.join(map(str, s))}" in pipeline.describe() for s in shapes)
    assert pipeline.left_out == 0
    seen = set()
    for batch in take(pipeline, pipeline.batches_per_epoch):
        latents, labels = batch["latents"], batch["label"]
        assert latents.dtype == np.float16
        assert (latents == (labels + 0.5)[:, None, None, None, None]).all()
        assert {latents.shape[1:]} == {shapes[i % 3] for i in labels}
        assert batch["caption"].tolist() == [f"latent {i}" for i in labels]
        assert (batch["fps"] == 8.0).all()
        seen |= set(labels.tolist())
    assert seen == set(range(11))


# Batch k is a function of (seed, k)


def test_batch_k_is_the_same_wherever_reading_starts(sprite_records):
    count = make(sprite_records).batches_per_epoch + 2
    straight = take(make(sprite_records), count)
    for start in (1, count - 2):
        for batch, expected in zip(take(make(sprite_records), 2, start), straight[start:]):
            assert_equal(batch, expected)


def test_batch_k_does_not_depend_on_threads(sprite_records):
    for a, b in zip(
        take(make(sprite_records, num_threads=1), 4), take(make(sprite_records, num_threads=8), 4)
    ):
        assert_equal(a, b)


def test_seeds_and_epochs_differ(sprite_records):
    pipeline = make(sprite_records, shuffle=False)
    first, again = take(pipeline, 1) + take(pipeline, 1, pipeline.batches_per_epoch)
    (other,) = take(make(sprite_records, shuffle=False, seed=4), 1)
    for batch in (again, other):  # the same videos, cut at other times
        np.testing.assert_array_equal(batch["caption"], first["caption"])
        assert (batch["video"] != first["video"]).any((1, 2, 3, 4)).sum() >= 4
    (shuffled,) = take(make(sprite_records, seed=4), 1)
    assert (shuffled["caption"] != first["caption"]).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all_processes_make_the_batch(sprite_records, processes):
    whole = take(make(sprite_records), 3, start=1)
    share = 8 // processes
    parts = [
        take(make(sprite_records), 3, start=1, rows=(i * share, (i + 1) * share))
        for i in range(processes)
    ]
    for batch, *pieces in zip(whole, *parts):
        assert all(len(piece["video"]) == share for piece in pieces)
        assert_equal(batch, {n: np.concatenate([p[n] for p in pieces]) for n in batch})


def test_worker_processes_read_the_same_batches(sprite_records):
    """Batches of several buckets, of an odd size, from the middle."""
    expected = take(make(sprite_records, batch_size=5), 4, start=1)
    assert len({batch["video"].shape for batch in expected}) > 1
    iterator = make(sprite_records, batch_size=5, num_workers=2).batches(start=1)
    try:
        for batch in expected:
            assert_equal(next(iterator), batch)
    finally:
        iterator.close()  # ends the workers


def test_an_epoch_is_counted_in_batches(sprite_records):
    pipeline = make(sprite_records, split="all", batch_size=5)
    counts = np.bincount([pipeline.plan(k)[0] for k in range(pipeline.batches_per_epoch)])
    in_bucket = np.bincount(
        [next(b for b, r in map(pipeline.plan, range(99)) if record in r) for record in range(24)]
    )
    assert counts.tolist() == [math.ceil(n / 5) for n in in_bucket]
