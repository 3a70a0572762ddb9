"""Generation: from trained weights to videos, by one sampler.

`Generator` samples arrays; `Walt`, which `walt_jax.load` returns, is the same for people.
"""

from walt_jax.generation.generator import Generator
from walt_jax.generation.tasks import TASKS
from walt_jax.generation.walt import Walt

__all__ = ["TASKS", "Generator", "Walt"]
