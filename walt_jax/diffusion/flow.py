"""Rectified flow (2209.03003) with the times of Stable Diffusion 3 (2403.03206)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.diffusion.schedules import Continuous, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Continuous, name="rectified_flow"):
    """Straight lines from data to noise: signal = 1 - u, noise = u, u = t / num_timesteps.

    Attributes:
      num_timesteps: scale of the times that the network sees.
      times: how training draws u: `uniform`, or `logit_normal`, sigmoid(mean + std n), which
        prefers the middle, where the velocity is hardest to tell (2403.03206, section 3.1).
      mean, std: of the logit-normal.
      shift: moves times towards noise, in training and in sampling: u becomes
        shift u / (1 + (shift - 1) u), which multiplies noise / signal by `shift` (equation 23): the
        videos' side over that of the reference; 3 in the paper.
    """

    variance_preserving: ClassVar[bool] = False
    num_timesteps: int = 1000
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "num_timesteps", "std", "shift")

    def curve(self, t: Any, xp: Any) -> tuple[Any, Any]:
        share = t / self.num_timesteps
        return 1.0 - share, share

    def draw_times(self, keys: jax.Array) -> jax.Array:
        if self.times == "uniform":
            return self._shifted(super().draw_times(keys))
        normal = jax.vmap(lambda k: jax.random.normal(k, dtype=jnp.float32))(keys)
        return self._shifted(self.num_timesteps * jax.nn.sigmoid(self.mean + self.std * normal))

    def sampling_times(self, num_steps: int) -> np.ndarray:
        return self._shifted(super().sampling_times(num_steps))

    def _shifted(self, t: Any) -> Any:
        return self.shift * t / (1.0 + (self.shift - 1.0) * t / self.num_timesteps)
