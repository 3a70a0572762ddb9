"""Guidance and dynamic thresholding against computations by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.diffusion import Constant, DynamicThreshold, Interval, PowerCosine, guide
from walt_jax.errors import UserError
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.parallel.sharding import batch_sharding, place

T = 1000


class Network:
    """Answers x + estimate + t + condition, and keeps the shapes that it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, estimate, condition):
        self.calls.append(jax.tree.map(lambda a: a.shape[0], (x, t, estimate, condition)))
        return x + estimate + (t.astype(jnp.float32) + sum(condition.values()))[:, None]


def conditions(*rows):
    """Of text and frames, a row a condition; two samples that differ."""
    return [{"text": jnp.array([a, 2.0 * a]), "frames": jnp.array([b, 3.0 * b])} for a, b in rows]


X, T_ROWS = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([100, 700])
ESTIMATE = jnp.array([[10.0, 20.0], [30.0, 40.0]])
BASE = X + ESTIMATE + T_ROWS[:, None]


def test_usual_guidance_in_one_call_of_twice_the_batch():
    network = Network()
    null, given = conditions((5.0, 0.0), (1.0, 0.0))
    out = guide(network, (null, given), (Constant(3.0),), T)(X, T_ROWS, ESTIMATE)
    # uncond + 3 (cond - uncond): of the conditions, 5 + 3 (1 - 5) and 10 + 3 (2 - 10).
    np.testing.assert_allclose(out, BASE + jnp.array([[-7.0], [-14.0]]), rtol=1e-6)
    assert network.calls == [(4, 4, 4, {"text": 4, "frames": 4})]


@pytest.mark.parametrize("scale, chosen", [(1.0, 1.0), (0.0, 5.0), (1, 1.0)])
def test_answers_that_cancel_are_not_computed(scale, chosen):
    network = Network()
    rows = conditions((5.0, 0.0), (1.0, 0.0))
    out = guide(network, rows, (Constant(scale),), T)(X, T_ROWS, ESTIMATE)
    np.testing.assert_allclose(out, BASE + jnp.array([[chosen], [2 * chosen]]), rtol=1e-6)
    assert network.calls[0][0] == 2


def test_text_and_frames_with_a_scale_each():
    """uncond + 1.5 (frames - uncond) + 7 (both - frames)."""
    network = Network()
    rows = conditions((0.0, 0.0), (0.0, 2.0), (3.0, 2.0))
    out = guide(network, rows, (Constant(1.5), Constant(7.0)), T)(X, T_ROWS, ESTIMATE)
    first, second = 1.5 * 2 + 7 * 3, 1.5 * 6 + 7 * 6
    np.testing.assert_allclose(out, BASE + jnp.array([[first], [second]]), rtol=1e-5)
    assert [call[0] for call in network.calls] == [6]
    # Equal scales are guidance by both at once: the answer to frames alone cancels.
    out = guide(network, rows, (Constant(4.0), Constant(4.0)), T)(X, T_ROWS, ESTIMATE)
    np.testing.assert_allclose(out, BASE + jnp.array([[4 * 5.0], [4 * 12.0]]), rtol=1e-5)
    assert network.calls[-1][0] == 4


def test_a_sample_is_guided_by_its_own_time():
    network = Network()
    rows = conditions((0.0, 0.0), (1.0, 0.0))
    scales = (Interval(scale=5.0, low=0.2, high=0.8),)
    out = guide(network, rows, scales, T)(X, T_ROWS, ESTIMATE)
    # 0.1 lies outside, 0.7 inside.
    np.testing.assert_allclose(out, BASE + jnp.array([[1.0], [5.0 * 2.0]]), rtol=1e-6)
    assert network.calls[0][0] == 4


def test_samples_of_a_batch_do_not_mix():
    rows = conditions((0.5, 0.0), (1.0, 2.0))
    guided = guide(Network(), rows, (PowerCosine(),), T)
    swapped = [jax.tree.map(lambda a: a[::-1], row) for row in rows]
    turned = guide(Network(), swapped, (PowerCosine(),), T)
    np.testing.assert_array_equal(
        guided(X, T_ROWS, ESTIMATE)[::-1], turned(X[::-1], T_ROWS[::-1], ESTIMATE[::-1])
    )


