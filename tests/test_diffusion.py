"""Schedules, targets, guidance and DDIM against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax import diffusion
from walt_jax.errors import UserError


def test_linear_schedule_has_the_published_constants():
    plain = diffusion.linear_schedule(zero_terminal_snr=False)
    assert plain.num_timesteps == 1000
    np.testing.assert_allclose(plain.signal[-1], 0.00635, atol=5e-6)
    np.testing.assert_allclose(plain.signal[0] ** 2, 1 - 1e-4, rtol=1e-6)
    zero = diffusion.linear_schedule()
    assert zero.signal[-1] == 0.0 and zero.noise[-1] == 1.0
    np.testing.assert_allclose(zero.signal[0], plain.signal[0], rtol=1e-6)
    assert np.all(np.diff(zero.signal) < 0)
    np.testing.assert_allclose(zero.signal**2 + zero.noise**2, 1.0, atol=1e-6)


def test_v_gives_back_signal_and_noise():
    schedule = diffusion.linear_schedule()
    x0, eps = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    t = jnp.array([0, 10, 500, 999])
    x = diffusion.add_noise(schedule, x0, eps, t)
    v = diffusion.v_target(schedule, x0, eps, t)
    np.testing.assert_allclose(diffusion.v_to_x0(schedule, x, v, t), x0, atol=2e-5)
    np.testing.assert_allclose(diffusion.v_to_eps(schedule, x, v, t), eps, atol=2e-5)
    np.testing.assert_allclose(v[3], -x0[3], atol=1e-6)  # at zero SNR v is -x_0


@pytest.mark.parametrize("num_steps", [1, 7, 50, 1000])
def test_trailing_timesteps_start_at_the_last_one(num_steps):
    steps = diffusion.trailing_timesteps(1000, num_steps)
    assert len(steps) == num_steps and steps[0] == 999 and steps[-1] >= 0
    assert np.all(np.diff(steps) < 0)


def test_trailing_timesteps_of_fifty():
    np.testing.assert_array_equal(
        diffusion.trailing_timesteps(1000, 50), np.arange(999, 0, -20, dtype=np.int32)
    )


def test_too_many_steps_is_an_error():
    with pytest.raises(UserError, match="1 to 1000 steps"):
        diffusion.trailing_timesteps(1000, 1001)


def test_ddim_reaches_gaussian_data_exactly():
    """For x_0 ~ N(mean, std^2) the ideal v is known; DDIM must carry noise to that law."""
    schedule, mean, std = diffusion.linear_schedule(), 1.5, 0.5
    signal, noise = jnp.asarray(schedule.signal), jnp.asarray(schedule.noise)

    def ideal_v(x, t):
        a, s = signal[t][:, None], noise[t][:, None]
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        eps = (x - a * x0) / s
        return a * eps - s * x0

    x = diffusion.ddim(ideal_v, jax.random.normal(jax.random.key(1), (20000, 1)), schedule, 200)
    np.testing.assert_allclose(float(x.mean()), mean, atol=0.02)
    np.testing.assert_allclose(float(x.std()), std, atol=0.02)


def test_guidance_extrapolates_from_the_null_class():
    def denoise(x, t, label):
        assert x.shape[0] == t.shape[0] == label.shape[0]
        return x + label[:, None].astype(jnp.float32)

    x, t, label = jnp.zeros((2, 1)), jnp.zeros((2,), int), jnp.array([1, 2])
    np.testing.assert_allclose(diffusion.guide(denoise, 5, 1.0)(x, t, label)[:, 0], [1, 2])
    np.testing.assert_allclose(
        diffusion.guide(denoise, 5, 3.0)(x, t, label)[:, 0], [5 + 3 * -4, 5 + 3 * -3]
    )
