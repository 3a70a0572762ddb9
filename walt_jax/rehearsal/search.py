"""Which meshes, batch sizes and remat policies are worth compiling for a topology."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from walt_jax import config as config_lib
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.report import Report
from walt_jax.tasks import DenoiserTask
from walt_jax.training.experiment import Experiment

CLIPS = (4, 8, 16, 32)
_KEPT = ((), ("qkv", "attention"), ("qkv", "attention", "up"))


def with_clips(values: dict[str, Any], clips: int, topology: Topology) -> dict[str, Any]:
    """A config's values with so many clips a chip; images beside them keep their proportion."""
    size = clips * topology.chips
    changed = {"batch_size": size}
    if images := values.get("image_batch_size"):
        changed["image_batch_size"] = images * size // values["batch_size"]
    return values | changed


def candidates(
    values: dict[str, Any], topology: Topology, job: str, clips: Sequence[int] = CLIPS
) -> Iterator[dict[str, Any]]:
    """Configs to compile: values with other meshes, clips a chip, and kept activations.

    `fsdp` has as many chips as a slice's longest side, or all of the slice, less what `tensor` and
    `context`, of 1 or 2 each, take; `data` has the rest.
    """
    slice_ = topology.chips // topology.slices
    policies = _policies(values) if job == "train" else [{}]
    sides = dict.fromkeys((topology.side, slice_))
    for side, tensor, context in itertools.product(sides, (1, 2), (1, 2)):
        if side % (tensor * context):
            continue
        for number, policy in itertools.product(clips, policies):
            changed = with_clips(copy.deepcopy(values), number, topology)
            fsdp = side // (tensor * context)
            changed["mesh"] = {"data": topology.chips // side, "fsdp": fsdp}
            changed["mesh"] |= {"tensor": tensor, "context": context}
            changed["task"].setdefault("model", {}).update(policy)
            yield changed


def _policies(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Keys of the model: what remat keeps, where a model says it, and no remat."""
    if not isinstance(config_lib.build(Experiment, values).task, DenoiserTask):
        return [{"remat": True}, {"remat": False}]
    policies: list[dict[str, Any]] = [{"remat": True, "kept": kept} for kept in _KEPT]
    return [*policies, {"remat": False, "kept": (), "offloaded": ()}]


def remat(values: dict[str, Any], job: str) -> str:
    """What a candidate has of remat, for its row; nothing where no gradient is taken."""
    if job != "train":
        return "-"
    model = config_lib.build(Experiment, values).task.model
    if not model.remat:
        return "off"
    return f"keeps {'+'.join(kept)}" if (kept := getattr(model, "kept", ())) else "full"


def table(reports: Sequence[Report]) -> list[str]:
    """What fits, best first, communication that is not hidden included; then what does not."""

    def share(r: Report) -> float:
        return r.est_mfu * r.est_step_seconds / ((r.est_step_seconds + r.exposed_seconds) or 1.0)

    ranked = sorted(reports, key=lambda r: (not r.fits, bool(r.error), -share(r)))
    out = [
        f"{'mesh':<34}{'step':<44}{'remat':<24}"
        f"{'fits':>5}{'GiB':>8}{'MFU':>8}{'s':>9}{'exposed s':>11}"
    ]
    for r in ranked:
        mesh = " ".join(f"{axis}={n}" for axis, n in r.mesh.items() if n > 1) or "one chip"
        name = f"{mesh:<34}{r.step:<44}{r.remat:<24}"
        if r.error:
            out.append(f"{name}{'?':>5}  the compiler failed: {r.error}")
            continue
        out.append(
            f"{name}{'yes' if r.fits else 'no':>5}{r.hbm_bytes / 2**30:>8.1f}{r.est_mfu:>8.1%}"
            f"{r.est_step_seconds:>9.3f}{r.exposed_seconds:>11.4f}"
        )
    return out
