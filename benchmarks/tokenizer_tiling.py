"""What do tiles and chunks cost, and do they show? Against the whole, and against blended tiles.

    python -m benchmarks.tokenizer_tiling [--workdir RUN] [--video FILE] [--size 256 448]
    python -m benchmarks.tokenizer_tiling --frames 17 257

Without `--frames`: a clip is encoded and decoded

- whole;
- in exact tiles (`walt_jax.models.tokenizer.tiling`), whose norms see whole frames;
- in overlapping tiles that run through the network by themselves and are blended linearly, latents
  and pixels, as is common;
- in chunks of time (`walt_jax.models.tokenizer.streaming`).

For each: seconds (the median, encode + decode), their ratio to the whole, the largest difference of
pixels in [-1, 1] from the whole's, its mean magnitude near cuts (in space: where blended tiles
overlap; in time: the frames beside a cut) and elsewhere, and the device memory of the largest
compiled piece (arguments, results and temporaries, by XLA).

With `--frames`: videos of these lengths, 128x128 by default, whole and in chunks, each in a process
of its own: the largest piece again, and the process' resident memory (Linux) before the first
frame and at its peak, compilation included, as in the seconds; chunks come from a generator and go
nowhere. Memory of chunks must not grow.

Weights are random without `--workdir`. The clip is a drawn one without `--video`: statistics of its
parts differ, as those of real frames do.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.tokenizer_quality import small_model
from walt_jax import cli
from walt_jax.data.buckets import fit_frames
from walt_jax.data.video import read_video
from walt_jax.errors import UserError
from walt_jax.models import TokenizerConfig
from walt_jax.models.tokenizer import streaming, tiling
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, network
from walt_jax.tasks import to_unit
from walt_jax.training.tokenizers import load_tokenizer

MIB = 2**20
Reconstruct = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    args = _arguments()
    tokenizer = load_tokenizer(args.workdir) if args.workdir else random_tokenizer(args.channels)
    if args.worker:
        print(json.dumps(stream(tokenizer, args)))
        return
    records = stream_all(args) if args.frames else compare(tokenizer, args)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", help="run of a tokenizer; default: random weights")
    parser.add_argument("--channels", type=int, default=16, help="width of the random one")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--chunk", type=int, default=4, help="frames, a multiple of 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    ours = parser.add_argument_group("against the whole")
    ours.add_argument("--video", help="file; default: a drawn clip")
    ours.add_argument("--length", type=int, default=9, help="frames of the clip, 1 + 4n")
    ours.add_argument("--tiles", type=int, nargs=2, default=(2, 2), metavar=("ROWS", "COLUMNS"))
    ours.add_argument("--overlap", type=int, default=4, help="of blended tiles, in latents, even")
    ours.add_argument("--repeats", type=int, default=3)
    long = parser.add_argument_group("memory over length")
    long.add_argument("--frames", type=int, nargs="+", help="lengths, 1 + 4n, such as 17 257")
    long.add_argument("--worker", choices=("whole", "chunks"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = tuple(args.size or ((128, 128) if args.frames else (256, 448)))
    return args


def random_tokenizer(channels: int) -> FrozenTokenizer:
    """A small continuous one with weights of the seed 0."""
    config = TokenizerConfig(**small_model(channels))
    params = jax.device_get(network(config).init(jax.random.key(0)))
    moments = np.zeros(config.latent_channels), np.ones(config.latent_channels)
    return FrozenTokenizer.create(config, params, *moments)


def drawn_frames(start: int, stop: int, size: tuple[int, int]) -> np.ndarray:
    """Frames of a moving pattern, finer and brighter to the right: float32 (1, n, H, W, 3)."""
    t = np.arange(start, stop)[:, None, None, None]
    y, x = (np.linspace(0, 1, n) for n in size)
    y, x = y[None, :, None, None], x[None, None, :, None]
    phase = np.arange(3) + 0.2 * t
    waves = np.sin(60 * x**2 + phase) * np.cos(25 * y - phase)
    return (0.9 * (x - 0.5) + 0.5 * x * waves)[None].astype(np.float32)


# --- Against the whole ---------------------------------------------------------------------------


@jax.jit
def _encode(tokenizer: FrozenTokenizer, x: jax.Array) -> jax.Array:
    return tokenizer.encode(x)


@jax.jit
def _decode(tokenizer: FrozenTokenizer, z: jax.Array) -> jax.Array:
    return tokenizer.decode(z)


def whole(tokenizer: FrozenTokenizer, x: np.ndarray) -> np.ndarray:
    return np.asarray(_decode(tokenizer, _encode(tokenizer, x)))


def exact(tokenizer: FrozenTokenizer, x: np.ndarray, tiles: tuple[int, int]) -> np.ndarray:
    return tiling.decode_tiled(tokenizer, tiling.encode_tiled(tokenizer, x, tiles), tiles)


def blended(
    tokenizer: FrozenTokenizer, x: np.ndarray, tiles: tuple[int, int], overlap: int
) -> np.ndarray:
    """Encodes and decodes in overlapping tiles; where they overlap they fade linearly."""
    factors = tokenizer.config.factors[1:]
    *_, h, w, _ = tokenizer.config.latent_shape(*x.shape[1:4])
    spans = [_spans(n, parts, overlap) for n, parts in zip((h, w), tiles)]
    z = _blend(lambda piece: _encode(tokenizer, piece), x, spans, factors, (1, 1))
    return _blend(lambda piece: _decode(tokenizer, piece), z, spans, (1, 1), factors)


def _spans(size: int, parts: int, overlap: int) -> list[tuple[int, int]]:
    cuts = [i * size // parts for i in range(parts + 1)]
    half = overlap // 2
    return [(max(0, a - half), min(size, b + half)) for a, b in itertools.pairwise(cuts)]


def _blend(
    run: Callable[[np.ndarray], jax.Array],
    x: np.ndarray,
    spans: list[list[tuple[int, int]]],
    into: tuple[int, int],
    out: tuple[int, int],
) -> np.ndarray:
    """Sums the weighted results of tiles; `into` and `out` are pixels a latent of x and of them."""
    total = None
    rows, columns = (_ramps(s, scale) for s, scale in zip(spans, out))
    for (top, bottom), row in zip(spans[0], rows):
        for (left, right), column in zip(spans[1], columns):
            piece = x[:, :, top * into[0] : bottom * into[0], left * into[1] : right * into[1]]
            y = np.asarray(run(piece))
            if total is None:
                size = (spans[0][-1][1] * out[0], spans[1][-1][1] * out[1])
                total = np.zeros((*y.shape[:2], *size, y.shape[-1]), np.float32)
            here = (slice(top * out[0], bottom * out[0]), slice(left * out[1], right * out[1]))
            total[:, :, *here] += row[:, None, None] * column[:, None] * y
    return total


def _ramps(spans: list[tuple[int, int]], scale: int) -> list[np.ndarray]:
    """Weights of the spans, `scale` of them a latent, that sum to 1 everywhere."""
    ramps = [np.ones((b - a) * scale, np.float32) for a, b in spans]
    for i in range(len(spans) - 1):
        width = (spans[i][1] - spans[i + 1][0]) * scale
        rise = (np.arange(width, dtype=np.float32) + 0.5) / width if width else np.ones(0)
        ramps[i + 1][:width] *= rise
        ramps[i][len(ramps[i]) - width :] *= 1 - rise
    return ramps


def chunked(tokenizer: FrozenTokenizer, x: np.ndarray, chunk: int) -> np.ndarray:
    chunks = streaming.split_frames(x, chunk, 1 + chunk)
    pixels = streaming.decode_chunks(tokenizer, streaming.encode_chunks(tokenizer, chunks))
    return np.concatenate(list(map(np.asarray, pixels)), axis=1)


def compare(tokenizer: FrozenTokenizer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and returns a row a way.

    Raises:
      UserError: a size, length or video that does not fit.
    """
    x = _clip(args)
    _, h, w, _ = tokenizer.config.latent_shape(*x.shape[1:4])
    if args.overlap % 2 or any(n // parts <= args.overlap for n, parts in zip((h, w), args.tiles)):
        raise UserError(
            f"--overlap {args.overlap} must be even and less than a tile of {h}x{w} latents in "
            f"{args.tiles[0]}x{args.tiles[1]} tiles."
        )
    rows, columns, frames = _near_cuts(tokenizer, x, args)
    space = rows[:, None] | columns
    tiles = "x".join(map(str, args.tiles))
    ways: dict[str, tuple[Reconstruct, np.ndarray]] = {
        "whole": (lambda x: whole(tokenizer, x), space[None]),
        f"exact tiles {tiles}": (lambda x: exact(tokenizer, x, args.tiles), space[None]),
        f"blended tiles {tiles}": (
            lambda x: blended(tokenizer, x, args.tiles, args.overlap),
            space[None],
        ),
        f"chunks of {args.chunk}": (
            lambda x: chunked(tokenizer, x, args.chunk),
            frames[:, None, None],
        ),
    }
    kind = "trained" if args.workdir else "random"
    print(f"{'x'.join(map(str, x.shape[1:4]))}, {kind} weights, {os.cpu_count()} cores")
    header = ("seconds", "ratio", "largest", "near cuts", "elsewhere", "MiB")
    print(f"{'':<20}" + "".join(f"{c:>12}" for c in header))
    records = []
    for name, (run, near) in ways.items():
        with pieces() as compiled:
            y = run(x)
        seconds = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - began)
        if not records:
            reference = y
        difference = np.abs(y - reference)
        of_pixels = difference.mean((0, 4))
        near = np.broadcast_to(near, of_pixels.shape)
        record = {
            "way": name,
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(seconds) / records[0]["seconds"] if records else 1.0,
            "largest": float(difference.max()),
            "near cuts": float(of_pixels[near].mean()) if near.any() else 0.0,
            "elsewhere": float(of_pixels[~near].mean()),
            "MiB": max(map(memory, compiled)) / MIB,
        }
        records.append(record)
        values = [record[c] for c in header]
        formats = (".2f", ".2f", ".1e", ".1e", ".1e", ".0f")
        cells = "".join(f"{format(v, f):>12}" for v, f in zip(values, formats))
        print(f"{name:<20}{cells}", flush=True)
    return records


