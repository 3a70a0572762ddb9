"""What batches hold of captions: bytes, an encoder's tokens, or its embeddings from the records."""

import dataclasses
from typing import Any

import numpy as np

from walt_jax.data.records import Dataset
from walt_jax.errors import UserError
from walt_jax.models.text import FrozenTextConfig, to_bytes

EMBEDDINGS, LENGTH = "text_embeddings", "text_length"


@dataclasses.dataclass(frozen=True)
class Captions:
    """How captions are read; pickles as what it is made of.

    Attributes:
      num_bytes: of the bytes in `text`; 0 for none.
      encoder: a published text encoder, whose token ids are in `text`, int32 (M,), -1 for none.
      cached: the hash of the encoder whose embeddings the records hold; a batch then has these in
        its tokens' place, `text_embeddings` float16 (M, width), and `text_length`, how many.
      where: the dataset's folder.
    """

    num_bytes: int = 0
    encoder: FrozenTextConfig | None = None
    cached: str = ""
    where: str = ""

    @classmethod
    def of(
        cls, dataset: Dataset, num_bytes: int, encoder: FrozenTextConfig | None = None
    ) -> "Captions":
        """Of a dataset's records.

        Raises:
          UserError: the records' embeddings are not of such an encoder.
        """
        about = None if encoder is None else dataset.metadata.get("text")
        if about is None:
            return cls(num_bytes, encoder, where=str(dataset.directory))
        if about["width"] != encoder.width or about["max_tokens"] > encoder.max_tokens:
            raise UserError(
                f"{dataset.directory} holds text embeddings of {about['width']} features of up to "
                f"{about['max_tokens']} tokens, but config.task.text gives {encoder.width} of up "
                f"to {encoder.max_tokens}: make config.task.text that which encoded them."
            )
        return cls(num_bytes, encoder, about["hash"], str(dataset.directory))

    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> shape and dtype, of one record."""
        if self.encoder is None:
            return {"text": ((self.num_bytes,), np.uint8)} if self.num_bytes else {}
        if not self.cached:
            return {"text": ((self.encoder.max_tokens,), np.int32)}
        shape = (self.encoder.max_tokens, self.encoder.width)
        return {EMBEDDINGS: (shape, np.float16), LENGTH: ((), np.int32)}

    def read(self, record: dict[str, Any]) -> dict[str, Any]:
        """The arrays of a record, and its `caption`; long captions are cut.

        Raises:
          UserError: the record's embeddings are of another encoder than its dataset says.
        """
        caption = record["caption"]
        if self.encoder is None:
            text = {"text": to_bytes(caption, self.num_bytes)} if self.num_bytes else {}
            return {"caption": caption, **text}
        if not self.cached:
            return {"caption": caption, "text": self.encoder.tokenize([caption], cut=True)[0]}
        if (made_by := record["text_hash"]) != self.cached:
            raise UserError(
                f"A record of {record['source']} in {self.where} has text embeddings by encoder "
                f"{made_by}, not by {self.cached}: encode the videos again."
            )
        length, embeddings = record[LENGTH], np.zeros(*self.arrays()[EMBEDDINGS])
        embeddings[:length] = record[EMBEDDINGS][:length]
        return {"caption": caption, EMBEDDINGS: embeddings, LENGTH: np.int32(length)}
