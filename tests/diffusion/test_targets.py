"""Targets and losses: round trips, weights against their papers, the variational bound."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax import diffusion
from walt_jax.diffusion import (
    P2,
    X0,
    Diffusion,
    Eps,
    EpsSigma,
    Linear,
    MinSnr,
    RectifiedFlow,
    Uniform,
    V,
    Velocity,
)
from walt_jax.errors import UserError

PLAIN = Linear(zero_terminal_snr=False)
TARGETS = [V(), Eps(), X0(), Velocity()]
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)


def data(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, *shape))


@each_target
@pytest.mark.parametrize("process", [PLAIN, Linear(), RectifiedFlow()], ids=str)
def test_targets_give_back_data_and_noise(process, target):
    x0, eps = data(4, 3, 5)
    t = jnp.array([1, 10, 500, 998]).astype(jnp.int32 if process.discrete else jnp.float32)
    if target == Eps():
        process = PLAIN if process == Linear() else process
    signal, noise = process.levels(t, x0)
    x_t = signal * x0 + noise * eps
    got = target.solve(x_t, target.of(x0, eps, signal, noise), signal, noise)
    # x_0 from eps and eps from x_0 lose digits where little signal or noise is left.
    np.testing.assert_allclose(got[0], x0, atol=2e-4 if target in (Eps(), V()) else 2e-5)
    np.testing.assert_allclose(got[1], eps, atol=1e-3 if target == X0() else 2e-5)


def test_targets_are_those_of_the_papers():
    signal, noise = 0.6, 0.8
    x0, eps = jnp.array([2.0]), jnp.array([3.0])
    values = [float(t.of(x0, eps, signal, noise)[0]) for t in TARGETS]
    np.testing.assert_allclose(values, [0.6 * 3 - 0.8 * 2, 3.0, 2.0, 1.0], rtol=1e-6)


def test_zero_snr():
    """At the last timestep v is -x_0 and gives it back; eps cannot be trained there."""
    x0, eps = data(1, 7)
    what, t = Diffusion(), jnp.array([999])
    x_t = what.add_noise(x0, eps, t)
    np.testing.assert_array_equal(x_t, eps)
    prediction = what.read(-x0, x_t, t)
    np.testing.assert_allclose(prediction.x0, x0, rtol=1e-6)
    np.testing.assert_allclose(prediction.eps, eps, rtol=1e-6)
    with pytest.raises(
        UserError, match=r"target eps does not tell x_0 .* process linear ends there"
    ):
        Diffusion(target=Eps())
    with pytest.raises(UserError, match="process rectified_flow ends there"):
        Diffusion(process=RectifiedFlow(), target=Eps())


def test_a_learnt_variance_is_of_timesteps():
    with pytest.raises(UserError, match="the continuous process continuous_cosine does not have"):
        Diffusion(
            process=diffusion.ContinuousCosine(zero_terminal_snr=False), target=diffusion.EpsSigma()
        )


def test_min_snr_against_its_paper():
    signal, noise = PLAIN.levels(jnp.arange(1000), jnp.zeros((1000,)))
    snr = np.asarray((signal / noise) ** 2, np.float64)
    capped = np.minimum(snr, 5.0)
    # Section 3.4: for x_0, eps and v. For eps + learnt sigma as for eps.
    expected = {
        X0(): capped,
        Eps(): capped / snr,
        V(): capped / (snr + 1),
        EpsSigma(): capped / snr,
    }
    for target, weight in expected.items():
        np.testing.assert_allclose(MinSnr()(target, signal, noise), weight, rtol=2e-4)
    assert MinSnr()(V(), jnp.zeros(()), jnp.ones(())) == 0.0


def test_p2_against_its_paper():
    """lambda' = lambda / (k + SNR)^gamma, where lambda is 1 for the error of eps."""
    signal, noise = PLAIN.levels(jnp.arange(1000), jnp.zeros((1000,)))
    snr = np.asarray((signal / noise) ** 2, np.float64)
    weight = P2(k=2.0, gamma=0.5)
    expected = 1 / (2.0 + snr) ** 0.5
    np.testing.assert_allclose(weight(Eps(), signal, noise), expected, rtol=2e-4)
    # The error of eps is signal that of v, and signal / noise that of x_0.
    np.testing.assert_allclose(weight(V(), signal, noise), expected * signal**2, rtol=2e-4)
    np.testing.assert_allclose(weight(X0(), signal, noise), expected * snr, rtol=2e-4)


