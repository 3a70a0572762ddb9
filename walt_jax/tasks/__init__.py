"""Tasks: what the one loop trains."""

from walt_jax.tasks.base import Batch, Metrics, Task, sample_keys, to_uint8, to_unit
from walt_jax.tasks.denoiser import DenoiserTask
from walt_jax.tasks.given import GivenConfig
from walt_jax.tasks.tokenizer import TokenizerTask, psnr
from walt_jax.tasks.wanted import Wanted

__all__ = [
    "Batch",
    "DenoiserTask",
    "GivenConfig",
    "Metrics",
    "Task",
    "TokenizerTask",
    "Wanted",
    "psnr",
    "sample_keys",
    "to_uint8",
    "to_unit",
]
