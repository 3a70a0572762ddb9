"""Which pods a model would train on, by the TPU compiler: `docs/scaling.md` and its curve.

    python -m benchmarks.scaling [--only l xl ...] [--out docs]

Rehearses each point of POINTS once (records in OUT/scaling.jsonl; what is there is not compiled
again), then writes OUT/scaling.md and OUT/scaling.png. A point takes minutes, as a compilation for
a pod does, whatever its size.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearse import run
from walt_jax.training.experiment import Experiment

_TEXT = "configs/walt_t2v.py:3b"


@dataclasses.dataclass(frozen=True)
class Point:
    """One pod.

    Attributes:
      model: the curve that it is on.
      config: of the model.
      topology, slices: the pod.
      clips: a chip.
      overrides: of the config.
    """

    model: str
    config: str
    topology: str
    slices: int = 1
    clips: int = 16
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        slices = f"{self.slices} x " if self.slices > 1 else ""
        return (
            f"{self.model} {slices}{self.topology} {self.clips} {' '.join(self.overrides)}".strip()
        )


def points() -> Iterator[Point]:
    """What the page shows."""
    for size in ("l", "xl"):
        yield Point(size, f"configs/walt_ucf101.py:{size}", "v5e:4x4")
    for topology in ("4x4x4", "4x8x8", "8x8x16", "16x16x16"):
        yield Point("3b", _TEXT, f"v5p:{topology}")
    for topology in ("8x8", "16x16"):
        yield Point("3b", _TEXT, f"v6e:{topology}", clips=8)
    for slices in (4, 16):
        yield Point("3b", _TEXT, "v6e:16x16", slices, clips=8)


def rehearsed(point: Point) -> dict[str, Any]:
    """The report of a point's slowest step."""
    topology = Topology.parse(point.topology, point.slices)
    values = config_lib.load(point.config, list(point.overrides))
    values["batch_size"] = point.clips * topology.chips
    if values.get("image_batch_size"):
        values["image_batch_size"] = values["batch_size"]
    values["mesh"] = {"data": point.slices, "fsdp": topology.chips // point.slices}
    experiment = config_lib.build(Experiment, values)
    reports = run(experiment, topology, topology.devices(), "train")
    report = max(reports, key=lambda r: r.est_cycles)
    chips = {"model": point.model, "point": point.name, "chips": topology.chips}
    return chips | dataclasses.asdict(report)


def table(records: list[dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "# Scaling, by the TPU compiler",
        "",
        "Made by `python -m benchmarks.scaling`: the compiler's estimates, no chip was there.",
        "MFU counts model FLOPs without recomputation. Communication is derived: bytes of the",
        "collectives over the rate of the links, less the cycles that the schedule has meanwhile.",
        "",
        "| model | pod | chips | clips a chip | fits | GiB | s a step | MFU | not hidden |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for r in records:
        step = r["est_step_seconds"] + r["exposed_seconds"]
        cells = [
            r["model"],
            r["topology"],
            str(r["chips"]),
            r["point"].split()[-1],
            "yes" if r["fits"] else "no",
            f"{r['hbm_bytes'] / 2**30:.1f}",
            f"{r['est_step_seconds']:.3f}",
            f"{r['est_mfu']:.1%}",
            f"{r['exposed_seconds'] / step:.1%}" if step else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Clips a second over chips](scaling.png)", ""])


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Weak scaling: clips a second over chips, communication that is not hidden included."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for curve in sorted({(r["model"], r["topology"].split(":")[0].split()[-1]) for r in records}):
        own = [r for r in records if (r["model"], r["topology"].split(":")[0].split()[-1]) == curve]
        own = sorted((r for r in own if r["fits"]), key=lambda r: r["chips"])
        clips = [int(r["point"].split()[-1]) * r["chips"] for r in own]
        seconds = [r["est_step_seconds"] + r["exposed_seconds"] for r in own]
        rates = [n / s for n, s in zip(clips, seconds)]
        axes.plot([r["chips"] for r in own], rates, "o-", label=" on ".join(curve))
    axes.set(xscale="log", yscale="log", xlabel="chips", ylabel="clips a second (estimate)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="l, xl, 3b")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    path = args.out / "scaling.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {r["point"] for r in records}
    for point in points():
        if point.name in done or (args.only and point.model not in args.only):
            continue
        record = rehearsed(point)
        print(
            f"{point.name}: {record['est_mfu']:.1%}, {record['compile_seconds']:.0f} s", flush=True
        )
        records.append(record)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    order = [p.name for p in points()]
    records = sorted(
        (r for r in records if r["point"] in order), key=lambda r: order.index(r["point"])
    )
    (args.out / "scaling.md").write_text(table(records))
    draw(records, args.out / "scaling.png")


if __name__ == "__main__":
    cli.run(main)
