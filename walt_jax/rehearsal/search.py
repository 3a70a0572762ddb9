"""Which meshes, batch sizes and remat policies are worth compiling for a topology."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.report import Report

_KEPT = ((), ("qkv", "attention"), ("qkv", "attention", "up"))
_CLIPS = (4, 8, 16, 32)


def candidates(values: dict[str, Any], topology: Topology, job: str) -> Iterator[dict[str, Any]]:
    """Configs to compile: values with other meshes, clips a chip, and kept activations.

    `fsdp` has as many chips as a slice's longest side, or all of the slice, less what `tensor` and
    `context`, of 1 or 2 each, take; `data` has the rest.
    """
    slice_ = topology.chips // topology.slices
    policies = _KEPT if job == "train" and "kept" in values["task"]["model"] else ((),)
    sides = dict.fromkeys((topology.side, slice_))
    for side, tensor, context in itertools.product(sides, (1, 2), (1, 2)):
        if side % (tensor * context):
            continue
        for clips, kept in itertools.product(_CLIPS, policies):
            changed = copy.deepcopy(values)
            fsdp = side // (tensor * context)
            changed["mesh"] = {"data": topology.chips // side, "fsdp": fsdp}
            changed["mesh"] |= {"tensor": tensor, "context": context}
            changed["batch_size"] = clips * topology.chips
            if kept:
                changed["task"]["model"]["kept"] = kept
            yield changed


def table(reports: Sequence[Report]) -> list[str]:
    """What fits, best first, communication that is not hidden included; then what does not."""

    def share(r: Report) -> float:
        return r.est_mfu * r.est_step_seconds / ((r.est_step_seconds + r.exposed_seconds) or 1.0)

    ranked = sorted(reports, key=lambda r: (not r.fits, -share(r)))
    out = [f"{'mesh':<34}{'step':<44}{'fits':>5}{'GiB':>8}{'MFU':>8}{'s':>9}{'exposed s':>11}"]
    for r in ranked:
        mesh = " ".join(f"{axis}={n}" for axis, n in r.mesh.items() if n > 1) or "one chip"
        fits = "yes" if r.fits else "no"
        out.append(
            f"{mesh:<34}{r.step:<44}{fits:>5}{r.hbm_bytes / 2**30:>8.1f}{r.est_mfu:>8.1%}"
            f"{r.est_step_seconds:>9.3f}{r.exposed_seconds:>11.4f}"
        )
    return out
