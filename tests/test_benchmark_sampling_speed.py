"""benchmarks/sampling_speed.py: walt_jax and PyTorch sample the same videos."""

import sys

import numpy as np
import pytest

from benchmarks import sampling_speed
from walt_jax.errors import UserError

TINY = "--width 16 --layers 2 --heads 2 --grid 2x4x4 --channels 4 --steps 3 --batch 2 --repeats 1"


@pytest.fixture
def arguments(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(sys, "argv", ["sampling_speed", *TINY.split()])
    return sampling_speed._arguments()


@pytest.mark.slow
def test_both_sample_the_same_and_are_timed(arguments):
    rows = sampling_speed.compare(arguments)
    assert [row["name"] for row in rows] == ["1 video at a time", "2 videos at a time"]
    assert 0 < rows[0]["difference"] < 1e-4 and min(rows[0]["first_video"].values()) > 0
    assert all(np.isfinite(row["ratio"]) for row in rows)


@pytest.mark.slow
def test_other_weights_are_refused(arguments, monkeypatch):
    from benchmarks import torch_denoiser

    whole = torch_denoiser.torch_state
    changed = lambda params: {k: 1.01 * v for k, v in whole(params).items()}  # noqa: E731
    monkeypatch.setattr(torch_denoiser, "torch_state", changed)
    with pytest.raises(UserError, match="The videos differ"):
        sampling_speed.compare(arguments)
