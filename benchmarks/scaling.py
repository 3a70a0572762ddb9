"""Which pods a model would train on, by the TPU compiler: `docs/scaling.md` and its curve.

    python -m benchmarks.scaling [--only l xl ...] [--out docs]

Rehearses each point of POINTS once (records in OUT/scaling.jsonl; what is there is not compiled
again), then writes OUT/scaling.md and OUT/scaling.png. A point takes minutes, as a compilation for
a pod does, whatever its size.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.collectives import DCN
from walt_jax.rehearsal.search import with_clips
from walt_jax.rehearse import run
from walt_jax.training.experiment import Experiment

_TEXT = "configs/walt_t2v.py:3b"
# Goals: the least MFU by model and kind of chip; the most that is not hidden, up to so many chips.
_MFU = {("l", "v5e"): 0.45, ("3b", "v5p"): 0.50}
_NOT_HIDDEN, _CHIPS = 0.10, 1024


@dataclasses.dataclass(frozen=True)
class Point:
    """One pod.

    Attributes:
      model: the curve that it is on.
      config: of the model.
      topology, slices: the pod.
      fsdp: chips over which parameters are divided; copies of them are `data`.
      clips: a chip.
      overrides: of the config.
    """

    model: str
    config: str
    topology: str
    fsdp: int
    slices: int = 1
    clips: int = 16
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        slices = f"{self.slices} x " if self.slices > 1 else ""
        pod = f"{slices}{self.topology} fsdp {self.fsdp}"
        return f"{self.model} {pod} {self.clips} {' '.join(self.overrides)}".strip()


def points() -> Iterator[Point]:
    """What the page shows."""
    for size in ("l", "xl"):
        yield Point(size, f"configs/walt_ucf101.py:{size}", "v5e:4x4", 4)
    for topology, fsdp in {"4x4x4": 16, "4x8x8": 8, "8x8x16": 16, "16x16x16": 16}.items():
        yield Point("3b", _TEXT, f"v5p:{topology}", fsdp)
    for clips in (8, 16, 24):
        yield Point("3b", _TEXT, "v6e:8x8", 8, clips=clips)
    for slices in (1, 4, 16):
        yield Point("3b", _TEXT, "v6e:16x16", 16, slices)


def rehearsed(point: Point) -> dict[str, Any]:
    """The report of a point's slowest step."""
    topology = Topology.parse(point.topology, point.slices)
    values = config_lib.load(point.config, list(point.overrides))
    values = with_clips(values, point.clips, topology)
    values["mesh"] = {"data": topology.chips // point.fsdp, "fsdp": point.fsdp}
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
        "collectives over the rate of the links; not hidden is what exceeds the cycles that the",
        "schedule has meanwhile. Shares of communication are of a step with what is not hidden.",
        "",
        *_rows(
            "| model | pod | chips | data x fsdp | clips a chip | fits | GiB | s a step | MFU |"
            " communication | not hidden |",
            map(_pod, records),
        ),
        "",
        "![Clips a second over chips](scaling.png)",
        "",
        "## Goals",
        "",
        f"At most {_NOT_HIDDEN:.0%} of a step are communication that is not hidden, on up to",
        f"{_CHIPS} chips. MFU is at least 45% for L on v5e:4x4 and at least 50% for the 3B on v5p;",
        "here of a step with what is not hidden. Where a goal is missed, the last column has what",
        "takes most of the step beside products.",
        "",
        *_rows(
            "| model | pod | clips a chip | goal | estimate | met | most in the way |",
            itertools.chain.from_iterable(map(_goals, records)),
        ),
        "",
        "## What takes the time",
        "",
        "Shares of the estimated cycles, by kind of instruction and by part of the model; last,",
        "the model's FLOPs over the cycles of products alone, what they compute again not counted.",
        "",
        *_rows(
            "| model | pod | products | attention kernels | fusions and the rest | copies | MLP |"
            " attention | cross-attention | optimizer | others | MFU of products |",
            map(_parts, records),
        ),
        "",
        "In the way of more: full remat computes each layer's forward pass once more, a fifth of",
        "the products and kernels that counts for nothing, so that 80 % would be the end;",
        "attention, whose softmax is no product, and heads narrower than the matrix unit; fusions",
        "of norms, modulations and residuals, which wait for memory, the more the faster the chip",
        "multiplies.",
        "",
        "## What is sent, and not hidden",
        "",
        *_rows(
            "| model | pod | operation | axes | a step | MiB a chip | ms | ms not hidden |",
            itertools.chain.from_iterable(map(_sent, records)),
        ),
        "",
        *_slices(records),
    ]
    return "\n".join([*lines, ""])


