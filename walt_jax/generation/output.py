"""Samples as files: videos or pictures, a page to look at, and the settings of each."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from walt_jax import config as config_lib
from walt_jax.gallery import Section, write_gallery
from walt_jax.generation.requests import Request
from walt_jax.media import Mp4Writer, frame_grid, write_gif, write_mp4, write_png

Format = Literal["mp4", "gif", "png"]
SETTINGS, PAGE, GRID = "samples.jsonl", "index.html", "grid.png"
_IN_GRID = 32
_SHOWN = 64  # frames of a long video that are kept for its grid


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
    sources = [str(s) if isinstance(s, str | Path) else "array" for s in request.sources]
    asked = {
        "mask": request.mask if isinstance(request.mask, str) else None,
        "seconds": request.seconds,
        "direction": request.direction if request.task == "extend" else None,
        "strength": request.strength if request.task == "edit" else None,
        "scheme": request.scheme if request.task == "long" else None,
    }
    rows = []
    for i in range(request.count):
        said = {
            "label": None if request.labels is None else generator.name(request.labels[i]),
            "prompt": None if request.prompts is None else request.prompts[i],
            "negative_prompt": request.negative_prompts and request.negative_prompts[i],
            "sources": sources,
        }
        if request.task == "image_to_video":  # pictures take turns
            said["sources"] = [sources[i % len(sources)]]
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
    _write_page(folder, items, rows, videos)


def write_long(
    folder: str | Path,
    pieces: Iterable[np.ndarray],
    settings: Sequence[Mapping[str, Any]],
    fps: float,
    every: int = 1,
) -> None:
    """As `write_samples`, of videos that come piece by piece and are never whole in memory.

    Args:
      folder: made where it is not there; files of these names are replaced when all is there.
      pieces: uint8 (N, n, H, W, 3), frame after frame.
      settings: of each video.
      fps: frames a second of the files.
      every: frames of which one is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{i:04d}.mp4" for i in range(len(settings))]
    seen, number, shown, apart = 0, 0, [], 1
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Mp4Writer(folder / file, fps)) for file in files]
        for piece in pieces:
            kept = piece[:, -seen % every :: every]
            seen += piece.shape[1]
            for writer, frames in zip(writers, kept):
                writer.write(frames)
            for frames in kept.swapaxes(0, 1):
                if number % apart == 0:
                    shown.append(frames.copy())
                number += 1
                if len(shown) > _SHOWN:  # few frames of any length, for the grid
                    shown, apart = shown[::2], 2 * apart
    items = [(file, _caption(row)) for file, row in zip(files, settings)]
    shape = [number, *shown[0].shape[1:]]
    rows = [json.dumps({"file": f, "shape": shape, **row}) for f, row in zip(files, settings)]
    _write_page(folder, items, rows, np.stack(shown, axis=1))


def _write_page(
    folder: Path, items: Sequence[tuple[str, str]], rows: Sequence[str], videos: np.ndarray
) -> None:
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
        *(
            f"{name} {row[name]}"
            for name in ("scheme", "direction", "strength", "seconds")
            if name in row
        ),
        *([f"{row['fps']:g} fps"] if "fps" in row else []),
        *(
            f"{word} {', '.join(Path(name).name for name in row[key])}"
            for key, word in (("sources", "from"), ("cascade", "enlarged by"))
            if key in row
        ),
        f"seed {row['seed']}",
        f"video {row['number']}",
    ]
    return f"{said} ({', '.join(how)})".strip()
