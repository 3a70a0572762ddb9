"""Timing walt_jax and PyTorch beside each other on one machine."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from walt_jax.errors import UserError

FRAMEWORKS = ("walt_jax", "PyTorch")
_UNCOUNTED = 2  # compilation, and then memory that both allocators take beside each other
Record = dict[str, Any]


def choose_device(device: str, cuda: bool) -> None:
    """Puts JAX on "cpu" or "cuda"; `cuda` says whether PyTorch finds a GPU.

    Raises:
      UserError: one of them finds none.
    """
    # Else JAX takes most of the memory at once and PyTorch finds none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        raise UserError('JAX finds no GPU here: pip install "jax[cuda12]", or --device cpu.')
    elif not cuda:
        raise UserError("PyTorch finds no GPU here: install its CUDA build, or --device cpu.")


def where(device: str, torch: Any) -> str:
    """The device, what matters of its settings, and the versions, in a line."""
    tunables = "set" if "GLIBC_TUNABLES" in os.environ else "NOT set (XLA is slower for it)"
    machine = (
        f"GPU {torch.cuda.get_device_name()}"
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads, GLIBC_TUNABLES {tunables}"
    )
    return f"{machine}; JAX {jax.__version__}, PyTorch {torch.__version__}"


def print_header() -> None:
    """The head of the table of `race`."""
    print(f"\n{'':<34}{'clips/s':>20}{'':8}{'core seconds a clip':>22}")
    print(f"{'':<34}{'walt_jax':>10}{'PyTorch':>10}{'ratio':>8}{'walt_jax':>12}{'PyTorch':>10}")


def race(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], *, clips: int, repeats: int
) -> Record:
    """Times both in turn, prints a line of medians, and gives the figures.

    Args:
      name: of the work.
      ours: gives arrays, which are waited for; `theirs` waits by itself.
      clips: of one run.
      repeats: timed runs of each.
    """
    wall, cores = alternate((lambda: jax.block_until_ready(ours()), theirs), repeats)
    speeds = [clips / statistics.median(w) for w in wall]
    spent = [statistics.median(c) / clips for c in cores]
    print(
        f"{name:<34}{speeds[0]:>10.3f}{speeds[1]:>10.3f}{speeds[0] / speeds[1]:>7.2f}x"
        f"{spent[0]:>12.3f}{spent[1]:>10.3f}",
        flush=True,
    )
    return {
        "name": name,
        "seconds": dict(zip(FRAMEWORKS, wall)),
        "core_seconds": dict(zip(FRAMEWORKS, cores)),
        "ratio": speeds[0] / speeds[1],
        "load": os.getloadavg(),
    }


def alternate(
    runs: Sequence[Callable[[], Any]], repeats: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds on the clock and of all cores, of each run; in turn, after some that are not counted.

    The second holds on a machine that others use too.
    """
    wall: list[list[float]] = [[] for _ in runs]
    cores: list[list[float]] = [[] for _ in runs]
    for repeat in range(-_UNCOUNTED, repeats):
        for i, run in enumerate(runs):
            began = time.perf_counter(), time.process_time()
            run()
            if repeat >= 0:
                wall[i].append(time.perf_counter() - began[0])
                cores[i].append(time.process_time() - began[1])
    return wall, cores
