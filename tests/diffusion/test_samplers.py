"""Samplers on Gaussian data, where the ideal denoiser and the exact answers are known."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax.diffusion import (
    X0,
    ContinuousCosine,
    Cosine,
    Ddim,
    Ddpm,
    Diffusion,
    DpmSolver,
    DynamicThreshold,
    Eps,
    EpsSigma,
    Euler,
    Heun,
    Linear,
    RectifiedFlow,
    V,
    Velocity,
    posterior,
)
from walt_jax.diffusion.schedules import Continuous
from walt_jax.errors import UserError

PLAIN = Linear(zero_terminal_snr=False)
MEAN = np.array([1.5, -0.5])
AXES = np.array([[0.8, -0.6], [0.6, 0.8]])  # of the covariance, in columns
VARIANCE = np.array([0.25, 2.0])
COVARIANCE = AXES * VARIANCE @ AXES.T


def ideal(what):
    """The network that knows the law of the data."""

    def predict(x, t, estimate):
        signal, noise = what.process.levels(t, x)
        gain = signal * VARIANCE / (signal**2 * VARIANCE + noise**2)
        x0 = MEAN + ((x - signal * MEAN) @ AXES * gain) @ AXES.T
        return what.target.of(x0, (x - signal * x0) / noise, signal, noise)

    return predict


def law(sampler, what):
    """Mean and covariance of the samples of a deterministic sampler, exactly: all steps are affine,
    so three points tell them."""
    noise = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    run = jax.jit(lambda noise: sampler(ideal(what), noise, None, what))
    out = np.asarray(run(noise), np.float64)
    matrix = (out[1:] - out[0]).T
    return out[0], matrix @ matrix.T


def exact(what, signal=1.0, noise=0.0):
    """Mean and covariance where the probability-flow ODE has the levels given, started from
    standard normal noise at the last time: those of the data, if no signal is left there."""
    grid = what.process.grid(1)
    last = grid.signal[0] ** 2 * VARIANCE + grid.noise[0] ** 2
    ratio = np.sqrt((signal**2 * VARIANCE + noise**2) / last)
    mean = signal * MEAN - (grid.signal[0] * MEAN @ AXES * ratio) @ AXES.T
    return mean, AXES * ratio**2 @ AXES.T


def error(got, expected):
    return max(np.abs(a - b).max() for a, b in zip(got, expected))


def test_exact_law_is_that_of_the_data_at_zero_snr():
    mean, covariance = exact(Diffusion(process=Cosine()))
    np.testing.assert_allclose(mean, MEAN)
    np.testing.assert_allclose(covariance, COVARIANCE)
    plain = exact(Diffusion(process=PLAIN))
    assert 1e-3 < error(plain, (MEAN, COVARIANCE)) < 2e-2  # what leaving signal there costs


@pytest.mark.parametrize(
    "what, make, order",
    [
        (what, make, order)
        for what in (
            Diffusion(process=Linear()),
            Diffusion(process=PLAIN, target=Eps()),
            Diffusion(process=ContinuousCosine(), target=X0()),
            Diffusion(process=RectifiedFlow(), target=Velocity()),
        )
        for make, order in (
            (Ddim if what.process.variance_preserving else Euler, 1),
            (Heun, 2),
            (DpmSolver, 2),
        )
    ],
    ids=lambda p: p.process.name if isinstance(p, Diffusion) else getattr(p, "name", None),
)
def test_samplers_reach_mean_and_covariance(what, make, order):
    """The error falls as steps^-order. The leap from the last time visited to clean data, and the
    log SNR's infinite ends for DPM-Solver++, cost a logarithm of it."""
    few, many = (error(law(make(num_steps=n), what), exact(what)) for n in (20, 200))
    measured = math.log10(few / many)
    assert {1: 0.9, 2: 1.55}[order] < measured < order + 0.15
    assert many < {1: 0.03, 2: 1e-3}[order]


@dataclasses.dataclass(frozen=True)
class EvenLogSnr(Continuous):
    """Log SNR falls evenly from 6 to -6: the grid that the order of DPM-Solver++ is derived for."""

    name: ClassVar[str] = "even_log_snr"
    num_timesteps: int = 1

    def curve(self, t, xp):
        half = 3.0 - 6.0 * t
        return 1 / xp.sqrt(1 + xp.exp(-2 * half)), 1 / xp.sqrt(1 + xp.exp(2 * half))


