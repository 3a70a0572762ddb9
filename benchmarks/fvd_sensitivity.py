"""What does FVD see? Real videos against themselves, spoilt in known ways and to known degrees.

    python -m benchmarks.fvd_sensitivity --videos FOLDER --weights FILE --out out/sensitivity

A window of 16 frames of 128x128 (the short side shrunk, the centre cut out) is taken from each
video of a folder that is long enough. Its Frechet and kernel distances from the same windows,
spoilt, are drawn beside those from other windows of the same videos, which are as real. With I3D's
trained weights these are FVD and KVD; with stand-in weights they are named frechet_fixture, and
tell what the graph sees before training. Numbers of so few videos compare with each other only.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import matplotlib
import numpy as np

from walt_jax import cli
from walt_jax.data.video import EXTENSIONS, read_video
from walt_jax.errors import UserError
from walt_jax.evaluation import features
from walt_jax.evaluation.frechet import frechet_distance, kernel_distance
from walt_jax.evaluation.moments import Moments
from walt_jax.progress import bar

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FRAMES, SIZE, FASTEST = 16, 128, 3
NEEDED = FASTEST * (FRAMES - 1) + 1

# uint8 frames of a window of NEEDED frames -> the 16 that are scored.
Spoil = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--weights", help="of I3D; default: the published ones")
    parser.add_argument("--most", type=int, default=1000, help="videos, evenly chosen by name")
    parser.add_argument("--net", default="i3d", help="another feature network")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    net = features.load(args.net, args.weights)
    windows, others = read_windows(args.videos, args.most)
    print(f"{len(windows)} windows of {FRAMES}x{SIZE}x{SIZE}, {net.name}: {net.weights}")
    rows = study(net, windows, others)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sensitivity.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, features.score_name(net), args.out / "sensitivity.png")
    show(windows, args.out / "frames.png")


def read_windows(folder: Path, most: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first and the last NEEDED frames of at most so many videos; they may overlap.

    Raises:
      UserError: fewer than two videos are long enough.
    """
    first, last = [], []
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    paths = paths[:: max(1, -(-len(paths) // most))]
    for path in bar(paths, what="reading", unit="video"):
        video = read_video(path, end=20.0, short_side=SIZE).frames
        if len(video) >= NEEDED + 1 and min(video.shape[1:3]) >= SIZE:
            top, left = ((n - SIZE) // 2 for n in video.shape[1:3])
            video = video[:, top : top + SIZE, left : left + SIZE]
            first.append(video[:NEEDED].copy())
            last.append(video[-NEEDED:].copy())
    if len(first) < 2:
        raise UserError(
            f"{folder} holds {len(first)} videos of {NEEDED + 1} frames of {SIZE}x{SIZE} or more: "
            "give a folder of at least two."
        )
    return first, last


def spoilers() -> dict[str, dict[str, Spoil]]:
    """Kind -> strength -> what it does."""

    def each(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
        return lambda v, rng: np.stack([change(frame) for frame in v[:FRAMES]])

    def noise(deviation: float) -> Spoil:
        return lambda v, rng: np.clip(
            np.rint(v[:FRAMES] + rng.normal(0, deviation, v[:FRAMES].shape)), 0, 255
        ).astype(np.uint8)

    def shuffle(block: int) -> Spoil:
        def run(v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            order = np.arange(FRAMES).reshape(-1, block)
            return v[rng.permuted(order, axis=1).ravel()]

        return run

    def pick(index: np.ndarray) -> Spoil:
        return lambda v, rng: v[index]

    steps = np.arange(FRAMES)
    return {
        "blur (sigma, pixels)": {
            str(s): each(lambda f, s=s: cv2.GaussianBlur(f, (0, 0), s)) for s in (0.5, 1, 2)
        },
        "noise (deviation, levels)": {str(s): noise(s) for s in (5, 15, 40)},
        "frames shuffled (within)": {str(n): shuffle(n) for n in (2, 4, 16)},
        "frame rate": {
            "x2": pick(2 * steps),
            "x3": pick(3 * steps),
            "each held 2": pick(steps // 2 * 2),
            "each held 4": pick(steps // 4 * 4),
        },
        "time": {"reversed": pick(steps[::-1]), "still": pick(0 * steps)},
    }


def study(
    net: features.FeatureNet, windows: list[np.ndarray], others: list[np.ndarray]
) -> list[dict]:
    """Prints and gives a row a kind and strength."""
    kinds = {"none": {"other windows": None}} | spoilers()
    total = len(windows) * (1 + sum(map(len, kinds.values())))
    rows = []
    with bar(what="features", unit="video", total=total) as progress:

        def featured(videos: list[np.ndarray]) -> np.ndarray:
            found = []
            for video in videos:
                found.append(net(video[None]))
                progress.update(1)
            return np.concatenate(found)

        real = featured([w[:FRAMES] for w in windows])
        for kind, strengths in kinds.items():
            for strength, spoil in strengths.items():
                rng = np.random.default_rng(0)
                videos = others if spoil is None else [spoil(w, rng) for w in windows]
                fake = featured([v[:FRAMES] for v in videos])
                distance = frechet_distance(Moments.of(real), Moments.of(fake))
                kernel = kernel_distance(real, fake)[0]
                row = {"kind": kind, "strength": strength, "frechet": distance, "kernel": kernel}
                rows.append(row | {"score": features.score_name(net), "videos": len(windows)})
                progress.write(f"{kind:<28}{strength:<16}{distance:>12.3f}{kernel:>14.4f}")
    return rows


def draw(rows: list[dict], score: str, path: Path) -> None:
    """A bar a kind and strength, on a logarithmic scale."""
    floor = rows[0]["frechet"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows[1:]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(3 * len(kinds), 3.2), sharey=True)
    for ax, kind in zip(axes, kinds):
        mine = [row for row in rows if row["kind"] == kind]
        ax.bar([row["strength"] for row in mine], [row["frechet"] for row in mine])
        ax.axhline(floor, color="gray", linestyle="--")
        ax.set(title=kind, yscale="log")
        ax.tick_params(axis="x", labelrotation=20)
    axes[0].set_ylabel(f"{score}, {rows[0]['videos']} videos")
    axes[0].text(0, floor, "other real windows", va="bottom", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(windows: list[np.ndarray], path: Path) -> None:
    """Four frames of one window as it is, and spoilt in every way."""
    window = windows[0]
    rows = {"as it is": window[:FRAMES]}
    for kind, strengths in spoilers().items():
        for strength, spoil in strengths.items():
            rows[f"{kind} {strength}"] = spoil(window, np.random.default_rng(0))
    figure, axes = plt.subplots(len(rows), 4, figsize=(6, 1.55 * len(rows)))
    for line, (name, video) in zip(axes, rows.items()):
        for ax, frame in zip(line, video[:: FRAMES // 4]):
            ax.imshow(frame)
            ax.axis("off")
        line[0].set_title(name, loc="left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
