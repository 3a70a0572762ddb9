"""Texts to token ids by a published tokenizer: tokenizer.json, or sentencepiece's spiece.model."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from walt_jax.errors import UserError

Tokenize = Callable[[Sequence[str]], list[list[int]]]


@functools.lru_cache(maxsize=4)
def load(folder: Path) -> Tokenize:
    """A function from texts to ids, with the tokens that begin and end a text, neither cut nor
    filled up.

    Raises:
      UserError: no tokenizer in the folder, a damaged one, or its package is not installed.
    """
    for name, parse in (("tokenizer.json", _json), ("spiece.model", _sentencepiece)):
        if (path := folder / name).exists():
            try:
                return parse(path)
            except ModuleNotFoundError as error:
                raise UserError(
                    f'{path} is read by the package {error.name}: pip install -e ".[text]".'
                ) from error
            except Exception as error:  # the packages raise plain ones
                raise UserError(f"{path} is damaged ({error}): get it again.") from error
    raise UserError(
        f"{folder} has no tokenizer.json and no spiece.model: save the tokenizer there by "
        "transformers.AutoTokenizer.save_pretrained, or give its folder as "
        "config.task.text.tokenizer."
    )


def _json(path: Path) -> Tokenize:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(path.read_text())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [found.ids for found in tokenizer.encode_batch(list(texts))]


def _sentencepiece(path: Path) -> Tokenize:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    return lambda texts: processor.encode(list(texts), add_eos=True)
