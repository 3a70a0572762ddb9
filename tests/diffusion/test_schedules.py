"""Processes: published constants, shifts, zero terminal SNR, times, posteriors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax import config, diffusion
from walt_jax.errors import UserError

PROCESSES = [
    diffusion.Linear(),
    diffusion.Linear(zero_terminal_snr=False),
    diffusion.Cosine(),
    diffusion.Cosine(zero_terminal_snr=False, shift=2.0),
    diffusion.ContinuousCosine(),
    diffusion.ContinuousCosine(zero_terminal_snr=False, shift=4.0),
    diffusion.RectifiedFlow(),
    diffusion.RectifiedFlow(times="uniform", shift=3.0),
]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=str)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def log_snr(process, t):
    signal, noise = process.curve(np.asarray(t), np)
    return 2 * np.log(signal / noise)


def test_linear_has_the_published_constants():
    signal = diffusion.Linear(zero_terminal_snr=False).table[0]
    assert len(signal) == 1000
    np.testing.assert_allclose(signal[-1], 0.00635, atol=5e-6)
    np.testing.assert_allclose(signal[0] ** 2, 1 - 1e-4, rtol=1e-12)
    np.testing.assert_allclose(signal[1] ** 2, (1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999), rtol=1e-12)
    zero, zero_noise = diffusion.Linear().table
    assert zero[-1] == 0.0 and zero_noise[-1] == 1.0
    np.testing.assert_allclose(zero[0], signal[0], rtol=1e-12)
    # Between them the rescaling is affine.
    np.testing.assert_allclose(
        (zero[500] - zero[0]) / (signal[500] - signal[0]),
        signal[0] / (signal[0] - signal[-1]),
        rtol=1e-9,
    )


def test_cosine_is_that_of_improved_ddpm():
    process = diffusion.Cosine(zero_terminal_snr=False)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 100, 500, 900):
        np.testing.assert_allclose(process.table[0][t] ** 2, f(t + 1) / f(0), rtol=1e-9)
    # The last beta alone is clipped.
    ratio = (process.table[0][1:] / process.table[0][:-1]) ** 2
    np.testing.assert_allclose(ratio[-1], 1e-3, rtol=1e-9)
    assert ratio[-2] > 1.1e-3


def test_continuous_cosine_is_that_of_simple_diffusion():
    process = diffusion.ContinuousCosine(num_timesteps=1, zero_terminal_snr=False)
    t_min, t_max = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    for t in (0.0, 0.01, 0.3, 0.7, 1.0):
        expected = -2 * math.log(math.tan(t_min + t * (t_max - t_min)))
        np.testing.assert_allclose(log_snr(process, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [diffusion.Linear, diffusion.Cosine, diffusion.ContinuousCosine])
def test_resolution_shift_adds_to_the_log_snr(make):
    """From a reference of 64 to 256 pixels: 2 log(64 / 256) at every time (equation 4)."""
    plain, shifted = (make(shift=s, zero_terminal_snr=False) for s in (1.0, 4.0))
    t = np.array([0, 3, 250, 500, 999])
    change = log_snr(shifted, t) - log_snr(plain, t)
    np.testing.assert_allclose(change, 2 * math.log(64 / 256), rtol=1e-6)


def test_shift_of_flow_moves_times_as_in_stable_diffusion_3():
    process = diffusion.RectifiedFlow(num_timesteps=1, shift=3.0)
    u = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(process.sampling_times(4), 3 * u / (1 + 2 * u))
    drawn = [
        diffusion.RectifiedFlow(shift=s, times=kind).draw_times(keys(500)) / 1000
        for kind in ("uniform", "logit_normal")
        for s in (1.0, 3.0)
    ]
    for plain, shifted in (drawn[:2], drawn[2:]):
        np.testing.assert_allclose(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-5)
    # The same change of log SNR as a resolution shift.
    change = log_snr(process, 3 * u[1:] / (1 + 2 * u[1:])) - log_snr(process, u[1:])
    np.testing.assert_allclose(change, -2 * math.log(3), rtol=1e-9)


@each_process
def test_levels_fall_and_rise(process):
    ends = process.grid(100)
    assert np.all(np.diff(ends.signal) > 0) and np.all(np.diff(ends.noise) < 0)
    assert (ends.signal[-1], ends.noise[-1]) == (1.0, 0.0)
    if process.variance_preserving:
        np.testing.assert_allclose(ends.signal**2 + ends.noise**2, 1.0, rtol=1e-12)
    zero_snr = getattr(process, "zero_terminal_snr", True)
    assert (ends.signal[0] == 0.0) == zero_snr
    assert (process.levels(jnp.asarray(ends.times[:1]), jnp.zeros((1,)))[0] == 0.0) == zero_snr


@each_process
def test_traced_levels_are_those_of_the_host(process):
    times = process.sampling_times(50)
    like = jnp.zeros((50, 2, 3))
    traced = jax.jit(process.levels)(jnp.asarray(times), like)
    for level, expected in zip(traced, process.curve(times, np)):
        assert level.shape == (50, 1, 1) and level.dtype == jnp.float32
        np.testing.assert_allclose(level[:, 0, 0], expected, rtol=3e-5, atol=1e-7)


def test_levels_of_a_time_a_frame():
    process = diffusion.Linear()
    t = jnp.array([[0, 500], [999, 0]])
    signal, _ = process.levels(t, jnp.zeros((2, 2, 3, 3, 4)))
    assert signal.shape == (2, 2, 1, 1, 1)
    np.testing.assert_allclose(signal[..., 0, 0, 0], process.table[0][t], rtol=1e-6)


@each_process
def test_a_time_depends_on_its_key_only(process):
    times = process.draw_times(keys(2000))
    np.testing.assert_array_equal(process.draw_times(keys(2000)[7:9]), times[7:9])
    if process.discrete:
        assert times.dtype == jnp.int32 and times.min() >= 0 and times.max() == 999
    else:
        assert times.dtype == jnp.float32 and times.min() > 0 and times.max() <= 1000
    even = process.even_times(10)
    assert even.dtype == times.dtype
    np.testing.assert_allclose(even, np.arange(50, 1000, 100))


def test_laws_of_the_drawn_times():
    for process in (diffusion.Linear(), diffusion.ContinuousCosine()):
        times = np.asarray(process.draw_times(keys(20000))) / 1000
        np.testing.assert_allclose(np.quantile(times, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    process = diffusion.RectifiedFlow(mean=-0.5, std=0.7)
    u = np.asarray(process.draw_times(keys(20000)), np.float64) / 1000
    logit = np.log(u / (1 - u))
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.5, 0.7], atol=0.02)
    # Normal, not only of these moments: the share within one standard deviation.
    np.testing.assert_allclose(np.mean(np.abs(logit + 0.5) < 0.7), 0.6827, atol=0.015)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 1000])
def test_sampling_starts_at_the_last_timestep(num_steps):
    times = diffusion.Linear().sampling_times(num_steps)
    assert len(times) == num_steps and times[0] == 999 and times[-1] >= 0
    assert np.all(np.diff(times) < 0)
    flow = diffusion.RectifiedFlow().sampling_times(num_steps)
    assert len(flow) == num_steps and flow[0] == 1000 and flow[-1] > 0


def test_trailing_times_of_fifty():
    np.testing.assert_array_equal(
        diffusion.Linear().sampling_times(50), np.arange(999, 0, -20, dtype=np.int32)
    )


@pytest.mark.parametrize("process", PROCESSES[:5], ids=str)
def test_posterior_by_bayes(process):
    """Mean and variance of x_next given x_t and x_0 from their joint normal law."""
    grid = process.grid(20)
    steps = diffusion.posterior(grid)
    signal, noise = grid.signal[:-1], grid.noise[:-1]
    signal_next, noise_next = grid.signal[1:], grid.noise[1:]
    # x_t = (signal / signal_next) x_next + more noise, so that given x_0 their covariance is this.
    covariance = signal / signal_next * noise_next**2
    gain = covariance / noise**2
    np.testing.assert_allclose(steps.of_x, gain, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(steps.of_x0, signal_next - gain * signal, rtol=1e-9)
    variance = noise_next**2 - gain * covariance
    np.testing.assert_allclose(np.exp(steps.log_small[:-1]), variance[:-1], rtol=1e-9)
    assert variance[-1] == 0.0 and steps.log_small[-1] == steps.log_small[-2]
    np.testing.assert_allclose(np.exp(steps.log_large), 1 - (signal / signal_next) ** 2, rtol=1e-12)


def test_built_by_name():
    values = {"process": {"name": "cosine", "shift": 2}, "target": {"name": "eps_sigma"}}
    with pytest.raises(UserError, match=r"eps_sigma does not tell x_0 .* zero_terminal_snr=False"):
        config.build(diffusion.Diffusion, values)
    values["process"]["zero_terminal_snr"] = False
    built = config.build(diffusion.Diffusion, values | {"weight": {"name": "p2", "k": 2}})
    assert built == diffusion.Diffusion(
        process=diffusion.Cosine(shift=2.0, zero_terminal_snr=False),
        target=diffusion.EpsSigma(),
        weight=diffusion.P2(k=2.0),
    )
    assert config.build(diffusion.Diffusion, config.to_dict(built)) == built
    sampler = {"name": "ddim", "eta": 0.5, "threshold": {"percentile": 0.99}}
    assert config.build(diffusion.Sampler, sampler) == diffusion.Ddim(
        eta=0.5, threshold=diffusion.DynamicThreshold(0.99)
    )
    assert config.build(diffusion.Scale, {"name": "interval", "high": 0.7}).high == 0.7


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: diffusion.Linear().grid(1001), "linear takes 1 to 1000 steps, got 1001"),
        (lambda: diffusion.Linear().grid(0), "1 to 1000 steps, got 0"),
        (lambda: diffusion.RectifiedFlow().grid(0), "at least 1 steps, got 0"),
        (lambda: diffusion.Linear(num_timesteps=1), "at least 2 timesteps, got num_timesteps=1"),
        (lambda: diffusion.Cosine(shift=0.0), "cosine has shift=0.0: it must be positive"),
        (lambda: diffusion.RectifiedFlow(std=-1.0), "rectified_flow has std=-1.0"),
        (lambda: diffusion.Linear(beta_end=1.0), "0 < beta_start <= beta_end < 1"),
        (lambda: diffusion.ContinuousCosine(logsnr_max=-20.0), "below logsnr_max=-20.0"),
    ],
)
def test_bad_values_are_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
