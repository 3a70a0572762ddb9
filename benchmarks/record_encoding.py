"""How should a record store its frames? Size, decode speed and fidelity of each encoding.

    python benchmarks/record_encoding.py --clips FOLDER [--short-sides 128 256]

For every encoding: bytes a frame, clips a second of CPU time (so: of one core) when a training
example is 17 consecutive frames from a random offset, the same with every third frame (30 fps ->
10 fps), frames encoded a second, and the PSNR of the stored frames against the shrunken source.
The numbers in the docstring of `walt_jax/data/records.py` come from here.
"""

import argparse
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from walt_jax.data import video

CLIP_FRAMES = 17
Packets = list[bytes]


def jpeg(quality: int, sampling: int) -> tuple[Callable, Callable]:
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]

    def encode(frames: np.ndarray) -> Packets:
        return [cv2.imencode(".jpg", f[..., ::-1], flags)[1].tobytes() for f in frames]

    def decode(packets: Packets, indices: np.ndarray) -> np.ndarray:
        flag = cv2.IMREAD_COLOR_RGB
        return np.stack([cv2.imdecode(np.frombuffer(packets[i], np.uint8), flag) for i in indices])

    return encode, decode


def h264(crf: int, group: int, pixels: str = "yuv420p") -> tuple[Callable, Callable]:
    """Packets without a container and without B-frames: packet i is frame i."""

    def encode(frames: np.ndarray) -> Packets:
        frames = np.pad(
            frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge"
        )
        codec = av.CodecContext.create("libx264", "w")
        codec.width, codec.height, codec.pix_fmt = frames.shape[2], frames.shape[1], pixels
        codec.time_base, codec.thread_count = Fraction(1, 30), 1
        codec.options = {
            "crf": str(crf),
            "preset": "medium",
            "x264-params": f"keyint={group}:min-keyint={group}:scenecut=0:bframes=0",
        }
        packets = []
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 30)
            packets += codec.encode(picture)
        return [bytes(p) for p in packets + codec.encode(None)]

    def decode(packets: Packets, indices: np.ndarray) -> np.ndarray:
        codec = av.CodecContext.create("h264", "r")
        codec.thread_count = 1
        wanted = set(indices.tolist())
        groups = {i // group for i in wanted}  # an intra stream skips what is not asked for
        needed = [i for i in range(indices[-1] + 1) if i // group in groups]
        order, frames = iter(needed), []
        for data in [*(packets[i] for i in needed), None]:
            for frame in codec.decode(av.Packet(data) if data else None):
                if next(order) in wanted:
                    frames.append(frame.to_ndarray(format="rgb24"))
        return np.stack(frames)

    return encode, decode


S420, S444 = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
ENCODINGS = {
    "jpeg q90 4:2:0": jpeg(90, S420),
    "jpeg q95 4:2:0": jpeg(95, S420),
    "jpeg q90 4:4:4": jpeg(90, S444),
    "jpeg q95 4:4:4": jpeg(95, S444),
    "h264 crf16 intra": h264(16, 1),
    "h264 crf16 gop 8": h264(16, 8),
    "h264 crf16 gop 32": h264(16, 32),
    "h264 crf16 gop 8 4:4:4": h264(16, 8, "yuv444p"),
}


def crops(length: int, stride: int, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    span = min(length, (CLIP_FRAMES - 1) * stride + 1)
    starts = rng.integers(0, length - span + 1, count)
    return [s + np.arange(0, span, stride) for s in starts]


def measure(clips: list[np.ndarray], encode: Callable, decode: Callable) -> list[float]:
    rng = np.random.default_rng(0)
    began = time.process_time()
    stored = [encode(clip) for clip in clips]
    encode_seconds = time.process_time() - began
    frames = sum(map(len, clips))
    size = sum(len(p) for packets in stored for p in packets) / frames
    speeds = []
    for stride in (1, 3):
        jobs = [(p, i) for c, p in zip(clips, stored) for i in crops(len(c), stride, rng, 6)]
        began = time.process_time()
        for packets, indices in jobs:
            decode(packets, indices)
        speeds.append(len(jobs) / (time.process_time() - began))
    errors = []
    for clip, packets in zip(clips, stored):
        out = decode(packets, np.arange(min(len(clip), 32)))[:, : clip.shape[1], : clip.shape[2]]
        errors.append(np.mean((out.astype(np.float32) - clip[: len(out)]) ** 2))
    psnr = np.mean(10 * np.log10(255**2 / np.array(errors)))
    return [size, *speeds, frames / encode_seconds, psnr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", required=True, help="folder of videos")
    parser.add_argument("--short-sides", type=int, nargs="+", default=[128, 256])
    args = parser.parse_args()
    cv2.setNumThreads(1)
    paths = sorted(p for p in Path(args.clips).rglob("*") if p.suffix in video.EXTENSIONS)
    header = ["bytes/frame", "clips/s", "clips/s /3", "encode f/s", "PSNR dB"]
    for short_side in args.short_sides:
        clips = [
            video.read_video(p, end=4.0, short_side=short_side, threads=1).frames for p in paths
        ]
        print(f"\n{len(clips)} clips, short side {short_side}, one core")
        print(f"{'encoding':<24}" + "".join(f"{h:>13}" for h in header))
        for name, (encode, decode) in ENCODINGS.items():
            row = measure(clips, encode, decode)
            print(f"{name:<24}" + "".join(f"{v:>13.1f}" for v in row), flush=True)


if __name__ == "__main__":
    main()
