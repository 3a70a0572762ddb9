"""Text encoders: over bytes, trained with the denoiser; T5 and CLIP, frozen, from published files.

One is chosen by `config.task.text.name`; docs/text.md says how each is had.
"""

from walt_jax.models.text.base import Embeddings, FrozenTextConfig, TextConfig, described
from walt_jax.models.text.bytes import ByteEncoder, ByteEncoderConfig, to_bytes
from walt_jax.models.text.clip import CLIP_SIZES, ClipConfig, ClipEncoder, ClipTextConfig
from walt_jax.models.text.frozen import FrozenText
from walt_jax.models.text.t5 import T5_SIZES, T5Config, T5Encoder, T5TextConfig

__all__ = [
    "CLIP_SIZES",
    "T5_SIZES",
    "ByteEncoder",
    "ByteEncoderConfig",
    "ClipConfig",
    "ClipEncoder",
    "ClipTextConfig",
    "Embeddings",
    "FrozenText",
    "FrozenTextConfig",
    "T5Config",
    "T5Encoder",
    "T5TextConfig",
    "TextConfig",
    "described",
    "to_bytes",
]
