"""Generation: from trained weights to videos, by one sampler.

`Generator` samples arrays; `Walt`, which `walt_jax.load` returns, is the same for people.
"""

from walt_jax.generation.generator import Generator

__all__ = ["Generator"]
