"""Which attention windows and which of W.A.L.T's choices make better videos at equal training time?

    python -m benchmarks.sprite_quality [--out out/sprite_quality] [--minutes 5] [--only NAME ...]

Small class-conditional denoisers (`configs/sprites_walt.py`) train on cached latents of the demo's
sprite videos, all by the same tokenizer, each for `--minutes`: a short trial of the compiled step
says how many steps that is, and the learning rate falls to 0 at the last of them. Then every one
samples all classes in turn, from the same noise, and `walt_jax.data.sprite_readback` looks at the
samples without knowing what was asked for: are colour, shape and direction right, and is the object
found in every frame? The tokens are 3x4x4; the rows are those of `VARIANTS`.

Two more rows say what the judge can see at best: "real videos" are new ones of the same kind, and
"reconstructed" the same through the tokenizer.

`--out` gets `quality.json`, `table.md` and `samples.png`. A run that was cut off goes on; other
options need another `--out`. The rows are comparable where nothing else uses the cores.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data.buckets import fit_frames
from walt_jax.data.latents import encode_dataset
from walt_jax.data.pipeline import clip_frames
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.sprite_readback import read_back
from walt_jax.data.sprites import sprite_video, write_sprites
from walt_jax.demo import CONFIGS, FRAMES, SIZE, SPRITES
from walt_jax.diffusion import Constant, Ddim
from walt_jax.errors import UserError
from walt_jax.generation import Generator
from walt_jax.media import frame_grid, write_png
from walt_jax.models import count
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.tasks import to_uint8, to_unit
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.metrics import read_metrics
from walt_jax.training.tokenizers import load_tokenizer

# Overrides, as on the command line of `walt_jax.train`. The first row is W.A.L.T in small: windows
# over half of each side (the paper's are 8 of 16), self-conditioning, zero terminal SNR.
BASE = ("task.model.windows=((1,0,0),(0,2,2))", "task.model.self_conditioning=True")
LINEAR = "task.diffusion.process.name=linear"
VARIANTS: dict[str, tuple[str, ...]] = {
    "walt": (),
    "whole windows": ("task.model.windows=((1,0,0),(0,0,0))",),
    "factorised": ("task.model.windows=((1,0,0),(0,1,1))",),
    "full": ("task.model.windows=((0,0,0),)",),
    "no self-conditioning": ("task.model.self_conditioning=False",),
    "no zero SNR": (LINEAR, "task.diffusion.process.zero_terminal_snr=False"),
}
COLUMNS = {  # of the table, and how they are written
    "steps": ",",
    "seconds": ".0f",
    "parameters": ",",
    "loss": ".4f",
    "colour": ".1%",
    "shape": ".1%",
    "direction": ".1%",
    "all three": ".1%",
    "frames found": ".1%",
    "found in all": ".1%",
}
TRIAL_STEPS, TRIAL_WINDOW = 80, 10
REAL_SEED = 1  # of videos that no tokenizer was trained on
SHOWN = ("red square left", "green triangle up", "blue square right")  # in the picture
SHOWN_FRAMES = 5  # of each
Row = dict[str, Any]


def main() -> None:
    args = _arguments()
    table = Table(args)
    tokenizer = _make_latents(args)
    videos, names = real_videos(args.samples)
    table.fill("real videos", lambda row: judge(videos, names))
    table.fill("reconstructed", lambda row: judge(_reconstruct(tokenizer, videos), names))
    for name in args.only or VARIANTS:
        table.fill(name, lambda row, name=name: _measure(name, row, table, args))
    print(f"\n{table}")
    shown = {name: np.load(path) for name in VARIANTS if (path := _shown(args, name)).exists()}
    write_png(args.out / "samples.png", picture(shown))
    print(f"{args.out}: quality.json, table.md, samples.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/sprite_quality"))
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, each row")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="these rows")
    parser.add_argument("--samples", type=int, default=240, help="judged, of each row")
    parser.add_argument("--sampling-steps", type=int, default=30, help="of DDIM")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sprites", type=int, default=480, help="videos trained on")
    parser.add_argument("--epochs", type=int, default=2, help="clips cut from each of them")
    parser.add_argument("--tokenizer-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.samples < 1 or args.samples % len(SPRITES.class_names):
        raise UserError(
            f"--samples must be a multiple of the {len(SPRITES.class_names)} classes, got "
            f"{args.samples}."
        )
    return args


class Table:
    """The options and the rows, in `quality.json` after every stage of a row, and as Markdown."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Reads the rows that are there.

        Raises:
          UserError: they were made with other options.
        """
        self._out, self._path = args.out, args.out / "quality.json"
        options = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
        self._content = {"options": options, "cores": _cores(), "rows": {}}
        if self._path.exists():
            self._content = json.loads(self._path.read_text())
            if diff := config_lib.differences(self._content["options"], options):
                changes = "; ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in diff.items())
                raise UserError(
                    f"{args.out} has rows of other options ({changes}): give another --out."
                )

    def fill(self, name: str, measure: Callable[[Row], Row]) -> None:
        """Adds what `measure(row)` finds, unless the row is there."""
        row = self._content["rows"].setdefault(name, {})
        if "all three" not in row:
            row |= measure(row)
            self.save()

    def save(self) -> None:
        """Writes both files."""
        self._out.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._content, indent=1) + "\n")
        temporary.replace(self._path)
        (self._out / "table.md").write_text(str(self))

    def __str__(self) -> str:
        lines = [["", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
        for name, row in self._content["rows"].items():
            if "all three" in row:
                lines.append(
                    [name, *(format(row[c], f) if c in row else "-" for c, f in COLUMNS.items())]
                )
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _make_latents(args: argparse.Namespace) -> FrozenTokenizer:
    """The tokenizer of all rows, trained, and their latents, cached, unless they are there."""
    videos, records, latents = (args.out / name for name in ("videos", "records", "latents"))
    if not latents.exists():
        if not (videos / "manifest.jsonl").exists():
            shutil.rmtree(videos, ignore_errors=True)  # what was cut off
            write_sprites(videos, args.sprites, SPRITES, args.seed)
        prepare_dataset(videos / "manifest.jsonl", records, overwrite=True)
        values = config_lib.load(str(CONFIGS / "sprites_tokenizer.py"))
        values |= {"num_steps": args.tokenizer_steps, "preview_every": 0, "seed": args.seed}
        values["data"]["path"] = str(records)
        experiment = config_lib.build(Experiment, values)
        train(experiment, args.out / "tokenizer")
        encode_dataset(
            load_tokenizer(args.out / "tokenizer"),
            experiment.data,
            latents,
            epochs=args.epochs,
        )
    return load_tokenizer(args.out / "tokenizer")


def _measure(name: str, row: Row, table: Table, args: argparse.Namespace) -> Row:
    """Trains and judges one variant; the number of its steps is kept in the table at once."""
    if "steps" not in row:
        row["steps"] = max(1, round(60.0 * args.minutes * _trial(name, args)))
        table.save()
    steps, workdir = row["steps"], args.out / "runs" / _file(name)
    scores = train(_experiment(name, steps, max(1, steps // 20), args), workdir)
    generator = Generator.load(workdir)
    labels = np.resize(np.arange(len(SPRITES.class_names), dtype=np.int32), args.samples)
    videos = _sample(generator, labels, args)
    picks = [np.flatnonzero(labels == label)[0] for label in generator.labels(SHOWN)]
    np.save(_shown(args, name), videos[picks])
    return {
        "seconds": steps / _speed(workdir),
        "parameters": count(generator.params),
        "loss": scores["eval/loss"],
        **judge(videos, [generator.name(label) for label in labels]),
        "load": os.getloadavg(),
    }


def _sample(generator: Generator, labels: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    return generator.sample(
        labels,
        seed=args.seed,
        sampler=Ddim(num_steps=args.sampling_steps),
        guidance=Constant(args.guidance),
    )


def _experiment(name: str, steps: int, log_every: int, args: argparse.Namespace) -> Experiment:
    values = config_lib.load(str(CONFIGS / "sprites_walt.py"), [*BASE, *VARIANTS[name]])
    values["task"]["tokenizer"] = str(args.out / "tokenizer")
    values["task"]["model"]["num_classes"] = len(SPRITES.class_names)
    values["data"]["path"] = str(args.out / "latents")
    values |= {
        "num_steps": steps,
        "log_every": log_every,
        "eval_every": steps,
        "preview_every": 0,
        "checkpoint_every": max(1, steps // 4),
        "seed": args.seed,
    }
    return config_lib.build(Experiment, values)


def _trial(name: str, args: argparse.Namespace) -> float:
    """Steps a second of the compiled step."""
    workdir = args.out / "trial"
    shutil.rmtree(workdir, ignore_errors=True)
    train(_experiment(name, TRIAL_STEPS, TRIAL_WINDOW, args), workdir, quiet=True)
    speed = _speed(workdir)
    shutil.rmtree(workdir)
    return speed


def _speed(workdir: Path) -> float:
    """Median of steps a second over a run's windows, but for the first, which began with an
    evaluation and its compilation."""
    speeds = read_metrics(workdir, "speed/steps/s")[1]
    return float(np.median(speeds[1:] if len(speeds) > 1 else speeds))


def real_videos(number: int) -> tuple[np.ndarray, list[str]]:
    """New sprite videos as the denoisers know them, uint8 (N, T, H, W, 3), and their classes."""
    data = config_lib.load(str(CONFIGS / "sprites_walt.py"))["data"]
    clips, names = [], []
    for i in range(number):
        video = sprite_video(SPRITES, REAL_SEED, i)
        times = np.arange(len(video.frames)) / video.fps
        frames = video.frames[clip_frames(times, FRAMES, data["fps"], 0.5)]
        clips.append(fit_frames(frames, (SIZE, SIZE)))
        names.append(video.label_name)
    return np.stack(clips), names


def _reconstruct(tokenizer: FrozenTokenizer, videos: np.ndarray) -> np.ndarray:
    run = jax.jit(lambda t, x: t.decode(t.encode(x)))
    # One at a time: all are of one shape, whatever their number.
    return np.concatenate([to_uint8(run(tokenizer, to_unit(video[None]))) for video in videos])


def judge(videos: np.ndarray, names: Sequence[str]) -> Row:
    """Shares of videos that show what their names say, and in which the object stays.

    Args:
      videos: uint8 (N, T, H, W, 3).
      names: N classes, "red square left".

    Returns:
      "colour", "shape", "direction" and "all three": the nearest one is the one asked for;
      "frames found": the mean share of frames with the object; "found in all": it is in each.
    """
    options = {k: getattr(SPRITES, k) for k in ("shapes", "colours", "directions")}
    reads = [read_back(video, **options, forced=True) for video in videos]
    found = np.array([(r.colour, r.shape, r.direction) for r in reads], dtype=object)
    right = found == np.array([name.split() for name in names], dtype=object)
    kept = np.array([r.persistence for r in reads])
    return {
        **dict(zip(("colour", "shape", "direction"), right.mean(0).tolist())),
        "all three": float(right.all(1).mean()),
        "frames found": float(kept.mean()),
        "found in all": float((kept == 1.0).mean()),
    }


def picture(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """A row a variant, a few frames of its samples under their classes: uint8 (H, W, 3).

    Args:
      rows: variant -> uint8 (len(SHOWN), T, H, W, 3).
    """
    label, gap = 170, 12
    width = frame_grid(np.zeros((1, FRAMES, SIZE, SIZE, 3)), columns=SHOWN_FRAMES).shape[1]
    lines = [_text("", label, 24), *(_text(n, width + gap, 24) for n in SHOWN)]
    lines = [np.concatenate(lines, axis=1)]
    for name, videos in rows.items():
        strips = [frame_grid(video[None], columns=SHOWN_FRAMES) for video in videos]
        strips = [np.pad(s, ((0, 0), (0, gap), (0, 0)), constant_values=255) for s in strips]
        lines.append(np.concatenate([_text(name, label, len(strips[0])), *strips], axis=1))
    return np.concatenate(lines)


def _text(text: str, width: int, height: int) -> np.ndarray:
    image = np.full((height, width, 3), 255, np.uint8)
    place = 4, height // 2 + 5
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return image


def _cores() -> int:
    """Those that this process may use (all of them, where the system does not say)."""
    may = getattr(os, "sched_getaffinity", None)
    return len(may(0)) if may else os.cpu_count()


def _shown(args: argparse.Namespace, name: str) -> Path:
    return args.out / "runs" / f"{_file(name)}.npy"


def _file(name: str) -> str:
    return name.replace(" ", "_")


if __name__ == "__main__":
    cli.run(main)
