"""`make demo`: from video files to generated videos, the whole way, in ten minutes on a CPU.

python -m walt_jax.demo --out out/demo [--videos FOLDER]
"""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data.latents import encode_dataset
from walt_jax.data.pipeline import Pipeline
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import Dataset, open_dataset
from walt_jax.data.sources import find_sources
from walt_jax.data.sprites import SpriteConfig, write_sprites
from walt_jax.diffusion import Constant, Ddim
from walt_jax.errors import UserError
from walt_jax.evaluation.measures import ReadBack
from walt_jax.gallery import Section, write_gallery
from walt_jax.generation import Generator
from walt_jax.media import frame_grid, write_mp4, write_png
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.tasks import to_uint8, to_unit
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.metrics import clock, read_metrics
from walt_jax.training.tokenizers import load_tokenizer

logger = logging.getLogger("walt_jax.demo")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MARKER = ".walt_jax_demo"
FOLDERS = ("videos", "records", "tokenizer", "latents", "denoiser", "media")
SIZE, FRAMES = 64, 9
# Little enough to be learned in minutes on a CPU: 24 classes, large sprites that go all the way.
SPRITES = SpriteConfig(
    shapes=("square", "triangle"),
    colours=("red", "green", "blue"),
    backgrounds=("black",),
    sizes=(0.4, 0.4),
    seconds=(2.2, 2.3),
    crossing=True,
    short_side=SIZE,
)
_ROWS = 12  # of the overview picture
_RATES = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 24.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much the demo does.

    Attributes:
      variant: of the two configs, `debug` for a trial run in seconds.
      num_sprites: sprite videos written; a multiple of the 24 classes keeps them balanced.
      epochs: clips cut from each video when latents are cached.
      num_samples: sprite videos sampled and read back.
      num_steps: DDIM steps; guidance: scale of classifier-free guidance.
    """

    variant: str = ""
    num_sprites: int = 480
    epochs: int = 2
    num_samples: int = 96
    num_steps: int = 30
    guidance: float = 3.0


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and runs the demo."""
    parser = cli.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", default="out/demo", help="folder to write to (default out/demo)")
    parser.add_argument("--videos", help="a folder of your own videos instead of the sprites")
    args = parser.parse_args(argv)
    run(Path(args.out), Path(args.videos) if args.videos else None)


