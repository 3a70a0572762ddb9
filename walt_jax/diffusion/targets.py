"""What the network predicts: x_0 of x_0 + of_eps eps, with two coefficients a target.

With x_t = signal x_0 + noise eps these are two equations in x_0 and eps, so that one formula turns
every target into every other. Their determinant says where that fails: eps where no signal is
left. W.A.L.T prints v with signal and noise exchanged, which is eps at zero signal; the standard
form of Salimans & Ho (2202.00512, appendix D) is used.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp


class Target(abc.ABC):
    """The interface of all targets. Arrays are float32 (B, ..., C), levels broadcast to them."""

    registry: ClassVar[dict[str, type["Target"]]] = {}
    name: ClassVar[str]
    learns_variance: ClassVar[bool] = False

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        Target.registry[name] = cls

    @abc.abstractmethod
    def coefficients(self, signal: Any, noise: Any) -> tuple[Any, Any]:
        """The target's coefficients of x_0 and of eps."""

    def determinant(self, signal: Any, noise: Any) -> Any:
        """Of x_t and the target as equations in x_0 and eps."""
        of_x0, of_eps = self.coefficients(signal, noise)
        return signal * of_eps - noise * of_x0

    def of(self, x0: jax.Array, eps: jax.Array, signal: Any, noise: Any) -> jax.Array:
        """The target of data and noise."""
        of_x0, of_eps = self.coefficients(signal, noise)
        return of_x0 * x0 + of_eps * eps

    def solve(
        self, x_t: jax.Array, value: jax.Array, signal: Any, noise: Any
    ) -> tuple[jax.Array, jax.Array]:
        """x_0 and eps of x_t and a value of the target."""
        of_x0, of_eps = self.coefficients(signal, noise)
        scale = 1.0 / self.determinant(signal, noise)
        x0 = scale * of_eps * x_t - scale * noise * value
        return x0, scale * signal * value - scale * of_x0 * x_t

    def channels(self, channels: int) -> int:
        """How many channels the network emits for data of so many."""
        return 2 * channels if self.learns_variance else channels

    def split(self, out: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """What the network emits to the target's value and, where a variance is learnt, the
        fraction of the way between the logarithms of its bounds (2102.09672, equation 15), which
        the network gives in -1 .. 1."""
        out = out.astype(jnp.float32)
        if not self.learns_variance:
            return out, None
        value, fraction = jnp.split(out, 2, axis=-1)
        return value, 0.5 * (fraction + 1.0)


@dataclasses.dataclass(frozen=True)
class V(Target, name="v"):
    """v = signal eps - noise x_0; -x_0 where no signal is left."""

    def coefficients(self, signal: Any, noise: Any) -> tuple[Any, Any]:
        return -noise, signal


@dataclasses.dataclass(frozen=True)
class Eps(Target, name="eps"):
    """The noise (DDPM)."""

    def coefficients(self, signal: Any, noise: Any) -> tuple[Any, Any]:
        return 0.0, 1.0


@dataclasses.dataclass(frozen=True)
class X0(Target, name="x0"):
    """The data."""

    def coefficients(self, signal: Any, noise: Any) -> tuple[Any, Any]:
        return 1.0, 0.0


@dataclasses.dataclass(frozen=True)
class Velocity(Target, name="velocity"):
    """eps - x_0, the derivative of rectified flow's x_t by the share of time."""

    def coefficients(self, signal: Any, noise: Any) -> tuple[Any, Any]:
        return -1.0, 1.0


@dataclasses.dataclass(frozen=True)
class EpsSigma(Eps, name="eps_sigma"):
    """The noise and, in as many more channels, the variance of a reverse step (2102.09672; DiT).

    Attributes:
      vlb_weight: of the variational bound beside the mean squared error.
    """

    learns_variance: ClassVar[bool] = True
    vlb_weight: float = 1e-3
