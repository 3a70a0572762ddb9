"""The MAGVIT-v2 tokenizer."""

from walt_jax.models.tokenizer.tokenizer import Tokenizer, TokenizerConfig

__all__ = ["Tokenizer", "TokenizerConfig"]
