"""What studies on sprite videos share: data and trainings that go on where they were cut off."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from walt_jax import config as config_lib
from walt_jax.data.buckets import fit_frames
from walt_jax.data.latents import encode_dataset
from walt_jax.data.pipeline import DataConfig, clip_frames
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.sprites import SpriteConfig, SpriteVideo, sprite_video, write_sprites
from walt_jax.demo import CONFIGS
from walt_jax.errors import UserError
from walt_jax.generation import Generator
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.metrics import read_metrics
from walt_jax.training.tokenizers import load_tokenizer

Row = dict[str, Any]


class Results:
    """The options and tables of a benchmark in `results.json`, after every row, and `tables.md`."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        """Reads the rows that are there.

        Raises:
          UserError: they were made with other options.
        """
        self._folder, self._path = folder, folder / "results.json"
        self._content: dict[str, Any] = {"options": dict(options), "tables": {}}
        if self._path.exists():
            self._content = json.loads(self._path.read_text())
            if diff := config_lib.differences(self._content["options"], dict(options)):
                changes = "; ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in diff.items())
                raise UserError(
                    f"{folder} has results of other options ({changes}): give another --out."
                )

    def fill(self, table: str, name: str, measure: Callable[[], Row]) -> None:
        """Adds what `measure()` finds, unless the row is there."""
        rows = self._content["tables"].setdefault(table, {})
        if name in rows:
            return
        rows[name] = measure()
        print(f"{table}, {name}: " + ", ".join(f"{k} {_cell(v)}" for k, v in rows[name].items()))
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._content, indent=1) + "\n")
        temporary.replace(self._path)
        (self._folder / "tables.md").write_text(str(self))

    def __str__(self) -> str:
        parts = []
        for table, rows in self._content["tables"].items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            lines = [[table, *columns], ["---", *["---:"] * len(columns)]]
            lines += [[name, *(_cell(row.get(c)) for c in columns)] for name, row in rows.items()]
            parts.append("".join(f"| {' | '.join(cells)} |\n" for cells in lines))
        return "\n".join(parts)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def make_records(
    folder: Path,
    config: SpriteConfig,
    number: int,
    seed: int,
    caption: Callable[[Row], str | None] | None = None,
) -> Path:
    """Records of sprite videos in `folder`/records, made unless they are there.

    Args:
      folder, config, number, seed: as `write_sprites` takes them.
      caption: of the truth about a video, instead of its own caption; None leaves it out.
    """
    videos, records = folder / "videos", folder / "records"
    if not (records / "report.json").exists():
        if not (videos / "manifest.jsonl").exists():
            shutil.rmtree(videos, ignore_errors=True)  # what was cut off
            write_sprites(videos, number, config, seed)
        manifest = videos / "manifest.jsonl"
        if caption is not None:
            truths = map(json.loads, (videos / "truth.jsonl").read_text().splitlines())
            told = ((truth["path"], caption(truth)) for truth in truths)
            rows = [{"path": path, "caption": text} for path, text in told if text is not None]
            manifest = videos / "captions.jsonl"
            manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_dataset(manifest, records, overwrite=True)
    return records


def make_latents(folder: Path, tokenizer: Path, data: Mapping[str, Any], epochs: int) -> Path:
    """Latents in `folder`/latents of the clips that `data` cuts; goes on where it was cut off."""
    latents = folder / "latents"
    if not (latents / "index.npz").exists():
        config = config_lib.build(DataConfig, data, "config.data")
        encode_dataset(load_tokenizer(tokenizer), config, latents, epochs=epochs)
    return latents


def make_run(workdir: Path, spec: str, overrides: Sequence[str]) -> Row:
    """Trains `configs/SPEC` in `workdir`, or what is left of it.

    Returns:
      "steps", "minutes" (of the steps alone, by their median speed) and the last held-out scores.
    """
    values = config_lib.load(str(CONFIGS / spec), overrides)
    scores = train(config_lib.build(Experiment, values), workdir)
    speed = float(np.median(read_metrics(workdir, "speed/steps/s")[1][1:]))
    return {"steps": values["num_steps"], "minutes": values["num_steps"] / speed / 60, **scores}


def real_clips(
    config: SpriteConfig,
    generator: Generator,
    number: int,
    *,
    seed: int,
    labels: Sequence[int] = (),
    use: Callable[[SpriteVideo], bool] = lambda truth: True,
) -> tuple[np.ndarray, list[SpriteVideo]]:
    """New sprite videos as a denoiser knows them.

    Args:
      config, seed: which videos; generator: says how many frames, their size and rate.
      labels: classes that take turns; the config's own order without.
      use: videos for which it is False are passed over; UserError where too few are left.

    Returns:
      uint8 (N, T, H, W, 3), and the truth about their frames.
    """
    count, *size = generator.video_shape
    clips, truths = [], []
    for i in range(100 * number):
        if len(clips) == number:
            break
        label = labels[len(clips) % len(labels)] if len(labels) else None
        video = sprite_video(config, seed, i, label)
        if not use(video):
            continue
        times = np.arange(len(video.frames)) / video.fps
        picks = clip_frames(times, count, generator.fps, 0.5)
        clips.append(fit_frames(video.frames[picks], tuple(size)))
        of_frames = {
            k: getattr(video, k)[picks] for k in ("frames", "centres", "visible", "actions")
        }
        truths.append(dataclasses.replace(video, **of_frames))
    if len(clips) < number:
        raise UserError(f"Of {100 * number} sprite videos {len(clips)} are wanted, not {number}.")
    return np.stack(clips), truths
