"""walt_jax: W.A.L.T video diffusion on a MAGVIT-v2 causal 3D tokenizer, in JAX.

Glossary of the letters in array names (`x_BTHWC`, `q_NLHK`):

    B  batch                      T H W  frames, rows, columns (of pixels or of latents)
    C  channels                   D      width of the transformer
    N  windows                    L      tokens in a window
    H  heads (after N and L)      K      width of one head

Pixels are uint8 in records and float32 in [-1, 1] on the devices; latents are (B, T, H, W, C) with
1 + (frames - 1) / 4 latent frames, the first of which encodes the first frame alone.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from walt_jax.generation.walt import Walt

# TensorFlow, which clu's metric writers import, tells of its build at every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

__version__ = "0.1.0"


def load(source: str | Path, **options: Any) -> "Walt":
    """A trained model: `walt_jax.load("out/walt").sample("a red square moves left")`.

    Args:
      source: a run's workdir, a folder of `walt_jax.export`, or the name of a model that comes
        with the package.
      options: step, weights and mesh, as `Walt.load` takes them.

    Raises:
      UserError: there is no such model.
    """
    from walt_jax.generation.walt import Walt  # JAX is not loaded by `import walt_jax`

    return Walt.load(source, **options)