def _rows(head: str, rows: Iterable[list[str]]) -> list[str]:
    """A table of Markdown; the first two columns are names."""
    columns = head.count("|") - 1
    rule = f"|---|---|{'---:|' * (columns - 2)}"
    return [head, rule, *(f"| {' | '.join(cells)} |" for cells in rows)]


def _pod(r: dict[str, Any]) -> list[str]:
    step = r["est_step_seconds"] + r["exposed_seconds"]
    sent = sum(c["seconds"] for c in r["collectives"])
    return [
        r["model"],
        r["topology"],
        str(r["chips"]),
        f"{r['mesh']['data']} x {r['mesh']['fsdp']}",
        r["point"].split()[-1],
        "yes" if r["fits"] else "no",
        f"{r['hbm_bytes'] / 2**30:.1f}",
        f"{r['est_step_seconds']:.3f}",
        f"{r['est_mfu']:.1%}",
        *(f"{seconds / step:.1%}" if step else "-" for seconds in (sent, r["exposed_seconds"])),
    ]


def _goals(r: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each goal that a pod has."""
    step = (r["est_step_seconds"] + r["exposed_seconds"]) or math.inf
    waits = {f"{c['operation']} over {c['axes']}": c["exposed"] / step for c in r["collectives"]}
    computed = r["est_step_seconds"] / step
    slow = {kind: c / r["est_cycles"] * computed for kind, c in r["kinds"].items()}
    slow.pop("products", None)
    goals = []
    if r["chips"] <= _CHIPS:
        share = r["exposed_seconds"] / step
        goals.append((f"not hidden <= {_NOT_HIDDEN:.0%}", share, share <= _NOT_HIDDEN, waits))
    if least := _MFU.get((r["model"], r["topology"].split(":")[0].split()[-1])):
        mfu = r["est_mfu"] * computed
        goals.append((f"MFU >= {least:.0%}", mfu, mfu >= least, waits | slow))
    for goal, found, met, others in goals:
        way = "memory"
        if r["fits"]:
            worst = max(others, key=others.get)
            way = "-" if met else f"{worst}: {others[worst]:.1%} of the step"
        about = r["model"], r["topology"], r["point"].split()[-1], goal, f"{found:.1%}"
        yield [*about, "met" if met and r["fits"] else "**missed**", way]


def _slices(records: list[dict[str, Any]]) -> list[str]:
    """Says of what hosts of slices send each other where it is."""
    several = [r for r in records if "slices" in r["topology"]]
    if all(any(c["axes"] == DCN for c in r["collectives"]) for r in several):
        return [f"What hosts of slices send each other is in these tables, as {DCN}."]
    return [
        "The records of several slices are from before rehearsals counted what hosts of slices",
        "send each other: it is in none of their figures. By hand, of the 3B on 16 slices of",
        "v6e:16x16 it is a sixteenth of what is gathered over `data` within a slice afterwards,",
        "55 MB a chip and step: 8 ms more of 1947 where nothing hides them, which misses no goal.",
    ]


def _parts(r: dict[str, Any]) -> list[str]:
    kinds, rooms, total = r["kinds"], r["rooms"], r["est_cycles"] or 1
    named = ("mlp", "attention", "cross_attention", "optimizer")
    others = sum(cycles for room, cycles in rooms.items() if room not in named)
    parts = [kinds.get(kind, 0) for kind in ("products", "kernels", "the rest", "copies")]
    parts += [*(rooms.get(room, 0) for room in named), others]
    in_products = r["est_mfu"] * total / (kinds.get("products") or total)
    return [r["model"], r["topology"], *(f"{p / total:.1%}" for p in (*parts, in_products * total))]


def _sent(r: dict[str, Any]) -> list[list[str]]:
    """Collectives that take a thousandth of the step or more."""
    return [
        [
            r["model"],
            r["topology"],
            c["operation"],
            c["axes"],
            str(c["count"]),
            f"{c['bytes'] / 2**20:,.0f}",
            f"{c['seconds'] * 1e3:.1f}",
            f"{c['exposed'] * 1e3:.1f}",
        ]
        for c in r["collectives"]
        if c["seconds"] > r["est_step_seconds"] / 1000
    ]


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Weak scaling, of as many clips a chip: clips a second over chips, with all that is sent."""
    records = [r for r in records if int(r["point"].split()[-1]) == Point.clips]
    figure, axes = plt.subplots(figsize=(6, 4))
    for curve in sorted({(r["model"], r["topology"].split(":")[0].split()[-1]) for r in records}):
        own = [r for r in records if (r["model"], r["topology"].split(":")[0].split()[-1]) == curve]
        own = sorted((r for r in own if r["fits"]), key=lambda r: r["chips"])
        clips = [Point.clips * r["chips"] for r in own]
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
