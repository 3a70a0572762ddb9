"""A small text encoder over bytes, trained jointly with the denoiser that reads it."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.models.denoiser.layers import Affine, Attention, gelu, linear
from walt_jax.models.text.base import TextConfig, too_long

_FULL = (0, 0, 0)
_START = np.uint32(2166136261)


@dataclasses.dataclass(frozen=True)
class ByteEncoderConfig(TextConfig, name="bytes"):
    """Sizes of a `ByteEncoder`.

    Attributes:
      width: of its tokens; the denoiser's `text_features`.
      num_layers, num_heads: of the transformer. Without layers and with `words` a text is a bag of
        words: the least, for captions of a fixed form.
      max_bytes: longest text, in bytes of UTF-8.
      words: entries of a table of words, 0 for none. With one, a byte also has the entry of what
        its word has been so far, found by a hash (as BLT's n-grams, 2412.09871, section 3.2.1), and
        the text's tokens are its words: the last byte of each.
      dtype: what matrices compute in.
    """

    trained: ClassVar[bool] = True

    width: int = 256
    num_layers: int = 2
    num_heads: int = 4
    max_bytes: int = 128
    words: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.width, self.num_heads, self.max_bytes) < 1 or self.num_layers < 0:
            raise UserError(f"The sizes of config.task.text must be positive, got {self}.")
        if not (self.num_layers or self.words):
            raise UserError("config.task.text.num_layers=0 needs words: bytes alone say nothing.")
        if self.words < 0:
            raise UserError(f"config.task.text.words must be 0 or more, got {self.words}.")
        if self.width % self.num_heads:
            raise UserError(
                f"config.task.text.width={self.width} must be a multiple of num_heads="
                f"{self.num_heads}."
            )

    def reads_as(self, other: TextConfig) -> bool:
        """Of the same sizes; see `TextConfig.reads_as`."""
        same = isinstance(other, ByteEncoderConfig)
        return same and dataclasses.replace(other, dtype=self.dtype) == self

    def tokenize(self, texts: Sequence[str], *, cut: bool = False) -> np.ndarray:
        """UTF-8, uint8 (N, max_bytes), 0 where there is none; see `TextConfig.tokenize`."""
        for text in () if cut else texts:
            if (length := len(text.encode())) > self.max_bytes:
                raise too_long(text, length, "bytes", self.max_bytes)
        coded = [to_bytes(text, self.max_bytes) for text in texts]
        return np.asarray(coded, np.uint8).reshape(-1, self.max_bytes)


def to_bytes(text: str, length: int) -> np.ndarray:
    """UTF-8 of a text, cut or filled up with zeros: uint8 (length,)."""
    coded = np.frombuffer(text.encode()[:length], np.uint8)
    return np.pad(coded, (0, length - len(coded)))


class ByteEncoder(nnx.Module):
    """A transformer over the bytes of a text; each sees all others that are no padding."""

    def __init__(self, config: ByteEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        table = nnx.initializers.normal(0.02)
        self.byte_embedding = nnx.Param(table(rngs.params(), (256, config.width)))
        self.place_embedding = nnx.Param(table(rngs.params(), (config.max_bytes, config.width)))
        # As large as class embeddings are, so that words differ from the first step on.
        self.word_embedding = (
            nnx.Param(jax.random.normal(rngs.params(), (config.words, config.width)))
            if config.words
            else None
        )
        self.layers = nnx.List([_Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = Affine(config.width, rngs)

    @jax.named_scope("text")
    def __call__(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes.

        Args:
          text: uint8 (B, M), bytes; 0 is padding.

        Returns:
          Tokens (B, M, width), and bool (B, M), False where a token is padding. With a table of
          words the tokens are the words alone, ceil(M / 2) of them: there are no more.

        Raises:
          UserError: more bytes than `max_bytes`.
        """
        length = text.shape[1]
        if length > self.config.max_bytes:
            raise UserError(
                f"Texts of {length} bytes do not fit config.task.text.max_bytes="
                f"{self.config.max_bytes}: make config.data.caption_bytes no larger."
            )
        mask = text != 0
        x = self.byte_embedding[...][text.astype(jnp.int32)] + self.place_embedding[...][:length]
        if self.word_embedding is not None:
            hashes, ends = word_hashes(text)
            words = self.word_embedding[...][hashes % self.config.words]
            x = x + jnp.where(hashes[..., None] > 0, words, 0.0)
        x = x.astype(self.config.dtype)[:, None, None]  # a sequence as a grid of one row
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        x = self.norm(x)[:, 0, 0]
        if self.word_embedding is None:
            return x, mask
        words_first = jnp.argsort(~ends, axis=1)[:, : -(-length // 2)]  # a stable sort
        x = jnp.take_along_axis(x, words_first[..., None], axis=1)
        return x, jnp.take_along_axis(ends, words_first, axis=1)


def word_hashes(text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each byte of texts, uint8 (B, M): a hash of its word up to it, uint32, 0 between words;
    and whether it is the last of its word, bool."""
    inside = (text != 0) & (text != ord(" "))

    def step(before: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        byte, within = at
        mixed = (before ^ byte) * jnp.uint32(16777619)  # FNV-1a
        now = jnp.where(within, jnp.maximum(mixed ^ (mixed >> 15), 1), 0)
        return jnp.where(within, now, _START), now

    start = jnp.full(text.shape[0], _START)
    _, hashes = jax.lax.scan(step, start, (text.T.astype(jnp.uint32), inside.T))
    after = jnp.pad(inside[:, 1:], ((0, 0), (0, 1)))
    return hashes.T, inside & ~after


class _Layer(nnx.Module):
    def __init__(self, config: ByteEncoderConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.attention = Attention(
            width,
            config.num_heads,
            (_FULL,),
            (1, 1, config.max_bytes),
            causal=False,
            image_identity=False,
            relative_bias=False,
            qk_norm=True,
            dtype=dtype,
            rngs=rngs,
            implementation="xla",  # so small that the partitioner may divide it as it likes
        )
        self.norms = nnx.List([Affine(width, rngs), Affine(width, rngs)])
        self.up = linear(width, 4 * width, dtype, rngs)
        self.down = linear(4 * width, width, dtype, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x), segment_ids=mask.astype(jnp.int32))
        return x + self.down(gelu(self.up(self.norms[1](x))))
