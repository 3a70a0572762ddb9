"""What a workdir says of a run beside its checkpoints, so that it stands alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from walt_jax import config as config_lib
from walt_jax.data.records import Dataset
from walt_jax.parallel import describe
from walt_jax.training.program import Program

SHARDINGS = "shardings.txt"


def about_data(dataset: Dataset, fps: float) -> dict[str, Any]:
    """What sampling needs to know of the data; `fps` is 0 for every frame."""
    return {
        "label_names": dataset.label_names,
        "fps": fps or float(np.median(dataset.index["fps"])),
        "fingerprint": dataset.fingerprint,
    }


def write_about(workdir: str | Path, about: Mapping[str, Any], program: Program) -> None:
    """Writes that, and how every parameter lies on the mesh."""
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_lib.DATASET).write_text(json.dumps(about, indent=2) + "\n")
    lines = describe(program.shardings.params, program.abstract.params)
    (folder / SHARDINGS).write_text("\n".join(lines) + "\n")
