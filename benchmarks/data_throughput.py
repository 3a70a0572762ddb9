"""How fast are clips read? Records through our pipeline, files through torch's DataLoader.

    python benchmarks/data_throughput.py --clips FOLDER [--seconds 10] [--rounds 3] [--workers 0]

Both give batches of uint8 clips (8, 17, 128, 128, 3): 17 consecutive frames from a random start of
a random video, its shorter side brought to 128 pixels, the centre cut out. Ours come from records
that `prepare` made with `--short-side 128`. DataLoader's come from decord, once from the files as
they are and once from H.264 files that were shrunk to 128 pixels beforehand. One after the other in
one process on the cores that it may use (choose them with taskset), several rounds, medians. Clips
a second of CPU time, threads and workers included, are what a core gives; they stand still when
other programs run, clips a second of wall time do not.

Then what one TPU v5e host would need: W.A.L.T-XL's training takes 4.6e12 FLOPs a clip
(configs/walt_ucf101.py), at 40 % of 197e12 FLOP/s a chip and 4 chips a host.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from walt_jax import media
from walt_jax.data.buckets import fit_frames
from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import open_dataset
from walt_jax.data.video import iter_frames
from walt_jax.errors import UserError

SIDE, FRAMES, BATCH = 128, 17, 8
_FLOPS_A_CLIP, _PEAK, _SHARE, _CHIPS = 7e19 / (60_000 * 256), 197e12, 0.4, 4
Reader = Callable[[], Iterator[np.ndarray]]


def records(folder: Path, workers: int) -> Reader:
    """Our pipeline's batches."""
    config = DataConfig(
        str(folder),
        num_frames=FRAMES,
        fps=0.0,
        sizes=((SIDE, SIDE),),
        eval_fraction=0.0,
        num_workers=workers,
        num_threads=max(1, len(os.sched_getaffinity(0))),
    )
    pipeline = Pipeline(open_dataset(folder), config, batch_size=BATCH, seed=0)
    return lambda: (batch["video"] for batch in pipeline.batches())


def loader(paths: list[Path], workers: int) -> Reader:
    """torch.utils.data.DataLoader over decord, which shrinks while it decodes."""
    import decord
    import torch

    torch.set_num_threads(1)

    class Clips(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.sizes = []
            for path in paths:
                height, width = decord.VideoReader(str(path), num_threads=1)[0].shape[:2]
                scale = SIDE / min(height, width)
                self.sizes.append(
                    (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
                )

        def __len__(self) -> int:
            return 2**30

        def __getitem__(self, i: int) -> torch.Tensor:
            rng = np.random.default_rng(i)
            chosen = rng.integers(len(paths))
            width, height = self.sizes[chosen]
            video = decord.VideoReader(
                str(paths[chosen]), width=width, height=height, num_threads=1
            )
            start = rng.integers(len(video) - FRAMES + 1)
            frames = video.get_batch(range(start, start + FRAMES)).asnumpy()
            top, left = (height - SIDE) // 2, (width - SIDE) // 2
            return torch.from_numpy(frames[:, top : top + SIDE, left : left + SIDE].copy())

    clips = Clips()
    return lambda: iter(
        batch.numpy()
        for batch in torch.utils.data.DataLoader(clips, batch_size=BATCH, num_workers=workers)
    )


def shrunk(paths: list[Path], folder: Path) -> list[Path]:
    """The same videos as H.264 files of 128 pixels."""
    out = []
    for path in paths:
        frames = [frame for _, frame in iter_frames(path, short_side=SIDE, end=20.0)]
        frames = fit_frames(np.stack(frames), (SIDE, SIDE))
        out.append(folder / f"{path.stem}.mp4")
        media.write_mp4(out[-1], frames, 30)
    return out


def timed(reader: Reader, seconds: float) -> tuple[float, float]:
    """(clips a second, clips a second of CPU time), after the first batches."""
    batches = reader()
    for _ in range(2):
        batch = next(batches)
        assert batch.shape == (BATCH, FRAMES, SIDE, SIDE, 3) and batch.dtype == np.uint8
    began, used, count = time.monotonic(), _cpu(), 0
    while time.monotonic() - began < seconds:
        next(batches)
        count += BATCH
    wall = time.monotonic() - began
    del batches  # ends workers, whose time is counted then
    return count / wall, count / (_cpu() - used)


def _cpu() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes of each")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare_dataset(args.clips, folder / "records", short_side=SIDE, runner="threads")
        sources = sorted(set(open_dataset(folder / "records").index["source"].tolist()))
        paths = [args.clips / s for s in sources]
        if not paths:
            raise UserError(f"{args.clips} holds no video: give --clips.")
        (folder / "small").mkdir()
        readers = {
            "walt_jax, records": records(folder / "records", args.workers),
            "DataLoader + decord, 128-pixel files": loader(
                shrunk(paths, folder / "small"), args.workers
            ),
            "DataLoader + decord, the files": loader(paths, args.workers),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for _ in range(args.rounds):
            for name, reader in readers.items():
                found[name].append(timed(reader, args.seconds))
    cores = len(os.sched_getaffinity(0))
    print(f"{len(paths)} videos, {cores} cores, {args.workers} workers, {args.rounds} rounds")
    print(f"{'':<40}{'clips/s':>10}{'clips/s a core':>16}{'frames/s a core':>17}{'ratio':>8}")
    ours = None
    for name, rounds in found.items():
        wall, core = (statistics.median(column) for column in zip(*rounds))
        ours = ours or core
        print(f"{name:<40}{wall:>10.1f}{core:>16.1f}{core * FRAMES:>17.0f}{ours / core:>8.1f}")
    need = _PEAK * _SHARE * _CHIPS / _FLOPS_A_CLIP
    print(
        f"A v5e host of {_CHIPS} chips training W.A.L.T-XL at {_SHARE:.0%} of its peak takes "
        f"{need:.0f} clips/s: {need / ours:.2f} such cores for the data."
    )


if __name__ == "__main__":
    main()
