"""Noise schedules: how much signal and noise is left at each timestep."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = signal[t] x_0 + noise[t] eps, with signal^2 + noise^2 = 1.

    Attributes:
      signal: float32 (num_timesteps,), sqrt(alpha bar), falling.
      noise: float32 (num_timesteps,), sqrt(1 - alpha bar), rising.
    """

    signal: np.ndarray
    noise: np.ndarray

    @property
    def num_timesteps(self) -> int:
        """Timesteps t = 0 .. num_timesteps - 1."""
        return len(self.signal)


def linear_schedule(
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    *,
    zero_terminal_snr: bool = True,
) -> Schedule:
    """Linear betas (W.A.L.T, table 8), rescaled so that nothing of x_0 is left at the last step.

    Args:
      num_timesteps: length of the schedule.
      beta_start, beta_end: variance added by the first and the last step.
      zero_terminal_snr: shift and scale sqrt(alpha bar) so that its last value is 0 and its first
        stays (Lin et al., 2305.08891, algorithm 1).
    """
    betas = np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
    signal = np.sqrt(np.cumprod(1.0 - betas))
    if zero_terminal_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    noise = np.sqrt(1.0 - signal**2)
    return Schedule(signal.astype(np.float32), noise.astype(np.float32))
