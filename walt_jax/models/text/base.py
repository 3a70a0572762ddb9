"""What text encoders have in common: their configs, and what they give."""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.models.build import Network
from walt_jax.models.text import tokenization
from walt_jax.models.text.hub import folder_of
from walt_jax.models.text.published import read_config

PADDING = -1  # the id of no token


class Embeddings(NamedTuple):
    """What a denoiser reads of texts.

    Attributes:
      tokens: (B, M, width), any float dtype.
      mask: bool (B, M), False where a token is padding; nowhere True where nothing is said.
    """

    tokens: jax.Array
    mask: jax.Array


class TextConfig(abc.ABC):
    """A frozen dataclass with what a text encoder is made of; `name` chooses one in a config."""

    registry: ClassVar[dict[str, type["TextConfig"]]] = {}
    default_name: ClassVar[str] = "bytes"
    trained: ClassVar[bool] = False  # together with the denoiser

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            TextConfig.registry[name] = cls

    @abc.abstractmethod
    def reads_as(self, other: "TextConfig") -> bool:
        """Whether what reads the other encoder can read this one, but for rounding."""

    @abc.abstractmethod
    def tokenize(self, texts: Sequence[str], *, cut: bool = False) -> np.ndarray:
        """Texts as the encoder takes them: integers (N, M), nothing but padding for "".

        Args:
          texts: N of them.
          cut: shorten what is too long.

        Raises:
          UserError: a text is too long, unless `cut`.
        """


@dataclasses.dataclass(frozen=True)
class FrozenTextConfig(TextConfig):
    """A published text encoder, which stays as it is.

    Attributes:
      path: a folder as Hugging Face's `save_pretrained` writes it (config.json, model.safetensors
        whole or in shards with their index, tokenizer.json or spiece.model), or a hub id
        `owner/name`, or `owner/name/folder` for a folder in it.
      revision: with a hub id the commit, 40 hex digits.
      tokenizer: where tokenizer.json or spiece.model lies, if not in `path`; likewise.
      max_tokens: longest text, in tokens, the end token included.
    """

    path: str
    revision: str = ""
    tokenizer: str = ""
    max_tokens: int = 128

    model_types: ClassVar[tuple[str, ...]] = ()  # of config.json
    model: ClassVar[Any]  # sizes, a field of the kinds below
    max_places: ClassVar[int] = 2**20  # tokens that the network can read

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= self.max_places:
            raise UserError(
                f"config.task.text.max_tokens must be 1 to {self.max_places}, got "
                f"{self.max_tokens}."
            )

    @property
    def width(self) -> int:
        """Of the tokens that come out; the denoiser's `text_features`."""
        return self.model.width

    @classmethod
    @abc.abstractmethod
    def sizes_of(cls, values: Mapping[str, Any]) -> Any:
        """The `model` that a config.json describes.

        Raises:
          UserError: it is of a network of another kind.
        """

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network: (tokens int32 (B, M), layout) -> `Embeddings`."""

    @abc.abstractmethod
    def tensors(self) -> Mapping[str, Sequence[str]]:
        """Path of a parameter -> what the file may call it, `{}` standing for the layer."""

    def reads_as(self, other: TextConfig) -> bool:
        """Of the same kind and sizes; see `TextConfig.reads_as`."""
        if type(self) is not type(other):
            return False
        elsewhere = {name: getattr(self, name) for name in ("path", "revision", "tokenizer")}
        model = dataclasses.replace(other.model, dtype=self.model.dtype)
        own = {"max_tokens": self.max_tokens, "model": model}
        return dataclasses.replace(other, **elsewhere, **own) == self

    @property
    def network(self) -> Network:
        """Structure of the encoder."""
        return _network(self)

    def folder(self, *, download: bool = True) -> Path:
        """Where its files lie; see `hub.folder_of`."""
        return folder_of(self.path, self.revision, download=download)

    def tokenize(self, texts: Sequence[str], *, cut: bool = False) -> np.ndarray:
        """Token ids, int32 (N, max_tokens), -1 where there is none; see `TextConfig.tokenize`."""
        source = self.tokenizer or self.path
        found = tokenization.load(folder_of(source, self.revision))(texts)
        ids = np.full((len(texts), self.max_tokens), PADDING, np.int32)
        for row, text, tokens in zip(ids, texts, found):
            if len(tokens) > self.max_tokens:
                if not cut:
                    raise too_long(text, len(tokens), "tokens", self.max_tokens)
                tokens = [*tokens[: self.max_tokens - 1], tokens[-1]]  # with the end's
            if text:
                row[: len(tokens)] = tokens
        return ids


def described(
    path: str, *, revision: str = "", tokenizer: str = "", max_tokens: int | None = None
) -> FrozenTextConfig:
    """The encoder that a folder's config.json describes; arguments as in `FrozenTextConfig`.

    Raises:
      UserError: there is none, or one of another kind.
    """
    values = read_config(folder_of(path, revision))
    kind = values.get("model_type")
    for cls in TextConfig.registry.values():
        if issubclass(cls, FrozenTextConfig) and kind in cls.model_types:
            given = {} if max_tokens is None else {"max_tokens": max_tokens}
            model = cls.sizes_of(values)
            return cls(path, revision, tokenizer, model=model, **given)
    known = [kind for cls in FrozenTextConfig.__subclasses__() for kind in cls.model_types]
    raise UserError(
        f"{path} holds a model of type {kind!r}: give a text encoder, one of {', '.join(known)}."
    )


@functools.lru_cache(maxsize=4)
def _network(config: FrozenTextConfig) -> Network:
    return Network.of(config.make)


def too_long(text: str, length: int, unit: str, limit: int) -> UserError:
    """The error for a text that does not fit."""
    return UserError(
        f"The prompt {text[:40]!r}... has {length} {unit}, this model reads {limit}: make it "
        "shorter."
    )