def test_rows_stay_on_their_device():
    """A batch divided over devices is guided without a word between them."""
    mesh = make_mesh(MeshConfig())
    rows = [jnp.zeros((8, 1)), jnp.ones((8, 1))]

    def network(x, t, estimate, condition):
        return x * condition + estimate + t[:, None]

    def run(x, t, estimate, null, given):
        return guide(network, (null, given), (Constant(3.0),), T)(x, t, estimate)

    arrays = (jnp.ones((8, 4)), jnp.arange(8), jnp.ones((8, 4)), *rows)
    placed = place(arrays, (batch_sharding(mesh),) * 5)
    program = jax.jit(run, out_shardings=batch_sharding(mesh)).lower(*placed).compile().as_text()
    for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert word not in program


def test_power_cosine_is_that_of_mdt():
    share = jnp.array([0.0, 0.25, 0.5, 1.0])
    scale = PowerCosine(scale=3.8, power=4.0)(share)
    by_hand = [
        (1 - np.cos(np.pi * (1 - u) ** 4)) / 2 * (3.8 - 1) + 1 for u in (0.0, 0.25, 0.5, 1.0)
    ]
    np.testing.assert_allclose(scale, by_hand, rtol=1e-5)
    np.testing.assert_allclose([scale[0], scale[-1]], [3.8, 1.0], rtol=1e-6)  # clean, noise
    # A small power, as in the script of MDTv2, is there nearly at once.
    assert PowerCosine(scale=4.0, power=0.01)(jnp.array([0.5]))[0] > 3.99


def test_interval():
    scale = Interval(scale=2.5, low=0.25, high=0.75)
    np.testing.assert_array_equal(
        scale(jnp.array([0.0, 0.25, 0.26, 0.75, 0.76, 1.0])), [1, 1, 2.5, 2.5, 1, 1]
    )
    with pytest.raises(UserError, match=r"\(0.8, 0.2\] must lie in 0"):
        Interval(low=0.8, high=0.2)


def test_the_variance_is_the_last_conditions_own():
    def network(x, t, estimate, condition):
        return jnp.concatenate([x * condition[:, None], 10.0 * condition[:, None]], axis=-1)

    rows = [jnp.array([0.0, 0.0]), jnp.array([1.0, 2.0])]
    out = guide(network, rows, (Constant(3.0),), T, channels=2)(X, T_ROWS, ESTIMATE)
    np.testing.assert_allclose(out[:, :2], X * jnp.array([[3.0], [6.0]]), rtol=1e-6)
    np.testing.assert_array_equal(out[:, 2], [10.0, 20.0])


def test_as_many_scales_as_conditions_but_one():
    with pytest.raises(UserError, match=r"by 2 conditions, .* takes 1 scales, got 2"):
        guide(Network(), conditions((0, 0), (1, 0)), (Constant(), Constant()), T)


def test_dynamic_thresholding():
    threshold = DynamicThreshold(percentile=0.9)
    x0 = jnp.stack([jnp.linspace(-0.5, 0.5, 101), jnp.linspace(-4.0, 4.0, 101)])[..., None]
    out = threshold(x0)
    np.testing.assert_array_equal(out[0], x0[0])  # within the range: untouched
    s = np.quantile(np.abs(np.linspace(-4, 4, 101)), 0.9)
    np.testing.assert_allclose(out[1], np.clip(x0[1], -s, s) / s, rtol=1e-5)
    assert np.abs(out).max() <= 1.0
    np.testing.assert_allclose(
        DynamicThreshold(percentile=0.9, limit=2.0)(x0)[1], np.clip(x0[1], -s, s) * 2 / s, rtol=1e-5
    )
    with pytest.raises(UserError, match=r"percentile=99.5"):
        DynamicThreshold(percentile=99.5)
