"""What stays fixed while a denoiser is trained, and whether data fit it."""

import dataclasses

import jax

from walt_jax.data.records import Dataset
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig
from walt_jax.models.text import FrozenText
from walt_jax.models.tokenizer.frozen import FrozenTokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """The tokenizer and, where it runs in the step, the text encoder.

    Attributes:
      tokenizer: encodes and decodes.
      text: reads captions whose embeddings are not in the records.
      text_hash: of the text encoder, run or cached; empty without a published one.
    """

    tokenizer: FrozenTokenizer
    text: FrozenText | None = None
    text_hash: str = dataclasses.field(default="", metadata={"static": True})


def check_dataset(
    dataset: Dataset, tokenizer: FrozenTokenizer, source: str, model: DenoiserConfig
) -> None:
    """Refuses latents of another tokenizer than that of `source`, and what the model cannot take.

    Raises:
      UserError: such a dataset.
    """
    cached = dataset.metadata.get("tokenizer_hash")
    if cached not in (None, tokenizer.hash):
        raise UserError(
            f"The latents in {dataset.directory} were made by tokenizer {cached}, but "
            f"{source} is {tokenizer.hash}: encode the videos again with it."
        )
    if cached is not None and model.upsampling is not None:
        raise UserError(
            f"{dataset.directory} holds latents, but super-resolution makes the low-resolution "
            "ones of the pixels: give the prepared videos as config.data.path."
        )
    labels, classes = dataset.index["label"], model.num_classes
    if classes and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"{dataset.directory} has labels {labels.min()} to {labels.max()}, but "
            f"config.task.model.num_classes={classes} takes 0 to {classes - 1}: prepare it "
            "with --label-from-folder or --label-from-name, or change num_classes."
        )
