"""I3D's benchmark: what is timed is equal, and what is priced adds up."""

import argparse
import importlib.util

import pytest

from benchmarks import i3d_speed
from walt_jax.evaluation import i3d

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tensors():
    return i3d_speed.random_tensors()


def test_pytorch_gives_the_same(tensors, monkeypatch):
    pytest.importorskip("torch")
    args = argparse.Namespace(device="cpu", batch=1, frames=10, repeats=1)
    found = i3d_speed.compare(args, tensors)
    assert 0 < found["error"] < 1e-5
    assert [row["ratio"] > 0 for row in found["rows"]] == [True, True]
    monkeypatch.setattr(i3d, "logits", lambda params, x: i3d.pooled(params, x)[:, :400])
    with pytest.raises(i3d_speed.UserError, match="outputs differ"):
        i3d_speed.compare(args, tensors)


def test_stages_add_up(tensors, monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('needs the TPU compiler: pip install "jax[tpu]"')
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr(i3d, "STAGES", i3d.STAGES[:2])
    *stages, whole = i3d_speed.price(argparse.Namespace(chips=["v5e"], frames=16), tensors)
    assert [stage["part"] for stage in stages] == ["Conv3d_1a_7x7", "Conv3d_2b_1x1"]
    assert stages[0]["output"] == stages[1]["input"] == (8, 56, 56, 64)
    assert stages[1]["flops"] == 2 * 8 * 56 * 56 * 64 * 64
    assert whole["cycles"] == sum(stage["cycles"] for stage in stages) > 0
    assert whole["seconds"] == pytest.approx(whole["cycles"] / 1.5e9)
    assert all(0 < stage["share_of_products"] < 1 for stage in stages)