@pytest.mark.parametrize("weight", [MinSnr(), MinSnr(gamma=0.3), P2(), P2(gamma=0.5)], ids=str)
@pytest.mark.parametrize("process", [PLAIN, RectifiedFlow()], ids=lambda p: p.name)
def test_weights_of_the_snr_do_not_depend_on_the_target(process, weight):
    """One denoiser, read as any target, has one loss."""
    x0, eps = data(6, 40)
    t = jnp.linspace(100, 950, 6).astype(jnp.int32 if process.discrete else jnp.float32)
    signal, noise = process.levels(t, x0)
    guess = x0 + 0.3 * data(6, 40, seed=1)[0]
    guess_eps = (signal * x0 + noise * eps - signal * guess) / noise
    losses = []
    for target in TARGETS:
        if target == Eps() and not process.discrete:
            continue  # not for training, which draws t = 1 as well
        what = Diffusion(process=process, target=target, weight=weight)
        losses.append(what.losses(target.of(guess, guess_eps, signal, noise), x0, eps, t))
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=1e-3)


@each_target
def test_uniform_is_the_mean_squared_error(target):
    x0, eps = data(3, 4, 5)
    t = jnp.array([1, 400, 900])
    what = Diffusion(process=PLAIN, target=target, weight=Uniform())
    truth = target.of(x0, eps, *PLAIN.levels(t, x0))
    error = data(3, 4, 5, seed=2)[0]
    loss = what.losses((truth + error).astype(jnp.bfloat16).astype(jnp.float32), x0, eps, t)
    np.testing.assert_allclose(loss, jnp.square(error).mean((1, 2)), rtol=0.05)
    np.testing.assert_allclose(
        what.losses(truth + error, x0, eps, t), jnp.square(error).mean((1, 2)), rtol=1e-4
    )


def test_only_the_mask_counts():
    x0, eps = data(3, 4, 5)
    t = jnp.array([3, 500, 999])
    what = Diffusion()
    out = V().of(x0, eps, *what.process.levels(t, x0)) + 2.0
    out = out.at[:, 2:].add(100.0)
    mask = jnp.array([True, True, False, False]).reshape(1, 4, 1)
    np.testing.assert_allclose(what.losses(out, x0, eps, t, mask), 4.0, rtol=1e-5)
    nothing = what.losses(out, x0, eps, t, jnp.zeros((3, 1, 1), bool))
    np.testing.assert_array_equal(nothing, 0.0)


def learnt(num_timesteps=1000):
    scale = 1000 / num_timesteps
    process = Linear(
        num_timesteps=num_timesteps,
        beta_start=1e-4 * scale,
        beta_end=0.02 * scale,
        zero_terminal_snr=False,
    )
    return Diffusion(process=process, target=EpsSigma())


@pytest.mark.parametrize("t", [1, 2, 300, 999])
def test_bound_is_the_divergence_of_gaussians(t):
    """Against quadrature of q log(q / p), with the posterior from the betas alone."""
    what = learnt()
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    x0, eps, eps_hat, v = 0.7, -0.4, -0.1, 0.3
    x_t = math.sqrt(bar[t]) * x0 + math.sqrt(1 - bar[t]) * eps

    def mean(x0):  # equation 7 of DDPM
        return (
            math.sqrt(bar[t - 1]) * betas[t] * x0 + math.sqrt(1 - betas[t]) * (1 - bar[t - 1]) * x_t
        ) / (1 - bar[t])

    small = betas[t] * (1 - bar[t - 1]) / (1 - bar[t])
    guess = (x_t - math.sqrt(1 - bar[t]) * eps_hat) / math.sqrt(bar[t])
    share = (v + 1) / 2
    variance = math.exp(share * math.log(betas[t]) + (1 - share) * math.log(small))

    width = 12 * math.sqrt(small)
    x = np.linspace(mean(x0) - width, mean(x0) + width, 20001)

    def log_normal(x, mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))

    q, p = log_normal(x, mean(x0), small), log_normal(x, mean(guess), variance)
    expected = np.trapezoid(np.exp(q) * (q - p), x) / math.log(2)
    got = diffusion.variational_bound(
        what,
        jnp.array([[eps_hat, v]], jnp.float32),
        jnp.array([[x0]], jnp.float32),
        jnp.array([[eps]], jnp.float32),
        jnp.array([t]),
    )
    np.testing.assert_allclose(got[0, 0], expected, rtol=2e-3)


