"""Samplers: from noise to x_0 in a number of steps, all by one loop.

A sampler plans on the host, in float64: the times of its evaluations and, for each, its
coefficients. A step then is arithmetic on what one evaluation of the network says.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.diffusion.guidance import DynamicThreshold, Predict
from walt_jax.diffusion.losses import Diffusion, Prediction
from walt_jax.diffusion.schedules import Grid, posterior, standard_normal
from walt_jax.errors import UserError

PyTree = Any
Coefficients = dict[str, Any]
Draw = Callable[[], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(abc.ABC):
    """The interface of all samplers.

    Attributes:
      num_steps: steps from noise to data.
      threshold: applied to every predicted x_0; None leaves it.
    """

    registry: ClassVar[dict[str, type["Sampler"]]] = {}
    name: ClassVar[str]
    num_steps: int = 50
    threshold: DynamicThreshold | None = None

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        Sampler.registry[name] = cls

    def check(self, diffusion: Diffusion) -> None:
        """Raises a UserError where this sampler cannot sample what was trained so."""
        del diffusion

    @abc.abstractmethod
    def plan(self, grid: Grid) -> tuple[np.ndarray, Coefficients]:
        """Times of the evaluations (E,), and what `step` needs for each, arrays (E,)."""

    def remember(self, x: jax.Array) -> PyTree:
        """What the first step finds as its memory."""
        return ()

    @abc.abstractmethod
    def step(
        self,
        x: jax.Array,
        prediction: Prediction,
        c: Coefficients,
        memory: PyTree,
        draw: Draw,
    ) -> tuple[jax.Array, PyTree]:
        """The next x and memory, of this evaluation's coefficients; `draw` gives fresh noise."""

    def __call__(
        self,
        predict: Predict,
        noise: jax.Array,
        keys: jax.Array | None,
        diffusion: Diffusion,
        start: jax.Array | None = None,
        strength: float = 1.0,
    ) -> jax.Array:
        """Samples.

        Args:
          predict: (x_t, t, estimate) -> what the network emits, with x_t like `noise`, t (B,) and
            estimate the x_0 predicted by the evaluation before, zeros at first.
          noise: (B, ...) standard normal, x at the last time.
          keys: (B,), a key a sample, for the noise of its steps; None will do for samplers that
            are deterministic.
          diffusion: what was trained.
          start: like `noise`, data to start from, noised, instead of noise alone (SDEdit,
            2108.01073); None for noise.
          strength: with `start`, the share of the process's time at which to start; steps before
            it are left out.

        Returns:
          x_0, float32, the shape of `noise`. A sample depends on its noise and key only.

        Raises:
          UserError: what was trained does not admit this sampler or so many steps, or no step is
            left.
        """
        self.check(diffusion)
        grid = diffusion.process.grid(self.num_steps)
        x = noise.astype(jnp.float32)
        if start is not None:
            grid = grid.until(strength * diffusion.process.num_timesteps)
            x = float(grid.signal[0]) * start + float(grid.noise[0]) * x
        times, coefficients = self.plan(grid)
        times = times.astype(np.int32 if diffusion.process.discrete else np.float32)
        coefficients = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), coefficients)

        def evaluation(carry: PyTree, now: PyTree) -> tuple[PyTree, None]:
            (x, estimate, memory), (index, t, c) = carry, now
            t = jnp.full(x.shape[:1], t)
            prediction = diffusion.read(predict(x, t, estimate), x, t)
            if self.threshold is not None:
                prediction = self._thresholded(prediction, x, t, diffusion)

            def draw() -> jax.Array:
                folded = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
                return standard_normal(folded, x.shape[1:])

            x, memory = self.step(x, prediction, c, memory, draw)
            return (x, prediction.x0, memory), None

        carry = (x, jnp.zeros_like(x), self.remember(x))
        inputs = (np.arange(len(times)), jnp.asarray(times), coefficients)
        return jax.lax.scan(evaluation, carry, inputs)[0][0]

    def _thresholded(
        self, prediction: Prediction, x: jax.Array, t: jax.Array, diffusion: Diffusion
    ) -> Prediction:
        signal, noise = diffusion.process.levels(t, x)
        x0 = self.threshold(prediction.x0)
        return prediction._replace(x0=x0, eps=(x - signal * x0) / noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ddpm(Sampler, name="ddpm"):
    """Ancestral sampling (2006.11239, algorithm 2) by the posteriors between the times visited.

    Attributes:
      variance: of a step: `small` is the posterior's, beta tilde; `large` is beta; `learned` is the
        network's, between the two.
    """

    variance: Literal["small", "large", "learned"] = "small"

    def check(self, diffusion: Diffusion) -> None:
        _check_variance_preserving(self, diffusion)
        if self.variance == "learned" and not diffusion.target.learns_variance:
            raise UserError(
                f"The sampler ddpm with variance=learned needs a network that learns it, but the "
                f"target is {diffusion.target.name}: choose variance=small or large, or train with "
                "the target eps_sigma."
            )

    def plan(self, grid: Grid) -> tuple[np.ndarray, Coefficients]:
        steps = posterior(grid)
        goes_on = np.append(np.ones(len(grid.times) - 1), 0.0)  # the last step adds no noise
        return grid.times, {**steps._asdict(), "goes_on": goes_on}

    def step(
        self,
        x: jax.Array,
        prediction: Prediction,
        c: Coefficients,
        memory: PyTree,
        draw: Draw,
    ) -> tuple[jax.Array, PyTree]:
        fraction = {"small": 0.0, "large": 1.0}.get(self.variance, prediction.fraction)
        log_variance = fraction * c["log_large"] + (1.0 - fraction) * c["log_small"]
        mean = c["of_x0"] * prediction.x0 + c["of_x"] * x
        return mean + c["goes_on"] * jnp.exp(0.5 * log_variance) * draw(), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ddim(Sampler, name="ddim"):
    """DDIM (2010.02502, equations 12 and 16).

    Attributes:
      eta: 0 is deterministic, 1 is DDPM with the small variance.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"The sampler ddim takes eta from 0 to 1, got {self.eta}.")

    def check(self, diffusion: Diffusion) -> None:
        _check_variance_preserving(self, diffusion)

    def plan(self, grid: Grid) -> tuple[np.ndarray, Coefficients]:
        signal, noise = grid.signal, grid.noise
        beta = 1.0 - (signal[:-1] / signal[1:]) ** 2
        fresh = self.eta * noise[1:] / noise[:-1] * np.sqrt(beta)
        old = np.sqrt(np.maximum(noise[1:] ** 2 - fresh**2, 0.0))
        return grid.times, {"signal": signal[1:], "old": old, "fresh": fresh}

    def step(
        self,
        x: jax.Array,
        prediction: Prediction,
        c: Coefficients,
        memory: PyTree,
        draw: Draw,
    ) -> tuple[jax.Array, PyTree]:
        x = c["signal"] * prediction.x0 + c["old"] * prediction.eps
        return (x + c["fresh"] * draw() if self.eta else x), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(Sampler, name="euler"):
    """First order on the probability-flow ODE dx = x_0 d signal + eps d noise.

    For rectified flow that is a step along the velocity; a variance-preserving process takes the
    steps of deterministic DDIM.
    """

    def plan(self, grid: Grid) -> tuple[np.ndarray, Coefficients]:
        return grid.times, {"signal": np.diff(grid.signal), "noise": np.diff(grid.noise)}

    def step(
        self,
        x: jax.Array,
        prediction: Prediction,
        c: Coefficients,
        memory: PyTree,
        draw: Draw,
    ) -> tuple[jax.Array, PyTree]:
        return x + c["signal"] * prediction.x0 + c["noise"] * prediction.eps, memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(Sampler, name="heun"):
    """Second order on dx = x_0 d signal + eps d noise (EDM, 2206.00364, algorithm 1).

    Each step is Euler's, corrected by the mean of the increments at both of its ends; the step to
    clean data is Euler's alone. So num_steps steps take 2 num_steps - 1 evaluations. With a
    constant signal this is EDM's sampler; in this form zero terminal SNR is no special case.
    """

    def plan(self, grid: Grid) -> tuple[np.ndarray, Coefficients]:
        # Evaluations: at the start of a step and at its end, which the next step starts from again.
        step = np.repeat(np.arange(len(grid.times)), 2)[:-1]
        corrects = np.arange(len(step)) % 2
        signal, noise = np.diff(grid.signal)[step], np.diff(grid.noise)[step]
        times = grid.times[step + corrects]
        return times, {"signal": signal, "noise": noise, "corrects": corrects}

    def remember(self, x: jax.Array) -> PyTree:
        return x, jnp.zeros_like(x)

    def step(
        self,
        x: jax.Array,
        prediction: Prediction,
        c: Coefficients,
        memory: PyTree,
        draw: Draw,
    ) -> tuple[jax.Array, PyTree]:
        start, first = memory
        increment = c["signal"] * prediction.x0 + c["noise"] * prediction.eps
        corrected = start + 0.5 * (first + increment)
        return jnp.where(c["corrects"] > 0, corrected, x + increment), (x, increment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpmSolver(Sampler, name="dpmpp_2m"):
    """DPM-Solver++(2M) (2211.01095, algorithm 2): second order, one evaluation a step.

    x_0 is extrapolated, linearly in half the log SNR, from the two last predictions. A step that
    begins or ends at an infinite log SNR, and the one after it, take the last prediction alone.
    """

    def plan(self, grid: Grid) -> tuple[np.ndarray, Coefficients]:
        signal, noise = grid.signal, grid.noise
        with np.errstate(divide="ignore"):
            width = np.diff(np.log(signal) - np.log(noise))
        ahead = np.zeros_like(width)
        ahead[1:-1] = 0.5 * width[1:-1] / width[:-2]
        of_x = noise[1:] / noise[:-1]
        return grid.times, {"x": of_x, "x0": signal[1:] - of_x * signal[:-1], "ahead": ahead}

    def remember(self, x: jax.Array) -> PyTree:
        return jnp.zeros_like(x)

    def step(
        self,
        x: jax.Array,
        prediction: Prediction,
        c: Coefficients,
        memory: PyTree,
        draw: Draw,
    ) -> tuple[jax.Array, PyTree]:
        x0 = prediction.x0
        return c["x"] * x + c["x0"] * (x0 + c["ahead"] * (x0 - memory)), x0


def _check_variance_preserving(sampler: Sampler, diffusion: Diffusion) -> None:
    if not diffusion.process.variance_preserving:
        raise UserError(
            f"The sampler {sampler.name} is for processes that preserve the variance, not for "
            f"{diffusion.process.name}: choose euler, heun or dpmpp_2m."
        )