def _clip(args: argparse.Namespace) -> np.ndarray:
    if not args.video:
        return drawn_frames(0, args.length, args.size)
    frames = read_video(args.video).frames[: args.length]
    if len(frames) < args.length:
        raise UserError(f"{args.video} has {len(frames)} frames: lower --length {args.length}.")
    return np.asarray(to_unit(fit_frames(frames, args.size)[None]))


def _near_cuts(
    tokenizer: FrozenTokenizer, x: np.ndarray, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows and columns lie where blended tiles overlap, and which frames beside a cut."""
    length, *size = x.shape[1:4]
    masks = []
    for n, parts, factor in zip(size, args.tiles, tokenizer.config.factors[1:]):
        mask = np.zeros(n, bool)
        spans = _spans(n // factor, parts, args.overlap)
        for before, after in itertools.pairwise(spans):
            mask[after[0] * factor : before[1] * factor] = True
        masks.append(mask)
    first = np.arange(1 + args.chunk, length, args.chunk)
    frames = np.isin(np.arange(length), [*first, *(first - 1)])
    return *masks, frames


@dataclasses.dataclass
class Piece:
    """A jitted function that remembers its largest call.

    Attributes:
      function: what is called.
      bytes: of the arrays of the largest call.
      arguments: their shapes, beside what is no array.
    """

    function: Any
    bytes: int = -1
    arguments: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        size = sum(getattr(a, "nbytes", 0) for a in jax.tree.leaves(arguments))
        if size > self.bytes:
            self.bytes = size
            self.arguments = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "shape") else a,
                arguments,
            )
        return self.function(*arguments)


@contextlib.contextmanager
def pieces() -> Iterator[list[Piece]]:
    """The compiled functions that were called inside, filled when it ends."""
    modules = {
        sys.modules[__name__]: ("_encode", "_decode"),
        tiling: ("_convolve", "_normalise", "_group_statistics"),
        streaming: ("_encode", "_decode"),
    }
    used: list[Piece] = []
    with contextlib.ExitStack() as stack:
        spies = [Piece(getattr(m, name)) for m, names in modules.items() for name in names]
        targets = [(m, name) for m, names in modules.items() for name in names]
        for (module, name), spy in zip(targets, spies):
            stack.enter_context(mock.patch.object(module, name, spy))
        yield used
    used += [spy for spy in spies if spy.bytes >= 0]


def memory(piece: Piece) -> int:
    """Bytes that its largest call takes on the device, by XLA."""
    analysis = piece.function.lower(*piece.arguments).compile().memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )


# --- Memory over length --------------------------------------------------------------------------


def stream_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and returns a row a way and length, each from its own process."""
    size = "x".join(map(str, args.size))
    print(f"encode + decode at {size}, MiB (start, peak: of the process), {os.cpu_count()} cores")
    print(f"{'':<20}" + "".join(f"{c:>14}" for c in ("largest piece", "start", "peak", "seconds")))
    records = []
    # glibc's settings for speed keep freed memory.
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    for frames in args.frames:
        for way in ("whole", "chunks"):
            command = [sys.executable, "-m", "benchmarks.tokenizer_tiling", "--worker", way]
            command += ["--frames", str(frames), "--size", *map(str, args.size)]
            command += ["--chunk", str(args.chunk), "--channels", str(args.channels)]
            command += ["--workdir", args.workdir] if args.workdir else []
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"{way}, {frames} frames: exit status {done.returncode}.")
            record = {"way": way, "frames": frames, **json.loads(done.stdout)}
            records.append(record)
            columns = (("piece", 0), ("start", 0), ("peak", 0), ("seconds", 1))
            cells = [f"{record[k]:>14.{digits}f}" for k, digits in columns]
            print(f"{f'{way}, {frames} frames':<20}{''.join(cells)}", flush=True)
    return records


