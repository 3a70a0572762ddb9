"""How data becomes noise: x_t = signal x_0 + noise eps, with falling signal and rising noise.

A process has no parameters: it is a frozen dataclass chosen by `name` in a config. Times run from
clean to noise: integers 0 .. num_timesteps - 1 where the process is discrete, floats in
(0, num_timesteps] where it is continuous, so that a network's time embedding sees one scale.
Levels are float64 on the host, where samplers make their coefficients, and float32 when traced.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError


class Grid(NamedTuple):
    """The times that a sampler visits, on the host.

    Attributes:
      times: (N,), falling.
      signal, noise: float64 (N + 1,), the levels at these times and then those of clean data.
    """

    times: np.ndarray
    signal: np.ndarray
    noise: np.ndarray

    def until(self, time: float) -> "Grid":
        """Without the times after `time`.

        Raises:
          UserError: all of them are.
        """
        first = int(np.sum(self.times > time))
        if first == len(self.times):
            raise UserError(
                f"A start at time {time:g} leaves none of the {first} steps, the last of which is "
                f"at {self.times[-1]:g}: raise strength or the number of steps."
            )
        return Grid(self.times[first:], self.signal[first:], self.noise[first:])


class Process(abc.ABC):
    """The interface of all processes."""

    registry: ClassVar[dict[str, type["Process"]]] = {}
    name: ClassVar[str]
    variance_preserving: ClassVar[bool] = True  # signal^2 + noise^2 = 1
    discrete: ClassVar[bool] = False
    num_timesteps: int

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            Process.registry[name] = cls

    @abc.abstractmethod
    def curve(self, t: Any, xp: Any) -> tuple[Any, Any]:
        """Signal and noise at times of any shape; `xp` is numpy or jax.numpy."""

    @abc.abstractmethod
    def draw_times(self, keys: jax.Array) -> jax.Array:
        """A time of training for each key: (B,) keys to (B,)."""

    @abc.abstractmethod
    def even_times(self, count: int) -> np.ndarray:
        """`count` times spread evenly, rising, for evaluation."""

    @abc.abstractmethod
    def sampling_times(self, num_steps: int) -> np.ndarray:
        """`num_steps` times, falling, of which the first is the last one of training."""

    def levels(self, t: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Signal and noise, float32, at times (B,), or (B, T), shaped to multiply `like`."""
        shape = t.shape + (1,) * (like.ndim - t.ndim)
        signal, noise = self.curve(t, jnp)
        return (
            signal.astype(jnp.float32).reshape(shape),
            noise.astype(jnp.float32).reshape(shape),
        )

    def grid(self, num_steps: int) -> Grid:
        """The times of `sampling_times` with their levels.

        Raises:
          UserError: fewer than 1 step, or more than the process has timesteps.
        """
        if num_steps < 1 or (self.discrete and num_steps > self.num_timesteps):
            most = f"1 to {self.num_timesteps}" if self.discrete else "at least 1"
            raise UserError(
                f"Sampling by the process {self.name} takes {most} steps, got {num_steps}."
            )
        times = self.sampling_times(num_steps)
        signal, noise = self.curve(times, np)
        return Grid(times, np.append(signal, 1.0), np.append(noise, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrete(Process):
    """Timesteps with betas, the variances that each step adds (DDPM, 2006.11239).

    Attributes:
      num_timesteps: timesteps 0 .. num_timesteps - 1.
      shift: multiplies noise / signal at every time (simple diffusion, 2301.11093, section 3.1):
        the videos' side over the side that the schedule was made for.
      zero_terminal_snr: shift and scale sqrt(alpha bar) so that its last value is 0 and its first
        stays (Lin et al., 2305.08891, algorithm 1); False is the schedule as first published.
    """

    discrete: ClassVar[bool] = True
    num_timesteps: int = 1000
    shift: float = 1.0
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "shift")
        if self.num_timesteps < 2:
            raise UserError(
                f"The process {self.name} needs at least 2 timesteps, got num_timesteps="
                f"{self.num_timesteps}."
            )

    @abc.abstractmethod
    def betas(self) -> np.ndarray:
        """float64 (num_timesteps,), in (0, 1), before shift and rescaling."""

    @functools.cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise, sqrt(alpha bar) and sqrt(1 - alpha bar), float64 (num_timesteps,)."""
        alpha_bar = np.cumprod(1.0 - self.betas())
        signal, _ = shift_noise(np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar), self.shift, np)
        if self.zero_terminal_snr:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        return signal, np.sqrt(1.0 - signal**2)

    def curve(self, t: Any, xp: Any) -> tuple[Any, Any]:
        return xp.asarray(self.table[0])[t], xp.asarray(self.table[1])[t]

    def draw_times(self, keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: jax.random.randint(k, (), 0, self.num_timesteps))(keys)

    def even_times(self, count: int) -> np.ndarray:
        return ((np.arange(count) + 0.5) * self.num_timesteps / count).astype(np.int32)

    def sampling_times(self, num_steps: int) -> np.ndarray:
        """Trailing spacing (2305.08891, table 2).

        With zero terminal SNR the last timestep is pure noise; a sampler that skips it starts
        from an input that training never saw.
        """
        times = np.arange(num_steps, 0, -1) * (self.num_timesteps / num_steps)
        return np.round(times).astype(np.int32) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Discrete, name="linear"):
    """Betas on a line (DDPM; W.A.L.T, table 8): `beta_start` at timestep 0 to `beta_end`."""

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"The process linear has beta_start={self.beta_start} and beta_end="
                f"{self.beta_end}: choose 0 < beta_start <= beta_end < 1."
            )

    def betas(self) -> np.ndarray:
        return np.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Discrete, name="cosine"):
    """alpha bar = cos^2 of the time (improved DDPM, 2102.09672, equation 17).

    Attributes:
      offset: s, so that the first betas are not too small.
      max_beta: betas are clipped to it.
    """

    offset: float = 0.008
    max_beta: float = 0.999

    def betas(self) -> np.ndarray:
        time = np.linspace(0.0, 1.0, self.num_timesteps + 1)
        alpha_bar = np.cos((time + self.offset) / (1.0 + self.offset) * np.pi / 2) ** 2
        return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], self.max_beta)


class Continuous(Process):
    """Times are floats in (0, num_timesteps]; only their share of num_timesteps matters."""

    def draw_times(self, keys: jax.Array) -> jax.Array:
        # Not 0: nothing is learnt from clean data, and some targets divide by the noise.
        return self.num_timesteps * (1.0 - jax.vmap(jax.random.uniform)(keys))

    def even_times(self, count: int) -> np.ndarray:
        return ((np.arange(count) + 0.5) * self.num_timesteps / count).astype(np.float32)

    def sampling_times(self, num_steps: int) -> np.ndarray:
        return np.arange(num_steps, 0, -1) * (self.num_timesteps / num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousCosine(Continuous, name="continuous_cosine"):
    """Signal and noise are cosine and sine of the time (simple diffusion, 2301.11093, section 3.1).

    Attributes:
      num_timesteps: scale of the times that the network sees.
      shift: multiplies noise / signal, so that log SNR changes by -2 log(shift): the videos' side
        over that of the reference, 64 in the paper.
      logsnr_min, logsnr_max: log SNR, before the shift, at the last and the first time.
      zero_terminal_snr: the cosine goes on to its zero at the last time; logsnr_min is not used.
    """

    num_timesteps: int = 1000
    shift: float = 1.0
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "shift", "num_timesteps")
        if self.logsnr_min >= self.logsnr_max:
            raise UserError(
                f"The process continuous_cosine has logsnr_min={self.logsnr_min}, which must be "
                f"below logsnr_max={self.logsnr_max}."
            )

    def curve(self, t: Any, xp: Any) -> tuple[Any, Any]:
        share = t / self.num_timesteps
        first = math.atan(math.exp(-0.5 * self.logsnr_max))
        # What remains to a right angle at the last time: so that the cosine is 0 there exactly.
        rest = 0.0 if self.zero_terminal_snr else math.atan(math.exp(0.5 * self.logsnr_min))
        span = math.pi / 2 - first - rest
        signal, noise = xp.sin(rest + (1.0 - share) * span), xp.sin(first + share * span)
        return shift_noise(signal, noise, self.shift, xp)


def shift_noise(signal: Any, noise: Any, shift: float, xp: Any) -> tuple[Any, Any]:
    """Levels with `shift` times the ratio noise / signal, still of unit variance."""
    norm = xp.sqrt(signal**2 + (shift * noise) ** 2)
    return signal / norm, shift * noise / norm


def check_positive(process: Process, *fields: str) -> None:
    """Raises a UserError where one of the fields is not positive."""
    for field in fields:
        if not (value := getattr(process, field)) > 0:
            raise UserError(f"The process {process.name} has {field}={value}: it must be positive.")


class Posterior(NamedTuple):
    """q(x_next | x_t, x_0) = N(of_x0 x_0 + of_x x_t, small variance), a row for each step.

    Attributes:
      of_x0, of_x: the mean's coefficients.
      log_small: log of the posterior variance, beta tilde, the least that a reverse step has. Of
        the step to clean data, where it is 0, that of the step before is given (2102.09672).
      log_large: log of beta, the most that a reverse step has where the data has unit variance.
    """

    of_x0: np.ndarray
    of_x: np.ndarray
    log_small: np.ndarray
    log_large: np.ndarray


def posterior(grid: Grid) -> Posterior:
    """The posteriors of a variance-preserving process between the times of a grid (2006.11239,
    equations 6 and 7, with the betas of the steps that the grid takes), float64 (N,)."""
    signal, noise, signal_next, noise_next = (
        grid.signal[:-1],
        grid.noise[:-1],
        grid.signal[1:],
        grid.noise[1:],
    )
    root_alpha = signal / signal_next
    beta = 1.0 - root_alpha**2
    small = beta * (noise_next / noise) ** 2
    small[-1] = small[-2] if len(small) > 1 else beta[-1]
    of_x0 = signal_next * beta / noise**2
    of_x = root_alpha * (noise_next / noise) ** 2
    return Posterior(of_x0, of_x, np.log(small), np.log(beta))


def standard_normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise float32 (B, *shape), each row of its own key (B,), whatever the batch."""
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
