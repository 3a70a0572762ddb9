"""Captions of a batch as a denoiser reads them."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from walt_jax.data.captions import EMBEDDINGS, LENGTH
from walt_jax.errors import UserError
from walt_jax.models.text import Embeddings
from walt_jax.parallel import Layout
from walt_jax.tasks.base import Batch, PyTree
from walt_jax.tasks.frozen import Frozen
from walt_jax.training.denoisers import TEXT

if TYPE_CHECKING:
    from walt_jax.tasks.denoiser import DenoiserTask

Text = jax.Array | Embeddings  # bytes, for an encoder that is trained, or a published one's output


def of_batch(task: "DenoiserTask", frozen: Frozen, batch: Batch, layout: Layout) -> Text:
    """What the captions of a batch say; `(...)` of its arrays are kept.

    Raises:
      UserError: it has none.
    """
    if EMBEDDINGS in batch:
        tokens, lengths = batch[EMBEDDINGS], batch[LENGTH]
        return Embeddings(tokens, jnp.arange(tokens.shape[-2]) < lengths[..., None])
    if "text" not in batch:
        raise UserError(
            "config.data.caption_bytes is 0, but the denoiser reads text: say how many bytes of a "
            "caption it reads (in config.images too, where there are images)."
        )
    return batch["text"] if task.text.trained else frozen.text(batch["text"], layout)


def without(text: Text, drop: jax.Array) -> Text:
    """Nothing is said where `drop` holds: bool, the leading axes of the text's."""
    return jax.tree.map(
        lambda x: jnp.where(
            drop.reshape(*drop.shape, *(1,) * (x.ndim - drop.ndim)), jnp.zeros_like(x), x
        ),
        text,
    )


def read(task: "DenoiserTask", params: PyTree, text: Text) -> Embeddings:
    """What the network is told, (...) of the text's leading axes."""
    if isinstance(text, Embeddings):
        return text
    flat = text.reshape(-1, text.shape[-1])
    found = task.text_network.bind(params[TEXT])(flat)
    return Embeddings(*(x.reshape(*text.shape[:-1], *x.shape[1:]) for x in found))
