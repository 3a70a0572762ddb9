"""A page of scores: curves over steps, samples, and a table beside the papers' numbers."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from etils import epath

from walt_jax.errors import UserError
from walt_jax.evaluation.papers import PUBLISHED
from walt_jax.evaluation.protocols import CUSTOM
from walt_jax.evaluation.scores import Score, read_scores
from walt_jax.evaluation.scoring import FOLDER
from walt_jax.gallery import Section, write_gallery

_FIXTURE = "the network's weights are stand-ins; this is no FVD, nor another published score."
_GRIDS = 6  # the newest of each run
_HEADER = ("score", "value", "protocol", "run", "step", "covariance", "features", "code")


def write(workdirs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes `index.html`, `scores.md`, `curves.png` and samples; returns the page.

    Args:
      workdirs: runs with scores.
      out: the folder to write.

    Raises:
      UserError: a workdir has no scores.
    """
    runs = {str(w): read_scores(w) for w in workdirs}
    if not any(runs.values()):
        raise UserError(f"{', '.join(runs)} has no scores: score a checkpoint first.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table = rows(runs)
    (out / "scores.md").write_text(markdown(table))
    names = sorted({score.name for found in runs.values() for score in found})
    fixtures = ", ".join(name for name in names if name.endswith("_fixture"))
    sections = [Section("Scores", fixtures and f"{fixtures}: {_FIXTURE}", table=table)]
    if draw(runs, out / "curves.png"):
        sections.insert(0, Section("Over training", items=[("curves.png", "")]))
    for number, workdir in enumerate(runs):
        items = []
        for picture in sorted((epath.Path(workdir) / FOLDER).glob("*.png"))[-_GRIDS:]:
            name = f"run{number}-{picture.name}"
            (out / name).write_bytes(picture.read_bytes())
            items.append((name, f"step {int(picture.name.split('-')[0])}"))
        if items:
            sections.append(Section(f"Samples of {workdir}", items=items))
    write_gallery(out / "index.html", "Scores", sections)
    return out / "index.html"


def rows(runs: dict[str, list[Score]]) -> list[tuple[str, ...]]:
    """The table: every score, below it the published ones of the same name and protocol."""
    table = [_HEADER]
    groups: dict[tuple[str, str], list[tuple[str, Score]]] = {}
    for run, found in runs.items():
        for score in found:
            groups.setdefault((score.name, score.record["protocol"]["name"]), []).append(
                (run, score)
            )
    for (name, protocol), group in sorted(groups.items()):
        table += [_row(run, score) for run, score in group]
        if protocol != CUSTOM:
            table += [
                (name, _number(p.value, p.std), protocol, p.model, "", "", "published", p.source)
                for p in PUBLISHED
                if (p.name, p.protocol) == (name, protocol)
            ]
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table, the first row the header."""
    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *body]) + "\n"


def draw(runs: dict[str, list[Score]], path: Path) -> bool:
    """Draws each score over the steps, a line for each run and protocol; False without any."""
    lines: dict[str, dict[str, dict[int, Score]]] = {}
    for run, found in runs.items():
        for score in found:
            if score.step is not None:
                name, _, part = score.name.partition("/")
                protocol = score.record["protocol"]["name"]
                label = ", ".join(filter(None, (Path(run).name, part, protocol)))
                lines.setdefault(name, {}).setdefault(label, {})[score.step] = score
    if not lines:
        return False
    figure, axes = plt.subplots(1, len(lines), figsize=(5.5 * len(lines), 3.6), squeeze=False)
    for axis, (name, curves) in zip(axes[0], sorted(lines.items())):
        for label, curve in curves.items():
            steps = sorted(curve)
            values, spread = zip(*((curve[s].value, curve[s].std) for s in steps))
            axis.errorbar(steps, values, spread, fmt="-o", markersize=3, capsize=2, label=label)
        axis.set(title=name, xlabel="step", ylim=(0, 1.05 * axis.get_ylim()[1]))
        axis.legend(fontsize=7, loc="best", framealpha=0.5)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _row(run: str, score: Score) -> tuple[str, ...]:
    record, net = score.record, score.record.get("features")
    commit = record["code"]["commit"][:8] + ("+" if record["code"]["changed"] else "")
    return (
        score.name,
        _number(score.value, score.std if len(score.folds) > 1 else None),
        record["protocol"]["name"],
        run,
        "" if score.step is None else str(score.step),
        record["covariance"] if net else "",
        f"{net['name']} {net['weights'][:8]}" if net else "",
        commit or record["code"]["version"],
    )


def _number(value: float, std: float | None) -> str:
    return f"{value:.4g}" if std is None else f"{value:.4g} ± {std:.2g}"
