"""Losses: the squared error of the target with a weight that depends on the SNR, and the
variational bound by which a variance is learnt. Everything here is float32."""

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from walt_jax.diffusion.schedules import Linear, Posterior, Process, posterior
from walt_jax.diffusion.targets import Target, V
from walt_jax.errors import UserError


class Weight(abc.ABC):
    """The interface of all weights.

    The error of x_0 is noise / determinant times that of the target, and the error of eps is
    signal / determinant times it: what a paper defines for x_0 or eps is converted by these.
    """

    registry: ClassVar[dict[str, type["Weight"]]] = {}

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Weight.registry[name] = cls

    @abc.abstractmethod
    def __call__(self, target: Target, signal: Any, noise: Any) -> Any:
        """The weight of the squared error of `target`, shaped as the levels."""


@dataclasses.dataclass(frozen=True)
class Uniform(Weight, name="uniform"):
    """1 for the error of the target itself."""

    def __call__(self, target: Target, signal: Any, noise: Any) -> Any:
        return jnp.ones_like(signal)


@dataclasses.dataclass(frozen=True)
class MinSnr(Weight, name="min_snr"):
    """min(SNR, gamma) for the error of x_0 (2303.09556): for eps min(1, gamma / SNR), for v
    min(SNR, gamma) / (SNR + 1), which is 0 where no signal is left."""

    gamma: float = 5.0

    def __call__(self, target: Target, signal: Any, noise: Any) -> Any:
        return (
            jnp.minimum(signal**2, self.gamma * noise**2) / target.determinant(signal, noise) ** 2
        )


@dataclasses.dataclass(frozen=True)
class P2(Weight, name="p2"):
    """1 / (k + SNR)^gamma for the error of eps (2204.00227, equation 8)."""

    k: float = 1.0
    gamma: float = 1.0

    def __call__(self, target: Target, signal: Any, noise: Any) -> Any:
        weight = (noise**2 / (self.k * noise**2 + signal**2)) ** self.gamma
        return weight * (signal / target.determinant(signal, noise)) ** 2


class Prediction(NamedTuple):
    """What an evaluation of the network says.

    Attributes:
      x0, eps: float32, like x_t.
      fraction: of the way from the log of the small variance to that of the large one, where the
        network learns it; else None.
    """

    x0: jax.Array
    eps: jax.Array
    fraction: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """What is trained: the process, the network's target, the weight of its error.

    Attributes:
      process, target, weight: each chosen by `name`.
    """

    process: Process = Linear()
    target: Target = V()
    weight: Weight = Uniform()

    def __post_init__(self) -> None:
        process, target = self.process, self.target
        end = process.grid(1)
        if target.determinant(end.signal[0], end.noise[0]) == 0.0:
            raise UserError(
                f"The target {target.name} does not tell x_0 where no signal is left, and the "
                f"process {process.name} ends there: choose the target v, x0 or velocity, or a "
                "process with zero_terminal_snr=False."
            )
        if target.learns_variance and not process.discrete:
            raise UserError(
                f"The target {target.name} learns the variance of a timestep, which the continuous "
                f"process {process.name} does not have: choose the process linear or cosine."
            )

    def add_noise(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """x_t = signal x_0 + noise eps, float32 (B, ...); t (B,), or (B, T) with a time a frame."""
        signal, noise = self.process.levels(t, x0)
        return signal * x0 + noise * eps

    def read(self, out: jax.Array, x_t: jax.Array, t: jax.Array) -> Prediction:
        """What the network emits for x_t, (B, ..., C or 2C), as x_0 and eps; t as before."""
        signal, noise = self.process.levels(t, x_t)
        value, fraction = self.target.split(out)
        return Prediction(*self.target.solve(x_t, value, signal, noise), fraction)

    def losses(
        self,
        out: jax.Array,
        x0: jax.Array,
        eps: jax.Array,
        t: jax.Array,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """The loss of each sample: the weighted mean squared error of the target and, with a learnt
        variance, the hybrid's L_simple + vlb_weight L_vlb (2102.09672, equation 16), in which L_vlb
        is num_timesteps times the term of timestep t and its gradient reaches the variance only.

        Args:
          out: what the network emits for `add_noise(x0, eps, t)`, (B, ..., C or 2C).
          x0, eps: float32 (B, ..., C).
          t: as in `add_noise`.
          mask: bool, broadcast to x0: where the error counts; None is everywhere.

        Returns:
          float32 (B,); 0 for a sample of which nothing counts.
        """
        signal, noise = self.process.levels(t, x0)
        value, fraction = self.target.split(out)
        error = jnp.square(value - self.target.of(x0, eps, signal, noise))
        loss = _mean(self.weight(self.target, signal, noise) * error, mask)
        if fraction is None:
            return loss
        bound = variational_bound(self, out, x0, eps, t)
        return loss + self.target.vlb_weight * self.process.num_timesteps * _mean(bound, mask)


def variational_bound(
    diffusion: Diffusion, out: jax.Array, x0: jax.Array, eps: jax.Array, t: jax.Array
) -> jax.Array:
    """The term of timestep t of the variational bound, in bits for each value of x_0.

    KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)), and at t = 0 -log p(x_0 | x_1) as a density. Improved
    diffusion has there the probability of one of 256 pixel values; latents are real numbers, many
    of them outside of [-1, 1]. Within a bin the two differ by a constant, the bin's width.

    Args:
      diffusion: discrete, with a target that learns the variance.
      out: what the network emits; the gradient reaches the variance's channels only.
      x0, eps, t: as in `Diffusion.losses`.

    Returns:
      float32 like x0.
    """
    steps = posterior(diffusion.process.grid(diffusion.process.num_timesteps))
    shape = t.shape + (1,) * (x0.ndim - t.ndim)
    # The grid's times fall from the last timestep to 0.
    of = Posterior(*(jnp.asarray(a[::-1], jnp.float32)[t].reshape(shape) for a in steps))
    predicted, _, fraction = diffusion.read(out, diffusion.add_noise(x0, eps, t), t)
    log_variance = fraction * of.log_large + (1.0 - fraction) * of.log_small
    # x_t adds the same to both means.
    error = jnp.square(of.of_x0 * (x0 - jax.lax.stop_gradient(predicted)))
    error = error * jnp.exp(-log_variance)
    ratio = of.log_small - log_variance
    kl = 0.5 * (jnp.exp(ratio) - ratio - 1.0 + error)
    likelihood = 0.5 * (math.log(2.0 * math.pi) + log_variance + error)
    return jnp.where(t.reshape(shape) == 0, likelihood, kl) / math.log(2.0)


def _mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    axes = tuple(range(1, values.ndim))
    if mask is None:
        return values.mean(axes)
    mask = jnp.broadcast_to(mask, values.shape)
    return jnp.where(mask, values, 0.0).sum(axes) / jnp.maximum(mask.sum(axes), 1)
