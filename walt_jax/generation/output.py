"""Samples as files: videos or pictures, a page to look at, and the settings of each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from walt_jax import config as config_lib
from walt_jax.gallery import Section, write_gallery
from walt_jax.generation.requests import Request
from walt_jax.media import frame_grid, write_gif, write_mp4, write_png

Format = Literal["mp4", "gif", "png"]
SETTINGS, PAGE, GRID = "samples.jsonl", "index.html", "grid.png"
_IN_GRID = 32


def settings_of(request: Request, fps: float, model: str) -> list[dict[str, Any]]:
    """What each video of a request was made by, JSON-ready.

    Args:
      request: what was asked for.
      fps: of the files.
      model: where it was loaded from.
    """
    generator, options = request.generator, request.options
    shared = {
        "task": request.task,
        "model": model,
        "step": generator.step,
        "weights": generator.weights,
        "seed": request.seed,
        "sampler": config_lib.to_dict(options["sampler"]),
        "guidance": config_lib.to_dict(options["guidance"]),
        "given_guidance": config_lib.to_dict(options["given_guidance"]),
        "fps": fps,
    }
    asked = {
        "sources": [str(s) if isinstance(s, str | Path) else "array" for s in request.sources],
        "mask": request.mask if isinstance(request.mask, str) else None,
        "seconds": request.seconds,
        "direction": request.direction if request.task == "extend" else None,
        "strength": request.strength if request.task == "edit" else None,
    }
    rows = []
    for i in range(request.count):
        said = {
            "label": None if request.labels is None else generator.name(request.labels[i]),
            "prompt": None if request.prompts is None else request.prompts[i],
            "negative_prompt": request.negative_prompts and request.negative_prompts[i],
        }
        row = {"number": i, **said, **shared, **asked}
        rows.append({name: value for name, value in row.items() if value not in (None, "", [])})
    return rows


def write_samples(
    folder: str | Path,
    videos: np.ndarray,
    settings: Sequence[Mapping[str, Any]],
    fps: float,
    kind: Format | None = None,
) -> None:
    """Writes a file a video, `grid.png`, `samples.jsonl` and `index.html`.

    Args:
      folder: made where it is not there; files of these names are replaced.
      videos: uint8 (N, T, H, W, 3).
      settings: of each video, as `settings_of` gives them.
      fps: frames a second.
      kind: of the files: mp4, gif or png, which has a video's frames in a row; by default mp4, of
        single frames png.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = kind or ("png" if videos.shape[1] == 1 else "mp4")
    items, rows = [], []
    for i, (video, row) in enumerate(zip(videos, settings)):
        file = f"{i:04d}.{kind}"
        if kind == "png":
            write_png(folder / file, frame_grid(video[None], columns=len(video), pad=0))
        else:
            (write_mp4 if kind == "mp4" else write_gif)(folder / file, video, fps)
        items.append((file, _caption(row)))
        rows.append(json.dumps({"file": file, "shape": list(video.shape), **row}))
    (folder / SETTINGS).write_text("".join(f"{row}\n" for row in rows))
    write_png(folder / GRID, frame_grid(videos[:_IN_GRID]))
    sections = [
        Section("Videos", f"Settings of each: {SETTINGS}.", items),
        Section("Frames", items=[(GRID, "one video a row")]),
    ]
    write_gallery(folder / PAGE, "Samples", sections)


def _caption(row: Mapping[str, Any]) -> str:
    said = ", ".join(str(row[name]) for name in ("label", "prompt") if row.get(name))
    if row.get("negative_prompt"):
        said += f", not {row['negative_prompt']}"
    guidance, sampler = row["guidance"], row["sampler"]
    how = [
        row["task"],
        f"step {row['step']}",
        f"{sampler['num_steps']} steps of {sampler['name']}",
        f"{guidance['name']} guidance {guidance['scale']:g}",
        *(f"{name} {row[name]}" for name in ("direction", "strength", "seconds") if name in row),
        f"seed {row['seed']}",
        f"video {row['number']}",
    ]
    return f"{said} ({', '.join(how)})".strip()
