"""I3D against outputs of the official graph with stand-in weights, and known figures of FVD."""

import json
import os
from pathlib import Path

import i3d_fixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.evaluation import features, i3d
from walt_jax.evaluation.frechet import frechet_distance
from walt_jax.evaluation.moments import Moments
from walt_jax.parallel import MeshConfig, make_mesh

i3d_fixture.needs_fixture()


@pytest.fixture(scope="module")
def net(i3d_file):
    return features.load("i3d", str(i3d_file))


def far(ours, theirs):
    """Relative distance, the worst of the rows."""
    return (np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max()


def constant(value, frames=16, size=64):
    return np.full((1, frames, size, size, 3), value, np.uint8)


def test_resizes_as_the_official_program():
    expected = i3d_fixture.expected()
    first = i3d_fixture.windows()[expected["sel"][0]][:1]
    ours = np.asarray(i3d.resize(first, (224, 224), "tf1-bilinear"))
    np.testing.assert_allclose(ours[0, :8, :8], expected["resized_corner"], atol=1e-4)


def test_is_the_official_graph_on_a_real_video(net):
    expected = i3d_fixture.expected()
    videos = i3d_fixture.windows()[expected["sel"][1:2]]
    assert far(net(videos), expected["tf_logits"][1:2]) < 1e-4


@pytest.mark.slow
def test_is_the_official_graph(net):
    expected = i3d_fixture.expected()
    videos = i3d_fixture.windows()[expected["sel"]]
    assert far(net(videos), expected["tf_logits"]) < 1e-4
    assert far(net(constant(0)), expected["black_logits"]) < 1e-4
    assert far(net(constant(255)), expected["white_logits"]) < 1e-4


@pytest.mark.slow
def test_constant_clips_are_as_far_apart_as_their_logits(net):
    """However many there are of them."""
    black, white = net(constant(0)), net(constant(255))
    for count in (2, 16):
        sides = (Moments.of(np.repeat(side, count, 0)) for side in (black, white))
        expected = np.square(np.float64(black) - white).sum()
        assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-9)


def test_a_score_of_stand_in_weights_is_no_fvd(net):
    assert net.weights == "fixture" and not net.trained
    assert features.score_name(net) == "frechet_fixture"
    assert (net.name, net.dims, net.min_frames, net.resize) == ("i3d", 400, 10, "tf1-bilinear")


def test_refuses_short_clips_and_unknown_resizes(net, i3d_file):
    with pytest.raises(UserError, match="i3d needs at least 10 frames a video, 9 given"):
        net(constant(0, frames=9))
    with pytest.raises(UserError, match="'nearest'"):
        features.load("i3d", str(i3d_file), resize="nearest")


@pytest.mark.slow
def test_logits_are_a_product_of_the_pooled_features():
    """At 32 pixels, whose last map is one pixel."""
    params = jax.tree.map(jnp.asarray, i3d.assemble(short_names()))
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 10, 32, 32, 3)), jnp.float32)
    pooled = i3d.pooled(params, x)
    assert pooled.shape == (1, 1024)
    last = params["logits"]
    np.testing.assert_allclose(
        i3d.logits(params, x), pooled @ last["kernel"] + last["bias"], rtol=1e-4, atol=1e-4
    )


def short_names():
    return {n.removeprefix("RGB/inception_i3d/"): v for n, v in i3d_fixture.tensors().items()}


@pytest.mark.slow
def test_the_same_bits_on_two_devices(net, i3d_file):
    videos = i3d_fixture.windows()[:3, :10]
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    sharded = features.load("i3d", str(i3d_file), mesh=mesh)
    np.testing.assert_array_equal(sharded(videos), net(videos))


