"""Tasks: what the one loop trains."""

from walt_jax.tasks.base import Batch, Metrics, Task, sample_keys, to_uint8, to_unit
from walt_jax.tasks.denoiser import DenoiserTask, NoiseConfig
from walt_jax.tasks.tokenizer import TokenizerTask, psnr

__all__ = [
    "Batch",
    "DenoiserTask",
    "Metrics",
    "NoiseConfig",
    "Task",
    "TokenizerTask",
    "psnr",
    "sample_keys",
    "to_uint8",
    "to_unit",
]
