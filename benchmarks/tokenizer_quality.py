"""What does a tokenizer lose? Continuous and LFQ latents, and H.264 at LFQ's bits per pixel.

    python -m benchmarks.tokenizer_quality [--videos FOLDER] [--out out/quality] [--steps 500]

Trains two small tokenizers alike (the same clips, seed, steps and network; float32, mean squared
error alone) on the videos of a folder at 128x128, and reconstructs clips of videos that are held
out whole:

- continuous: 8 channels, no quantizer; counted as 16 bits a number.
- LFQ: 18 bits, so one code a latent; clips go through the packed codes, whose bytes are counted.
- H.264: each clip by itself through x264 (very slow, tuned for PSNR, a keyframe first), at the crf,
  to a tenth, whose packets come nearest to LFQ's bytes from below. Like a network's weights, the
  parameter sets of the stream (some 40 bytes) are not counted.

PSNR and SSIM (skimage's, 7x7 windows, over RGB) are those of uint8 frames, averaged over all frames
of all clips. `--out` gets `quality.json`, with the figures of each video, and `quality.png`. A run
that was cut off goes on; other options need another `--out`.

The budget is minutes where the papers' is days of many chips, with perceptual and adversarial
losses: the table compares the quantizers at that budget, not the method with H.264.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import jax
import numpy as np
from av.video.reformatter import Interpolation

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import open_dataset
from walt_jax.errors import UserError
from walt_jax.media import frame_grid, write_png
from walt_jax.models import count
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.models.tokenizer.quantizers import pack_codes, unpack_codes
from walt_jax.tasks import to_uint8, to_unit
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.metrics import read_metrics
from walt_jax.training.tokenizers import load_tokenizer

SIZE = 128
BITS = 18
CONTINUOUS_BITS = 16  # of a number of continuous latents
WORST_CRF = 510  # in tenths
COLUMNS = ("bits/pixel", "PSNR", "first", "last", "SSIM", "parameters", "steps", "seconds")
_EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
Row = dict[str, Any]


def main() -> None:
    args = _arguments()
    dataset_path = args.out / "records"
    prepare_dataset(_videos(args.videos), dataset_path, short_side=SIZE, overwrite=True)
    data = {
        "path": str(dataset_path),
        "num_frames": args.frames,
        "fps": args.fps,
        "sizes": ((SIZE, SIZE),),
        "eval_fraction": args.eval_fraction,
    }
    clips, names = held_out(config_lib.build(DataConfig, data), args.clips)
    print(_budget(args, clips, names), flush=True)
    lfq = {"name": "lfq", "entropy_weight": args.entropy_weight}
    models = {
        "continuous": {"latent_channels": 8},
        "LFQ": {"latent_channels": BITS, "quantizer": lfq},
    }
    rows, shown = [], {"original": clips}
    for name, model in models.items():
        workdir = args.out / name.lower()
        train(experiment(args, data, model), workdir)
        tokenizer = load_tokenizer(workdir)
        reconstruction, bits, codes = reconstruct(tokenizer, clips)
        shown[name] = reconstruction
        hours = read_metrics(workdir, "speed/core_hours")[1][-1]
        rows.append(
            {
                "name": name,
                "bits/pixel": float(np.mean(bits)) / math.prod(clips.shape[1:4]),
                **quality(clips, reconstruction, names),
                "parameters": count(tokenizer.params),
                "steps": args.steps,
                "seconds": 3600.0 * hours / jax.device_count(),
                **codes,
            }
        )
    stored = [h264(clip, int(size) // 8, args.fps or 30.0) for clip, size in zip(clips, bits)]
    shown["H.264"] = np.stack([s.frames for s in stored])
    rows.append(
        {
            "name": "H.264",
            "bits/pixel": 8.0 * np.mean([s.bytes for s in stored]) / math.prod(clips.shape[1:4]),
            **quality(clips, shown["H.264"], names),
            "crf": [s.crf for s in stored],
            "clips too large at the worst crf": sum(
                s.bytes > int(b) // 8 for s, b in zip(stored, bits)
            ),
        }
    )
    _print(rows)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record = {"options": options, "cores": os.cpu_count(), "held_out": names, "rows": rows}
    (args.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    write_png(args.out / "quality.png", picture({k: v[:: args.clips] for k, v in shown.items()}))
    print(f"\n{args.out}/quality.png: {', '.join(shown)}; one row a held-out video")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="default: $WALT_TEST_DATA")
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=9, help="of a clip: 1 + 4n")
    parser.add_argument("--fps", type=float, default=8.0, help="of a clip; 0 takes every frame")
    parser.add_argument("--channels", type=int, default=8, help="width of the first level")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--entropy_weight", type=float, default=0.1, help="of LFQ, as published")
    parser.add_argument("--eval_fraction", type=float, default=0.19, help="of videos, held out")
    parser.add_argument("--clips", type=int, default=4, help="cut from every held-out video")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _videos(given: Path | None) -> Path:
    default = Path(__file__).resolve().parents[2] / "shared" / "clips"
    folder = given or Path(os.environ.get("WALT_TEST_DATA", default))
    if not folder.is_dir():
        raise UserError(f"There is no folder of videos at {folder}: give one by --videos.")
    return folder


def held_out(data: DataConfig, clips: int) -> tuple[np.ndarray, list[str]]:
    """Clips of every held-out record: uint8 (N, T, H, W, 3), those of a record in a row; names."""
    dataset = open_dataset(data.path)
    pipeline = Pipeline(dataset, data, batch_size=1, seed=0, split="eval", shuffle=False)
    num = pipeline.batches_per_epoch
    batches = itertools.islice(pipeline.batches(), num * clips)
    videos = np.stack([batch["video"][0] for batch in batches])
    records = [pipeline.plan(k)[1][0] for k in range(num)]
    names = [str(dataset.index["source"][record]) for record in records]
    return videos.reshape(clips, num, *videos.shape[1:]).swapaxes(0, 1).reshape(videos.shape), names


def experiment(args: argparse.Namespace, data: Row, model: Row) -> Experiment:
    """The run: as `configs/sprites_tokenizer.py`, at 128x128."""
    return config_lib.build(
        Experiment,
        {
            "task": {"name": "tokenizer", "model": small_model(args.channels) | model},
            "data": data,
            "num_steps": args.steps,
            "batch_size": args.batch,
            "seed": args.seed,
            "optimizer": {
                "learning_rate": args.learning_rate,
                "warmup_steps": max(1, args.steps // 20),
                "ema_decay": 0.99,
            },
            "log_every": max(1, args.steps // 20),
            "eval_every": max(1, args.steps // 4),
            "eval_batches": 2,
            "checkpoint_every": max(1, args.steps // 4),
        },
    )


def small_model(channels: int) -> Row:
    """Sizes of a tokenizer that CPUs can train: little work at full resolution, float32."""
    return {
        "channels": channels,
        "multipliers": (1, 2, 4, 8),
        "num_res_blocks": (0, 1, 2, 2),
        "norm_groups": 4,
        "dtype": "float32",
    }


def reconstruct(
    tokenizer: FrozenTokenizer, clips: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Row]:
    """Clips through latents or packed codes: uint8 clips, bits of each, figures of the codes."""
    config = tokenizer.config
    encode, decode = jax.jit(lambda t, x: t.encode(x)), jax.jit(lambda t, z: t.decode(z))
    encode_codes = jax.jit(lambda t, x: t.codes(x))
    shape = config.latent_shape(*clips.shape[1:4])
    num_codes = config.quantizer.num_codes(config.latent_channels)
    frames, bits, used = [], [], []
    for clip in clips:
        x = to_unit(clip[None])
        if num_codes is None:
            z = encode(tokenizer, x)
            bits.append(CONTINUOUS_BITS * math.prod(shape))
        else:
            codes = np.asarray(encode_codes(tokenizer, x))
            packed = pack_codes(codes, config.latent_channels)
            bits.append(8 * packed.size)
            codes = unpack_codes(packed, config.latent_channels, codes.shape)
            used.append(codes)
            z = tokenizer.from_codes(codes)
        frames.append(to_uint8(decode(tokenizer, z))[0])
    figures = {}
    if used:
        distinct = np.unique(np.stack(used)).size
        figures = {"held-out codes": int(np.stack(used).size), "distinct": int(distinct)}
    return np.stack(frames), np.array(bits), figures


@dataclasses.dataclass(frozen=True)
class Stored:
    """A clip that went through H.264: its frames, the bytes of its packets and its crf."""

    frames: np.ndarray
    bytes: int
    crf: float


def h264(clip: np.ndarray, most: int, fps: float) -> Stored:
    """The least crf whose packets have at most so many bytes; the worst where none has.

    Args:
      clip: uint8 (T, H, W, 3), even sizes.
      most: bytes.
      fps: frames a second; x264's rate control looks at it.
    """
    low, high = 0, WORST_CRF  # sizes fall with the crf but for a byte here and there
    best = _encode(clip, high, fps)
    while low < high and best.bytes <= most:
        middle = (low + high) // 2
        stored = _encode(clip, middle, fps)
        if stored.bytes <= most:
            best, high = stored, middle
        else:
            low = middle + 1
    return best


def _encode(clip: np.ndarray, crf: int, fps: float) -> Stored:
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
    codec.time_base = 1 / Fraction(fps).limit_denominator(1001)
    codec.framerate = 1 / codec.time_base
    codec.thread_count = 1
    # Else the first packet holds the parameter sets and x264's name and options, 700 bytes.
    codec.flags |= int(av.codec.context.Flags.global_header)
    codec.options = {"crf": str(crf / 10), "preset": "veryslow", "tune": "psnr"}
    packets = []
    for i, frame in enumerate(clip):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = picture.reformat(format="yuv420p", interpolation=_EXACT)
        picture.pts, picture.time_base = i, codec.time_base
        packets += codec.encode(picture)
    packets += codec.encode(None)
    reader = av.CodecContext.create("h264", "r")
    reader.extradata, reader.thread_count = codec.extradata, 1
    frames = [f for packet in [*packets, None] for f in reader.decode(packet)]
    pixels = [f.to_ndarray(format="rgb24", interpolation=_EXACT) for f in frames]
    return Stored(np.stack(pixels), sum(p.size for p in packets), crf / 10)


def quality(clips: np.ndarray, reconstruction: np.ndarray, names: Sequence[str]) -> Row:
    """PSNR in dB and SSIM, each the mean over frames and clips; and those of each video.

    Args:
      clips, reconstruction: uint8 (N, T, H, W, 3); N is a multiple of the number of names.
      names: of the videos, whose clips follow one another.

    Raises:
      UserError: scikit-image is missing.
    """
    try:
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as e:
        raise UserError("scikit-image is missing: pip install scikit-image for SSIM.") from e
    error = np.square(clips.astype(np.float64) - reconstruction).mean((2, 3, 4))
    psnr = 10.0 * np.log10(255.0**2 / np.maximum(error, 1e-10))
    ssim = np.array(
        [
            [structural_similarity(x, y, channel_axis=-1, data_range=255) for x, y in zip(a, b)]
            for a, b in zip(clips, reconstruction)
        ]
    )
    of_videos = [v.reshape(len(names), -1).mean(1) for v in (psnr, ssim)]
    return {
        "PSNR": float(psnr.mean()),
        "first": float(psnr[:, 0].mean()),
        "last": float(psnr[:, -1].mean()),
        "SSIM": float(ssim.mean()),
        "videos": [
            {"source": name, "PSNR": float(p), "SSIM": float(s)}
            for name, p, s in zip(names, *of_videos)
        ],
    }


def picture(videos: dict[str, np.ndarray]) -> np.ndarray:
    """One row a clip, for each key a few frames under its name: uint8 (H, W, 3)."""
    columns = []
    for name, clips in videos.items():
        grid = frame_grid(clips, columns=3)
        head = np.full((26, grid.shape[1], 3), 255, np.uint8)
        cv2.putText(head, name, (2, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        columns += [np.concatenate([head, grid]), np.full((len(grid) + 26, 10, 3), 255, np.uint8)]
    return np.concatenate(columns[:-1], axis=1)


def _budget(args: argparse.Namespace, clips: np.ndarray, names: Sequence[str]) -> str:
    where, fps = jax.devices()[0], f"{args.fps:g}" if args.fps else "their own"
    return (
        f"{args.steps} steps of {args.batch} clips of {args.frames}x{SIZE}x{SIZE} at {fps} fps, "
        f"seed {args.seed}, on {where.platform} ({where.device_kind}), {os.cpu_count()} cores\n"
        f"held out: {len(clips)} clips of {', '.join(names)}"
    )


def _print(rows: Sequence[Row]) -> None:
    formats = dict(zip(COLUMNS, (".4f", ".2f", ".2f", ".2f", ".4f", ",", "", ".0f")))
    print(f"\n{'':<12}" + "".join(f"{c:>12}" for c in COLUMNS))
    for row in rows:
        cells = [format(row[c], f) if c in row else "-" for c, f in formats.items()]
        print(f"{row['name']:<12}" + "".join(f"{cell:>12}" for cell in cells))
    print("PSNR in dB, also of the first and last frames; seconds of the steps and evaluations")
    for row in rows:
        if "distinct" in row:
            print(f"{row['name']}: {row['distinct']} of {row['held-out codes']} codes are distinct")
        if too_large := row.get("clips too large at the worst crf"):
            print(f"{row['name']}: {too_large} clips are larger than LFQ's even at crf 51")


if __name__ == "__main__":
    cli.run(main)
