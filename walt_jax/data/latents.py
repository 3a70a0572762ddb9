"""Cached latents: a prepared dataset sent through a tokenizer once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.records import Dataset, exact, open_dataset, write_dataset
from walt_jax.errors import UserError
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.progress import bar
from walt_jax.tasks import to_unit

LATENT_FEATURES = tfds.features.FeaturesDict(
    {
        "latents": exact(np.float16, None, None, None, None),  # (t, h, w, c), normalised
        "num_frames": tfds.features.Scalar(np.int64),  # t, h and w of the latents
        "height": tfds.features.Scalar(np.int64),
        "width": tfds.features.Scalar(np.int64),
        "fps": exact(np.float64),  # of the clip's pixels
        "caption": tfds.features.Text(),
        "label": tfds.features.Scalar(np.int64),
        "source": tfds.features.Text(),
        "tokenizer_hash": tfds.features.Text(),
    }
)


def encode_dataset(
    tokenizer: FrozenTokenizer,
    data: DataConfig,
    output: str | Path,
    *,
    epochs: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Dataset:
    """Encodes `epochs` random clips of every video, in the batches that training would see.

    Args:
      tokenizer: encodes; its hash goes into the dataset and every record.
      data: the prepared videos and how clips are cut from them.
      output: the folder to write.
      epochs: passes over the videos; each cuts its clips at other times.
      batch_size: clips encoded together.
      seed: of the clips' times.
      overwrite: replace a dataset in `output`.
      progress: show a progress bar.

    Raises:
      UserError: the dataset or the output does not fit.
    """
    dataset = open_dataset(data.path)
    if dataset.metadata.get("kind") == "latents":
        raise UserError(f"{data.path} holds latents already: give prepared videos.")
    if epochs < 1 or batch_size < 1:
        raise UserError(f"epochs={epochs} and batch_size={batch_size} must be at least 1.")
    pipeline = Pipeline(dataset, data, batch_size=batch_size, seed=seed, split="all")
    encode = jax.jit(lambda video: tokenizer.encode(to_unit(video)).astype(np.float16))
    total = epochs * pipeline.batches_per_epoch
    batches = pipeline.batches()

    def examples() -> Iterator[dict[str, Any]]:
        for k in bar(range(total), what="encode", unit="batch", disable=not progress):
            batch, (_, records) = next(batches), pipeline.plan(k)
            latents = np.asarray(encode(batch["video"]))
            # A bucket's last batch is filled up with clips that it has already.
            for row in np.unique(records, return_index=True)[1]:
                t, h, w, _ = latents[row].shape
                yield {
                    "latents": latents[row],
                    "num_frames": t,
                    "height": h,
                    "width": w,
                    "fps": float(batch["fps"][row]),
                    "caption": str(batch["caption"][row]),
                    "label": int(batch["label"][row]),
                    "source": dataset.index["source"][records[row]],
                    "tokenizer_hash": tokenizer.hash,
                }

    metadata = {
        "kind": "latents",
        "tokenizer_hash": tokenizer.hash,
        "latent_channels": tokenizer.config.latent_channels,
        "dtype": "float16",
        "label_names": list(dataset.label_names),
        "videos": dataset.fingerprint,
    }
    return write_dataset(
        output,
        LATENT_FEATURES,
        examples(),
        name="latents",
        description=f"Latents of {dataset.directory.name} by tokenizer {tokenizer.hash}.",
        metadata=metadata,
        overwrite=overwrite,
    )
