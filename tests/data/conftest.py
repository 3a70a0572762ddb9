"""Fixtures of cached latents."""

from small_latents import data, encode, straight, tokenizer

__all__ = ["data", "encode", "straight", "tokenizer"]