@pytest.mark.slow
def test_frechet_distances_of_64_real_videos(i3d_file):
    """Against five public implementations, which resize with half-pixel centres."""
    ndimage = pytest.importorskip("scipy.ndimage")
    expected = json.loads((i3d_fixture.folder() / "expected_fvd.json").read_text())
    videos = i3d_fixture.windows()
    sigma = (0, 0, 0.75, 0.75, 0)
    blurred = ndimage.gaussian_filter(videos.astype(np.float64), sigma, mode="nearest")
    blurred = np.clip(np.round(blurred), 0, 255).astype(np.uint8)
    pool = features.load("i3d-pool", str(i3d_file), resize="bilinear")
    last = i3d.assemble(short_names())["logits"]
    sides = {}
    for name, clips in (("real", videos), ("blur0.75", blurred), ("black", constant(0))):
        features_ND = np.repeat(pool(clips), 64 // len(clips), 0)
        sides[name] = {"pooled": features_ND, "logits": features_ND @ last["kernel"] + last["bias"]}
    for key, values in expected.items():
        if not key.startswith("64/"):
            continue
        _, other, kind = key.split("/")
        pair = [
            Moments.of(sides[name][kind]) for name in ("real", "real" if other == "self" else other)
        ]
        for bias in ("unbiased", "biased"):
            ours = frechet_distance(*pair, unbiased=bias == "unbiased")
            assert ours == pytest.approx(values[f"exact_{bias}"], rel=1e-4, abs=1e-6), (key, bias)


# Published figures of the trained weights.

TRAINED = Path(os.environ.get("WALT_I3D", "."))


@pytest.fixture(scope="module")
def trained():
    if not TRAINED.is_file():
        pytest.skip(
            "needs FVD's weights: download model.ckpt.data-00000-of-00001 (rgb_scratch, git blob "
            "fa7df956...) as docs/evaluation.md says and set WALT_I3D to its path"
        )
    net = features.load("i3d", str(TRAINED))
    assert features.score_name(net) == "fvd"
    return net


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frames", "expected", "within"), [(15, 133.703, 0.01), (16, 152.9175, 0.01), (30, 151.392, 2)]
)
def test_black_against_white(trained, frames, expected, within):
    """Of tensors of 0 and 1 in [0, 1], 64x64: published by a TensorFlow and a PyTorch port."""
    sides = (Moments.of(np.repeat(trained(constant(v, frames)), 8, 0)) for v in (0, 255))
    assert frechet_distance(*sides) == pytest.approx(expected, abs=within)


@pytest.mark.slow
def test_the_cricket_video(trained):
    """The sample of the network's authors, of which they print norm and classes of the logits."""
    path = TRAINED.parent / "v_CricketShot_g04_c01_rgb.npy"
    if not path.exists():
        pytest.skip(f"needs {path}: the authors' sample video, from their repository's data folder")
    x = np.load(path, allow_pickle=False)
    params = i3d.assemble(i3d.i3d_weights.read(str(TRAINED)).tensors)
    logits = np.asarray(jax.jit(i3d.logits)(jax.tree.map(jnp.asarray, params), x))[0]
    assert np.linalg.norm(logits) == pytest.approx(87.217987, rel=1e-4)
    best = np.sort(logits)[::-1][:3]
    np.testing.assert_allclose(best, [19.4886, 12.6938, 12.3322], rtol=1e-4)


@pytest.mark.slow
def test_noise(trained):
    """Of 128 videos of noise in [0, 1], fed without scaling: 10.138085."""
    del trained  # asks for the weights
    params = jax.tree.map(jnp.asarray, i3d.assemble(i3d.i3d_weights.read(str(TRAINED)).tensors))
    run = jax.jit(i3d.logits)
    sides = []
    for seed in (1, 2):
        random, sums = np.random.RandomState(seed), Moments.empty(400)
        for _ in range(128):
            sums.add(run(params, random.rand(1, 16, 224, 224, 3).astype(np.float32)))
        sides.append(sums)
    assert frechet_distance(*sides) == pytest.approx(10.138085, rel=1e-3)
