"""Classifier-free guidance (2207.12598), its strength over time, and dynamic thresholding."""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from walt_jax.errors import UserError

PyTree = Any
# (x_t, t, estimate) -> what the network emits. The estimate is the x_0 that the evaluation before
# predicted, zeros at first, for networks with self-conditioning (2208.04202).
Predict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The same with a condition, a pytree of arrays (B, ...).
PredictGiven = Callable[[jax.Array, jax.Array, jax.Array, PyTree], jax.Array]


class Scale(abc.ABC):
    """The strength of guidance at a share of time, 0 (clean) .. 1 (noise); 1 is no guidance."""

    registry: ClassVar[dict[str, type["Scale"]]] = {}

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Scale.registry[name] = cls

    @abc.abstractmethod
    def __call__(self, share: jax.Array) -> jax.Array | float:
        """Shares (B,) to float32 (B,); a Python float where it does not depend on time."""


@dataclasses.dataclass(frozen=True)
class Constant(Scale, name="constant"):
    """The same at all times."""

    scale: float = 1.0

    def __call__(self, share: jax.Array) -> float:
        return float(self.scale)


@dataclasses.dataclass(frozen=True)
class PowerCosine(Scale, name="power_cosine"):
    """From 1 at pure noise to `scale` at the end: (scale - 1) s + 1 with
    s = (1 - cos(pi (1 - share)^power)) / 2 (MDT, 2303.14389); the larger the power, the later."""

    scale: float = 3.8
    power: float = 4.0

    def __call__(self, share: jax.Array) -> jax.Array:
        rise = 0.5 * (1.0 - jnp.cos(jnp.pi * (1.0 - share) ** self.power))
        return (self.scale - 1.0) * rise + 1.0


@dataclasses.dataclass(frozen=True)
class Interval(Scale, name="interval"):
    """`scale` at shares of time in (low, high], elsewhere 1 (2404.07724)."""

    scale: float = 3.0
    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise UserError(
                f"The guidance interval ({self.low}, {self.high}] must lie in 0 (clean) to 1 "
                "(noise), low below high."
            )

    def __call__(self, share: jax.Array) -> jax.Array:
        return jnp.where((share > self.low) & (share <= self.high), self.scale, 1.0)


def guide(
    predict: PredictGiven,
    conditions: Sequence[PyTree],
    scales: Sequence[Scale],
    num_timesteps: int,
    *,
    channels: int | None = None,
) -> Predict:
    """Joins the network's answers to several conditions, all from one call.

    With answers f_0, f_1 ... the result is f_0 + sum_i scale_i (f_i - f_(i-1)). Nothing given and a
    class, with one scale, is the usual guidance; nothing, frames, frames and text with two scales
    is that of InstructPix2Pix (2211.09800, equation 3). Answers that cancel (the first, at a
    constant scale of 1) are not computed.

    Args:
      predict: the network; it is called once with K B rows for the K conditions that count, those
        of a sample beside each other, so that a batch divided over devices stays where it is.
      conditions: pytrees of arrays (B, ...), all of one structure and shape, each with one more
        condition given than the one before.
      scales: one for each condition but the first.
      num_timesteps: of the process.
      channels: how many of the last axis are guided; those after it (a learnt variance) are the
        last condition's, as in DiT. None is all.

    Raises:
      UserError: another number of scales.
    """
    if len(scales) != len(conditions) - 1:
        raise UserError(
            f"Guidance by {len(conditions)} conditions, of which the first is nothing given, takes "
            f"{len(conditions) - 1} scales, got {len(scales)}."
        )

    def guided(x: jax.Array, t: jax.Array, estimate: jax.Array) -> jax.Array:
        share = t / num_timesteps
        strengths = [1.0, *(scale(share) for scale in scales), 0.0]
        weights = [a - b for a, b in itertools.pairwise(strengths)]
        used = [i for i, w in enumerate(weights) if not (isinstance(w, float) and w == 0.0)]

        def beside(*rows: jax.Array) -> jax.Array:
            return jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])

        copies = (beside(*[a] * len(used)) for a in (x, t, estimate))
        out = predict(*copies, jax.tree.map(beside, *(conditions[i] for i in used)))
        out = out.astype(jnp.float32).reshape(x.shape[0], len(used), *out.shape[1:])
        column = (-1,) + (1,) * (x.ndim - 1)
        joined = sum(
            jnp.reshape(jnp.asarray(weights[i], jnp.float32), column) * out[:, k]
            for k, i in enumerate(used)
        )
        if channels is None:
            return joined
        return jnp.concatenate([joined[..., :channels], out[:, -1, ..., channels:]], axis=-1)

    return guided


@dataclasses.dataclass(frozen=True)
class DynamicThreshold:
    """Keeps predicted x_0 from saturating under strong guidance (Imagen, 2205.11487, section 2.3).

    Where a share `percentile` of a sample's |x_0| does not stay below `limit`, x_0 is clipped to
    that value s instead and scaled by limit / s.

    Attributes:
      percentile: in (0, 1].
      limit: the data's range; 1 for pixels in [-1, 1].
    """

    percentile: float = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 < self.percentile <= 1.0 and self.limit > 0.0):
            raise UserError(
                f"Dynamic thresholding has percentile={self.percentile} and limit={self.limit}: "
                "the percentile lies above 0 and up to 1, the limit is positive."
            )

    def __call__(self, x0: jax.Array) -> jax.Array:
        """float32 (B, ...), each sample by itself."""
        size = jnp.abs(x0).reshape(x0.shape[0], -1)
        bound = jnp.maximum(jnp.quantile(size, self.percentile, axis=1), self.limit)
        bound = bound.reshape(-1, *(1,) * (x0.ndim - 1))
        return jnp.clip(x0, -bound, bound) * (self.limit / bound)