def run(out: Path, videos: Path | None, scale: Scale = Scale()) -> dict[str, Any]:
    """Runs every stage; returns what it writes to `summary.json`.

    Raises:
      UserError: the videos cannot be used.
    """
    began = time.monotonic()
    if videos is not None:
        find_sources(videos, label_from_name=True)  # a wrong path must not cost the last demo
        if videos.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{videos} lies in {out}, which is emptied: give another --out.")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"{out} holds something else than a demo: give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    for folder in FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
    logger.info("1/5 videos to records")
    dataset = _prepare(out, videos, scale)
    logger.info("2/5 train the tokenizer")
    data = {"path": str(out / "records"), "fps": _rate(dataset)}
    experiment = _experiment("sprites_tokenizer.py", scale, {"data": data})
    scores = train(experiment, out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    logger.info("3/5 encode the videos")
    encode_dataset(
        tokenizer,
        experiment.data,
        out / "latents",
        epochs=scale.epochs if videos is None else 8 * scale.epochs,
        overwrite=True,  # what a demo that was cut off left behind
    )
    logger.info("4/5 train the denoiser")
    classes = max(1, len(dataset.label_names))
    changes = {
        "task": {"tokenizer": str(out / "tokenizer"), "model": {"num_classes": classes}},
        "data": {"path": str(out / "latents")},
    }
    train(_experiment("sprites_walt.py", scale, changes), out / "denoiser")
    logger.info("5/5 sample")
    generator = Generator.load(out / "denoiser")
    labels = np.resize(np.arange(classes, dtype=np.int32), scale.num_samples)
    samples = generator.sample(
        labels, sampler=Ddim(num_steps=scale.num_steps), guidance=Constant(scale.guidance)
    )
    names = [generator.name(i) for i in labels]
    losses = read_metrics(out / "denoiser", "eval/loss")[1]
    pairs = {split: _reconstruct(dataset, experiment, tokenizer, split) for split in _SPLITS}
    summary = {
        "tokenizer_psnr_db": scores["eval/psnr_db"],
        "tokenizer_psnr_db_trained_on": _psnr(*pairs["train"]),
        "denoiser_loss_first": float(losses[0]),
        "denoiser_loss_last": float(losses[-1]),
        "samples": len(samples),
        **(_judge(samples, labels, generator) if videos is None else {}),
        "seconds": time.monotonic() - began,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _publish(out, pairs, samples, names, generator.fps, summary)
    print(f"\nDone in {clock(summary['seconds'])}: open {out}/index.html")
    print(f"Next: python -m walt_jax.sample --workdir {out}/denoiser --num 16 --out out/samples")
    return summary


_SPLITS = {"eval": "held out", "train": "trained on"}


def _prepare(out: Path, videos: Path | None, scale: Scale) -> Dataset:
    if videos is None:
        source = write_sprites(out / "videos", scale.num_sprites, SPRITES)
        prepare_dataset(source, out / "records", progress=True)
    else:
        # Classes are the folders' names where there are several folders, else the files' names.
        folders = {Path(s.name).parent for s in find_sources(videos, label_from_name=True)}
        report = prepare_dataset(
            videos,
            out / "records",
            short_side=SIZE,
            label_from_folder=len(folders) > 1,
            label_from_name=len(folders) == 1,
            progress=True,
        )
        for skipped in report.skipped:
            logger.info("skipped %s: %s", skipped["source"], skipped["reason"])
    return open_dataset(out / "records")


def _rate(dataset: Dataset) -> float:
    """The lowest rate at which a clip fits in every video, or the highest one."""
    index = dataset.index
    shortest = (index["duration"] - 1 / index["fps"]).min()  # between the first and last frame
    return next((r for r in _RATES if (FRAMES - 1) / r <= shortest), _RATES[-1])


def _experiment(file: str, scale: Scale, changes: dict[str, Any]) -> Experiment:
    values = config_lib.load(f"{CONFIGS / file}:{scale.variant}")

    def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, dict):
                merge(into.setdefault(key, {}), value)
            else:
                into[key] = value

    merge(values, changes)
    return config_lib.build(Experiment, values)


def _reconstruct(
    dataset: Dataset, experiment: Experiment, tokenizer: FrozenTokenizer, split: str
) -> tuple[np.ndarray, np.ndarray]:
    pipeline = Pipeline(
        dataset, experiment.data, batch_size=8, seed=0, split=split, shuffle=split == "train"
    )
    video = next(pipeline.batches())["video"]
    return video, to_uint8(tokenizer.decode(tokenizer.encode(to_unit(video))))


def _psnr(video: np.ndarray, reconstruction: np.ndarray) -> float:
    error = np.square(video.astype(np.float64) - reconstruction).mean((1, 2, 3, 4))
    return float(np.mean(10 * np.log10(255.0**2 / error)))


def _judge(samples: np.ndarray, labels: np.ndarray, generator: Generator) -> dict[str, float]:
    """Shares of samples whose nearest colour, shape and direction are those asked for."""
    measure = ReadBack(generator.label_names, labels, generator.fps)
    measure.add(np.arange(len(samples)), samples)
    out, right = {}, measure.results()
    for what in ("colour", "shape", "direction"):
        out[f"{what}_right"] = right[f"read_back/{what}"][0]
        out[f"{what}_chance"] = 1.0 / len(getattr(SPRITES, f"{what}s"))
    return out


def _publish(
    out: Path,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    samples: np.ndarray,
    names: Sequence[str],
    fps: float,
    summary: dict[str, Any],
) -> None:
    media = out / "media"
    media.mkdir(exist_ok=True)
    write_png(media / "overview.png", _overview(*pairs["eval"], samples))
    sections = [
        Section(
            "Overview",
            "Left: held-out videos, each above its reconstruction. Right: one sample a row, of "
            + "; ".join(names[:_ROWS])
            + ".",
            [("media/overview.png", "")],
        ),
        Section(
            "Results", table=[("measure", "value"), *((k, f"{v:.4g}") for k, v in summary.items())]
        ),
    ]
    for split, (video, reconstruction) in pairs.items():
        beside = np.concatenate([video, reconstruction], axis=3)
        items = []
        for i, clip in enumerate(beside):
            write_mp4(media / f"{split}_{i}.mp4", clip, fps)
            items.append((f"media/{split}_{i}.mp4", f"clip {i}"))
        write_png(media / f"{split}.png", frame_grid(beside, columns=5))
        items.append((f"media/{split}.png", "frames"))
        title = f"Originals and reconstructions, {_SPLITS[split]}"
        sections.append(Section(title, f"PSNR {_psnr(video, reconstruction):.2f} dB", items))
    items = []
    for i, (video, name) in enumerate(zip(samples, names)):
        write_mp4(media / f"sample_{i:03d}.mp4", video, fps)
        items.append((f"media/sample_{i:03d}.mp4", name))
    write_png(media / "samples.png", frame_grid(samples[:16]))
    items.append(("media/samples.png", f"frames of: {', '.join(names[:16])}"))
    sections.append(Section("Samples by class", items=items))
    _plot(out, media / "curves.png")
    sections.append(Section("Loss curves", items=[("media/curves.png", "")]))
    write_gallery(out / "index.html", "walt_jax demo", sections)


def _overview(video: np.ndarray, reconstruction: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Held-out videos above their reconstructions, and samples beside them: one picture."""
    pairs = np.stack([video, reconstruction], 1).reshape(-1, *video.shape[1:])[:_ROWS]
    left, right = frame_grid(pairs, columns=5), frame_grid(samples[:_ROWS], columns=5)
    rows = min(len(left), len(right))
    gap = np.full((rows, 24, 3), 255, np.uint8)
    return np.concatenate([left[:rows], gap, right[:rows]], axis=1)


def _plot(out: Path, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    curves = (("tokenizer", "psnr_db", "PSNR (dB)"), ("denoiser", "loss", "v loss"))
    for axis, (run_name, metric, label) in zip(axes, curves):
        for prefix in ("train", "eval"):
            steps, values = read_metrics(out / run_name, f"{prefix}/{metric}")
            shown = "held out" if prefix == "eval" else "trained on"
            axis.plot(steps, values, "-o", markersize=3, label=shown)
        axis.set(title=run_name, xlabel="step", ylabel=label)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