def test_bound_at_the_first_timestep_is_a_density():
    """Improved diffusion's probability of a pixel's bin is the density times the bin's width."""
    what = learnt()
    x0, eps = 0.4, 0.9
    beta = 1e-4
    x_t = math.sqrt(1 - beta) * x0 + math.sqrt(beta) * eps
    eps_hat, v = 0.2, 1.0  # the largest variance, beta
    mean = (x_t - math.sqrt(beta) * eps_hat) / math.sqrt(1 - beta)
    half = 1e-4

    def below(x):
        return 0.5 * (1 + math.erf((x - mean) / math.sqrt(2 * beta)))

    probability = below(x0 + half) - below(x0 - half)
    got = diffusion.variational_bound(
        what,
        jnp.array([[eps_hat, v]], jnp.float32),
        jnp.array([[x0]], jnp.float32),
        jnp.array([[eps]], jnp.float32),
        jnp.array([0]),
    )
    np.testing.assert_allclose(got[0, 0], -math.log2(probability / (2 * half)), rtol=2e-3)


def test_bound_of_the_ideal_network_is_the_entropy_of_the_data():
    """The sum of all terms is then -log p(x_0), which no other mean or variance undercuts."""
    what, variance, count = learnt(50), 0.5, 20000
    process = what.process
    signal, noise = process.table
    steps = [a[::-1] for a in diffusion.posterior(process.grid(50))]
    of_x0, _, log_small, log_large = steps
    # Of x_0 given x_t, and so of x_(t-1) given x_t.
    spread = variance * noise**2 / (signal**2 * variance + noise**2)
    reverse = np.append(0.0, np.exp(log_small[1:])) + of_x0**2 * spread
    fraction = (np.log(reverse) - log_small) / (log_large - log_small)
    assert np.all((fraction > 0) & (fraction < 1))

    t = jnp.arange(50)
    x0, eps = data(50, count)
    x0 = x0 * math.sqrt(variance)

    def bound(wrong_mean, wrong_fraction):
        x_t = what.add_noise(x0, eps, t)
        a, s = process.levels(t, x0)
        guess = x_t * a * variance / (a**2 * variance + s**2) + wrong_mean
        v = jnp.broadcast_to((2 * fraction - 1)[:, None] + wrong_fraction, x0.shape)
        out = jnp.stack([(x_t - a * guess) / s, v], axis=-1).reshape(50, -1, 2)
        terms = diffusion.variational_bound(what, out, x0[..., None], eps[..., None], t)
        return float(terms.mean((1, 2)).sum())

    prior = 0.5 * (signal[-1] ** 2 * (variance - 1) - math.log1p(signal[-1] ** 2 * (variance - 1)))
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    ideal = bound(0.0, 0.0)
    np.testing.assert_allclose(ideal + prior / math.log(2), entropy / math.log(2), atol=0.02)
    assert bound(0.02, 0.0) > ideal + 0.01
    assert min(bound(0.0, 0.3), bound(0.0, -0.3)) > ideal + 0.01


def test_hybrid_loss_and_its_gradients():
    """L_simple + 0.001 T L_t in bits: the mean learns by the first, the variance by the other."""
    what = learnt()
    x0, eps = data(3, 4, 2)
    t = jnp.array([0, 10, 800])
    out = 0.5 * jax.random.normal(jax.random.key(5), (3, 4, 4))
    simple = Diffusion(process=what.process, target=Eps()).losses(out[..., :2], x0, eps, t)
    bound = diffusion.variational_bound(what, out, x0, eps, t).mean((1, 2))
    np.testing.assert_allclose(what.losses(out, x0, eps, t), simple + bound, rtol=1e-5)

    gradient = jax.grad(lambda out: what.losses(out, x0, eps, t).sum())(out)
    of_simple = jax.grad(lambda out: jnp.square(out[..., :2] - eps).mean((1, 2)).sum())(out)
    np.testing.assert_allclose(gradient[..., :2], of_simple[..., :2], rtol=1e-5)
    of_bound = jax.grad(
        lambda out: diffusion.variational_bound(what, out, x0, eps, t).mean((1, 2)).sum()
    )(out)
    np.testing.assert_array_equal(of_bound[..., :2], 0.0)
    np.testing.assert_allclose(gradient[..., 2:], of_bound[..., 2:], rtol=1e-5)
    assert np.abs(of_bound[..., 2:]).min() > 0
    assert (what.target.channels(4), V().channels(4)) == (8, 4)