@pytest.mark.parametrize("make, order", [(Ddim, 1), (Heun, 2), (DpmSolver, 2)])
def test_order_of_convergence_before_the_last_leap(make, order):
    """Against the ODE up to the last time visited, from where the leap takes the mean of x_0."""
    what = Diffusion(process=EvenLogSnr())

    def left(num_steps):
        grid = what.process.grid(num_steps)
        signal, noise = grid.signal[-2], grid.noise[-2]
        mean, covariance = exact(what, signal, noise)
        gain = AXES * (signal * VARIANCE / (signal**2 * VARIANCE + noise**2)) @ AXES.T
        expected = MEAN + gain @ (mean - signal * MEAN), gain @ covariance @ gain.T
        return error(law(make(num_steps=num_steps), what), expected)

    measured = math.log2(left(40) / left(80))
    assert abs(measured - order) < 0.15


def test_heun_with_a_constant_signal_is_that_of_edm():
    """On x = x_0 + sigma eps: d = (x - D) / sigma, and the mean of d at both ends of a step."""

    @dataclasses.dataclass(frozen=True)
    class VarianceExploding(Continuous):
        num_timesteps: int = 1

        def curve(self, t, xp):
            return 0.0 * t + 1.0, 5.0 * t

    def denoised(x, sigma):
        return 1.0 + 0.25 / (0.25 + sigma**2) * (x - 1.0)

    x = noise = 1.7
    for sigma, following in ((5.0, 3.75), (3.75, 2.5), (2.5, 1.25), (1.25, 0.0)):
        slope = (x - denoised(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following:
            slope = 0.5 * (slope + (ahead - denoised(ahead, following)) / following)
            ahead = x + (following - sigma) * slope
        x = ahead
    what = Diffusion(process=VarianceExploding(), target=X0())
    predict = lambda x, t, estimate: denoised(x, 5.0 * t[:, None])  # noqa: E731
    out = Heun(num_steps=4)(predict, jnp.full((1, 1), noise), None, what)
    np.testing.assert_allclose(out, [[x]], rtol=1e-5)


def test_euler_is_deterministic_ddim():
    for process in (Linear(), ContinuousCosine(shift=2.0)):
        what = Diffusion(process=process)
        euler, ddim = (law(make(num_steps=7), what) for make in (Euler, Ddim))
        assert error(euler, ddim) < 1e-5


def test_one_step_of_flow_is_the_velocity():
    what = Diffusion(process=RectifiedFlow(shift=3.0), target=Velocity())
    noise = jax.random.normal(jax.random.key(0), (3, 4))
    out = Euler(num_steps=1)(lambda x, t, _: 2 * x + t[:, None] / 1000, noise, None, what)
    np.testing.assert_allclose(out, noise - (2 * noise + 1), rtol=1e-5)


def run_one_axis(sampler, what, predict, count=400_000):
    """Mean and variance over one sample of `count` independent values."""
    noise = jax.random.normal(jax.random.key(1), (1, count))
    x = jax.jit(lambda n, k: sampler(predict, n, k, what))(noise, jax.random.key(2)[None])
    return float(x.mean()), float(x.var())


def ideal_one_axis(what, mean, variance, fraction=None):
    def predict(x, t, estimate):
        signal, noise = what.process.levels(t, x)
        gain = signal * variance / (signal**2 * variance + noise**2)
        x0 = mean + gain * (x - signal * mean)
        value = what.target.of(x0, (x - signal * x0) / noise, signal, noise)
        if fraction is None:
            return value
        return jnp.concatenate([value, jnp.broadcast_to(2 * fraction(t) - 1, x.shape)], axis=-1)

    return predict


@pytest.mark.parametrize("process", [Linear(), ContinuousCosine()], ids=lambda p: p.name)
def test_ddpm_reaches_mean_and_variance_in_first_order(process):
    mean, variance, what = 1.5, 0.25, Diffusion(process=process)
    predict = ideal_one_axis(what, mean, variance)
    few, many = (
        run_one_axis(Ddpm(num_steps=n), what, predict, count)
        for n, count in ((10, 200_000), (80, 200_000))
    )
    np.testing.assert_allclose(many[0], mean, atol=0.005)
    assert 0 < variance - many[1] < 0.15 * variance  # the small variance is too small
    measured = math.log((variance - few[1]) / (variance - many[1])) / math.log(8)
    assert 0.6 < measured < 1.2


def test_ddpm_with_the_large_variance_is_exact_for_unit_variance():
    """There a reverse step has beta; only the last step, to the mean, loses what it loses."""
    what = Diffusion(process=Linear())
    predict = ideal_one_axis(what, 0.5, 1.0)
    got = run_one_axis(Ddpm(num_steps=5, variance="large"), what, predict)
    last = what.process.grid(5).noise[-2] ** 2
    np.testing.assert_allclose(got, (0.5, 1 - last), atol=0.006)
    small = run_one_axis(Ddpm(num_steps=5), what, predict)
    assert small[1] < 1 - last - 0.1


def test_ddpm_with_the_ideal_learnt_variance_is_exact():
    """In 6 steps, again but for the last one."""
    mean, variance, steps = 1.5, 0.25, 6
    what = Diffusion(process=PLAIN, target=EpsSigma())
    grid = PLAIN.grid(steps)
    step = posterior(grid)
    spread = variance * grid.noise**2 / (grid.signal**2 * variance + grid.noise**2)
    reverse = np.exp(step.log_small) + step.of_x0**2 * spread[:-1]
    fraction = (np.log(reverse) - step.log_small) / (step.log_large - step.log_small)
    table = np.zeros(1000, np.float32)
    table[grid.times] = fraction
    predict = ideal_one_axis(what, mean, variance, lambda t: jnp.asarray(table)[t][:, None])

    got = run_one_axis(Ddpm(num_steps=steps, variance="learned"), what, predict)
    np.testing.assert_allclose(got, (mean, variance - spread[-2]), atol=0.01)
    small = run_one_axis(Ddpm(num_steps=steps), what, predict)
    assert small[1] < variance - spread[-2] - 0.02


@pytest.mark.parametrize("what", [Diffusion(), Diffusion(process=PLAIN, target=Eps())], ids=str)
def test_ddim_with_eta_1_is_ddpm(what):
    noise = jax.random.normal(jax.random.key(0), (4, 2))
    keys = jax.random.split(jax.random.key(3), 4)
    ddim, ddpm, between, deterministic = (
        s(ideal(what), noise, keys, what)
        for s in (
            Ddim(num_steps=9, eta=1.0),
            Ddpm(num_steps=9),
            Ddim(num_steps=9, eta=0.4),
            Ddim(num_steps=9),
        )
    )
    np.testing.assert_allclose(ddim, ddpm, atol=3e-5)
    assert np.abs(between - ddpm).min() > 1e-4 and np.abs(between - deterministic).min() > 1e-4


@pytest.mark.parametrize(
    "sampler",
    [
        Ddpm(num_steps=5, variance="learned"),
        Ddim(num_steps=5, eta=0.7),
        Heun(num_steps=5),
        DpmSolver(num_steps=5),
    ],
    ids=lambda s: s.name,
)
def test_a_sample_depends_on_its_noise_and_key_only(sampler):
    what = Diffusion(process=PLAIN, target=EpsSigma())
    noise = jax.random.normal(jax.random.key(0), (4, 3, 2))
    keys = jax.random.split(jax.random.key(1), 4)

    def predict(x, t, estimate):
        return jnp.concatenate([jnp.tanh(x + estimate), jnp.sin(x)], axis=-1)

    run = jax.jit(lambda noise, keys: sampler(predict, noise, keys, what))
    whole = run(noise, keys)
    assert whole.shape == noise.shape and whole.dtype == jnp.float32
    np.testing.assert_allclose(run(noise[2:3], keys[2:3]), whole[2:3], rtol=1e-5)
    same_noise = run(jnp.stack([noise[0]] * 4), keys)
    stochastic = isinstance(sampler, Ddpm | Ddim)
    assert (np.abs(same_noise[0] - same_noise[1]).max() > 1e-3) == stochastic


@pytest.mark.parametrize("make, calls", [(Ddpm, 6), (Ddim, 6), (Euler, 6), (Heun, 11)])
def test_the_estimate_is_the_last_prediction(make, calls):
    """A network that adds 1 to it counts its evaluations; x ends at the last x_0."""
    what = Diffusion(target=X0())
    noise, keys = jnp.zeros((2, 3)), jax.random.split(jax.random.key(0), 2)
    out = make(num_steps=6)(lambda x, t, estimate: estimate + 1.0, noise, keys, what)
    np.testing.assert_allclose(out, calls, rtol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "process"), [(Ddim, Linear()), (DpmSolver, Linear()), (Heun, RectifiedFlow())]
)
def test_a_start_is_noised_to_its_time_and_the_later_steps_taken(sampler, process):
    """An exact network, of data at one point, brings any start there; the first input is noised."""
    target = V() if process.variance_preserving else Velocity()
    what, seen = Diffusion(process=process, target=target), []
    noise, start = jnp.ones((2, 3)), jnp.full((2, 3), 5.0)

    def predict(x, t, estimate):
        jax.debug.callback(lambda *now: seen.append(now), x, t, ordered=True)
        signal, level = process.levels(t, x)
        x0 = jnp.full_like(x, 2.0)
        return what.target.of(x0, (x - signal * x0) / level, signal, level)

    out = sampler(num_steps=10)(predict, noise, None, what, start, 0.4)
    np.testing.assert_allclose(out, 2.0, atol=1e-4)
    times = [float(t[0]) for _, t in seen]
    grid = process.grid(10)
    assert times[0] == max(t for t in grid.times if t <= 0.4 * process.num_timesteps)
    assert sorted(set(times)) == sorted(grid.times[-4:])
    np.testing.assert_allclose(
        seen[0][0], what.add_noise(start, noise, jnp.asarray(seen[0][1])), rtol=1e-5
    )


def test_network_is_traced_once_and_sees_the_times():
    seen = []

    def predict(x, t, estimate):
        assert t.shape == (2,) and t.dtype == jnp.int32
        seen.append(0)
        jax.debug.callback(lambda t: seen.append(int(t[0])), t, ordered=True)
        return x

    Heun(num_steps=4)(predict, jnp.zeros((2, 3)), None, Diffusion())
    jax.effects_barrier()
    assert seen[0] == 0 and seen[1:] == [999, 749, 749, 499, 499, 249, 249]


def test_thresholding_holds_every_prediction():
    """x_0 of 3 is brought to 1, and the noise is what remains of x."""
    what = Diffusion(process=PLAIN)
    signal, noise_level = what.process.table

    def predict(x, t, estimate):
        a, s = what.process.levels(t, x)
        return V().of(jnp.full_like(x, 3.0), (x - a * 3.0) / s, a, s)

    noise = jax.random.normal(jax.random.key(0), (2, 5))
    sampler = Ddim(num_steps=2, threshold=DynamicThreshold())
    np.testing.assert_allclose(sampler(predict, noise, None, what), 1.0, rtol=1e-5)
    # After one of the two steps: signal + noise eps.
    states = []

    def watch(x, t, estimate):
        jax.debug.callback(lambda x, e: states.append((x, e)), x, estimate, ordered=True)
        return predict(x, t, estimate)

    sampler(watch, noise, None, what)
    jax.effects_barrier()
    eps = (np.asarray(noise) - signal[999]) / noise_level[999]
    np.testing.assert_allclose(states[1][0], signal[499] + noise_level[499] * eps, atol=1e-5)
    np.testing.assert_allclose(states[1][1], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "sampler, what, sentence",
    [
        (
            Ddpm(variance="learned"),
            Diffusion(),
            "variance=learned needs a network that learns it, but the target is v",
        ),
        (
            Ddim(),
            Diffusion(process=RectifiedFlow(), target=Velocity()),
            "ddim is for processes that preserve the variance, not for rectified_flow: choose",
        ),
        (Ddpm(), Diffusion(process=RectifiedFlow()), "ddpm is for processes that preserve"),
        (Heun(num_steps=1001), Diffusion(), "linear takes 1 to 1000 steps, got 1001"),
        (Euler(num_steps=0), Diffusion(process=RectifiedFlow()), "at least 1 steps, got 0"),
    ],
    ids=lambda p: getattr(p, "name", ""),
)
def test_what_is_not_admitted_is_one_sentence(sampler, what, sentence):
    with pytest.raises(UserError, match=sentence):
        sampler(lambda x, t, estimate: x, jnp.zeros((1, 2)), None, what)
    with pytest.raises(UserError, match="eta from 0 to 1, got 2"):
        Ddim(eta=2.0)
