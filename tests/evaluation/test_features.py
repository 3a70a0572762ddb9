"""Feature networks by name; the same bits on any devices, in any batch, in any processes."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_features

from walt_jax.errors import UserError
from walt_jax.evaluation import features
from walt_jax.evaluation.frechet import frechet_distance
from walt_jax.evaluation.moments import Moments
from walt_jax.parallel import MeshConfig, make_mesh

VIDEOS = np.random.default_rng(0).integers(0, 256, (13, 4, 12, 16, 3)).astype(np.uint8)


def convolve(params, clips):
    """Features of a random convolution, which XLA computes differently in another batch."""
    x = clips.astype(jnp.float32) / 127.5 - 1
    y = jax.lax.conv_general_dilated(
        x, params, (2, 2, 2), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    return jnp.tanh(y).mean((1, 2, 3))


def load_tiny(weights, *, resize=None, mesh=None, allow=()):
    """A network of our own, as `features.load` takes one."""
    kernel = np.random.default_rng(1).normal(size=(3, 5, 5, 3, 24)).astype(np.float32)
    return features.Extractor(
        name="tiny",
        weights="random",
        weights_hash=weights or "",
        trained=False,
        dims=24,
        min_frames=2,
        resize=resize or "none",
        apply=convolve,
        params=kernel,
        mesh=mesh,
    )


def test_any_batch_and_any_devices_give_the_same_bits():
    alone = load_tiny(None)(VIDEOS)
    assert alone.shape == (13, 24) and alone.dtype == np.float32
    assert np.unique(alone, axis=0).shape == alone.shape
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=1, tensor=2, context=2)):
        net = load_tiny(None, mesh=make_mesh(mesh))
        np.testing.assert_array_equal(net(VIDEOS), alone)
        np.testing.assert_array_equal(np.concatenate([net(VIDEOS[:5]), net(VIDEOS[5:])]), alone)
        assert net(VIDEOS[:0]).shape == (0, 24)


def test_own_network_by_its_function():
    net = features.load(f"{__name__}:load_tiny", "w.npz", resize="bilinear")
    assert (net.weights_hash, net.resize) == ("w.npz", "bilinear")
    assert features.score_name(net) == "frechet_fixture"


def test_names_of_scores():
    class Net:
        name, trained = "i3d", True

    assert features.score_name(Net()) == "fvd"
    Net.name = "i3d-pool"
    assert features.score_name(Net()) == "fvd_i3d_pool"
    Net.trained = False
    assert features.score_name(Net()) == "frechet_fixture"


def test_refuses_what_is_no_video():
    net = load_tiny(None)
    with pytest.raises(UserError, match="at least 2 frames a video, 1 given"):
        net(VIDEOS[:, :1])
    with pytest.raises(ValueError, match="float32"):
        net(VIDEOS.astype(np.float32))
    with pytest.raises(ValueError, match="not uint8"):
        net(VIDEOS[0])


def test_clips_of_networks_of_frames():
    net, frames = tiny_features.load(), tiny_features.load_frames()
    np.testing.assert_array_equal(features.of_clips(net, VIDEOS)[:, 0], net(VIDEOS))
    found = features.of_clips(frames, VIDEOS)
    assert found.shape == (13, 4, tiny_features.DIMS)
    np.testing.assert_array_equal(found[:, 2], frames(VIDEOS[:, 2:3]))
    with pytest.raises(UserError, match="needs 1 frame a video, 4 given: make shorter"):
        frames(VIDEOS)


def test_frames_are_checked_before_there_are_clips():
    for net, good, bad in (
        (tiny_features.load(), 9, 3),
        (tiny_features.load_exact(), 4, 5),
        (tiny_features.load_exact(), 4, 3),
    ):
        features.check_clips(net, good)
        with pytest.raises(UserError, match=rf"4 frames, but protocol\.num_frames is {bad}"):
            features.check_clips(net, bad)
    features.check_clips(tiny_features.load_frames(), 9)


def test_refuses_unknown_networks():
    with pytest.raises(UserError, match=r"'i4d'.*i3d, i3d-pool"):
        features.load("i4d")
    with pytest.raises(UserError, match="no_such_module"):
        features.load("no_such_module:load")
    with pytest.raises(UserError, match="load_none"):
        features.load(f"{__name__}:load_none")


PROGRAM = """
import json, sys
import jax
from test_features import VIDEOS, load_tiny
from walt_jax.evaluation.moments import Moments

address, rank = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
net = load_tiny(None, mesh=jax.make_mesh((4, 1, 1, 1), ("data", "fsdp", "tensor", "context")))
mine = VIDEOS[:9] if rank == "0" else VIDEOS[9:]
sums = Moments.of(net(mine)).over_processes()
print(json.dumps([sums.count, sums.total.tolist(), sums.outer.tolist()]))
"""


def test_two_processes_score_as_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(rank)],
            env=env | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    whole = Moments.of(load_tiny(None)(VIDEOS))
    other = Moments.of(load_tiny(None)(VIDEOS[::-1, :, ::-1]))
    for output, _ in outputs:
        (line,) = (line for line in output.splitlines() if line.startswith("[13, "))
        count, total, outer = json.loads(line)
        joined = Moments(count, np.array(total), np.array(outer))
        assert joined.count == 13
        np.testing.assert_allclose(joined.outer, whole.outer, rtol=1e-14)
        distance = frechet_distance(joined, other)
        assert distance == pytest.approx(frechet_distance(whole, other), rel=1e-9) and distance > 0