def stream(tokenizer: FrozenTokenizer, args: argparse.Namespace) -> dict[str, float]:
    """One way and length in this process: MiB of the largest piece and at the peak, seconds."""
    length, chunk = args.frames[0], args.chunk
    tokenizer.config.latent_shape(length, *args.size)
    start, began = _resident("VmRSS"), time.perf_counter()
    with pieces() as compiled:
        if args.worker == "whole":
            total = float(np.mean(whole(tokenizer, drawn_frames(0, length, args.size))))
        else:
            edges = [0, *range(1 + chunk, length, chunk), length]
            chunks = (drawn_frames(a, b, args.size) for a, b in itertools.pairwise(edges))
            latents = streaming.encode_chunks(tokenizer, chunks)
            pixels = streaming.decode_chunks(tokenizer, latents)
            total = sum(float(np.sum(np.asarray(p))) for p in pixels)
            total /= 3 * length * args.size[0] * args.size[1]
    seconds = time.perf_counter() - began
    peak = _resident("VmHWM")  # before pieces are compiled once more
    return {
        "piece": max(map(memory, compiled)) / MIB,
        "start": start / MIB,
        "peak": peak / MIB,
        "seconds": seconds,
        "mean_pixel": total,
    }


def _resident(which: str) -> int:
    """Bytes resident in this process: now (VmRSS), or the most so far (VmHWM)."""
    # Not getrusage, whose peak begins at that of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))


if __name__ == "__main__":
    cli.run(main)
