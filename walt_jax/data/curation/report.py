"""`report.json` and `report.html` of a preparation: what came in, what is kept, and why not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from walt_jax.data.curation.config import FilterConfig
from walt_jax.data.curation.filtering import summary
from walt_jax.data.curation.scores import HASHES, SCORES
from walt_jax.data.records import Dataset
from walt_jax.gallery import Section, write_gallery

FOLDER = "report"
_SHOWN, _ROWS = 36, 1000  # thumbnails of a section, rows of a table
_TITLES = {
    "seconds": "length (s)",
    "num_frames": "frames",
    "fps": "frames a second",
    "width": "width (pixels)",
    "height": "height (pixels)",
    "aspect": "aspect (width / height)",
    "motion": "motion (shorter sides a second)",
    "sharpness": "sharpness (variance of the Laplacian)",
    "letterbox": "letterbox (share of the picture)",
    "black_frames": "black frames (share)",
    "text_area": "text (share of the picture)",
    "aesthetic": "aesthetic score",
    "text_match": "image-text match (cosine)",
}


def write_report(
    folder: Path,
    scored: Dataset,
    reasons: Sequence[str],
    report: dict[str, Any],
    thresholds: FilterConfig,
) -> None:
    """Writes both files, and pictures in `report/`; frames are copied as they are, not decoded.

    Args:
      folder: where to write.
      scored: all clips; reasons: for each why it is left out, or "".
      report: counts and lists, as `PrepareReport` has them.
      thresholds: drawn into the histograms.
    """
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    pictures = folder / FOLDER
    pictures.mkdir()
    kept = np.array([not reason for reason in reasons])
    _histograms(pictures / "histograms.png", scored, kept, thresholds)
    away = [
        *((e["source"], "-", e["reason"]) for e in report["skipped"]),
        *((e["source"], f"{e['start']:.2f}", e["reason"]) for e in report["rejected"]),
    ]
    short = len(report["rejected"]) - int((~kept).sum())
    counts = {
        "sources": report["sources"],
        "sources not, or not wholly, read": len(report["skipped"]),
        "clips": report["clips"],
        "pieces too short for a clip": short,
        **{f"clips turned away by {k}": v for k, v in summary(list(reasons)).items()},
        "clips kept": report["records"],
        "frames kept": report["frames"],
    }
    off = [name for name in SCORES if name not in scored.index]
    off += ["phash"] * (HASHES[0] not in scored.index)
    sections = [
        Section(
            "What became of the videos",
            f"Scores that were off: {', '.join(off)}." if off else "",
            table=[("", "number"), *((k, f"{v:,}") for k, v in counts.items())],
        ),
        Section(
            "Sizes, lengths and scores",
            "Blue: kept. Orange: turned away. Dashed: the thresholds.",
            [(f"{FOLDER}/histograms.png", "")],
        ),
        _thumbnails("Kept", pictures, scored, np.flatnonzero(kept), reasons),
        _thumbnails("Turned away", pictures, scored, np.flatnonzero(~kept), reasons),
    ]
    if report["refused"]:
        rows = [(e["source"], f"{e['start']:.2f}", e["reason"]) for e in report["refused"]]
        sections.append(_listed("Without a caption: the endpoint refused", rows))
    if away:
        sections.append(_listed("Not in the dataset", away))
    write_gallery(folder / "report.html", "Preparation", [s for s in sections if s is not None])


def _listed(title: str, rows: Sequence[tuple[str, str, str]]) -> Section:
    more = f"The first {_ROWS} of {len(rows)}; all are in report.json." if len(rows) > _ROWS else ""
    return Section(title, more, table=[("source", "start (s)", "reason"), *rows[:_ROWS]])


def _thumbnails(
    title: str, pictures: Path, scored: Dataset, records: np.ndarray, reasons: Sequence[str]
) -> Section | None:
    if not records.size:
        return None
    items = []
    chosen = records[np.unique(np.linspace(0, len(records) - 1, _SHOWN).round().astype(int))]
    for i in chosen.tolist():
        record = scored.read(i)
        offsets, middle = record["offsets"], record["num_frames"] // 2
        file = pictures / f"{i:06d}.jpg"
        file.write_bytes(record["payload"][offsets[middle] : offsets[middle + 1]].tobytes())
        about = f"{record['source']} {record['start']:.1f} s"
        items.append((f"{FOLDER}/{file.name}", "; ".join(filter(None, (about, reasons[i])))))
    shown = "all" if len(chosen) == len(records) else f"{len(chosen)} of {len(records):,}"
    return Section(title, f"The middle frames of {shown}.", items, thumbnails=True)


def _histograms(path: Path, scored: Dataset, kept: np.ndarray, thresholds: FilterConfig) -> None:
    index = scored.index
    values = {"seconds": index["duration"], "aspect": index["width"] / index["height"]}
    plain = [k for k in _TITLES if k in index and k not in HASHES]
    values |= {name: index[name] for name in plain}
    values = {name: values[name] for name in _TITLES if name in values}
    rows = -(-len(values) // 3)
    figure = Figure(figsize=(12, 2.7 * rows), dpi=80)
    axes = figure.subplots(rows, 3, squeeze=False)
    bounds = thresholds.ranges()
    for axis, (name, x) in zip(axes.flat, values.items()):
        least, most = float(x.min()), float(x.max())
        if most - least < 1e-6 * max(1.0, abs(most)):  # about the one value, but nothing below 0
            least, most = (least - 0.5, most + 0.5) if least >= 0.5 else (least, least + 1.0)
        edges = np.linspace(least, most, min(40, max(10, len(x) // 4)) + 1)
        axis.hist([x[kept], x[~kept]], edges, stacked=True)
        axis.set(title=_TITLES[name], ylabel="clips")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        for bound in bounds.get({"num_frames": "frames"}.get(name, name), ()):
            if bound is not None:
                axis.axvline(bound, color="black", linestyle="--", linewidth=1)
    for axis in axes.flat[len(values) :]:
        axis.axis("off")
    figure.subplots_adjust(0.05, 0.4 / (2.7 * rows), 0.99, 1 - 0.35 / (2.7 * rows), 0.2, 0.5)
    FigureCanvasAgg(figure).print_png(path)
