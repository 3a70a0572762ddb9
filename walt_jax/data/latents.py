"""Cached latents: a prepared dataset sent through a tokenizer once.

A record holds a clip's normalised latents as float16 or, where the tokenizer has a codebook, its
codes packed to `latent_channels` bits each; and the tokenizer's hash. With a text encoder it also
holds its caption's embeddings and that encoder's hash. `Pipeline` reads all of these.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from walt_jax.data.captions import EMBEDDINGS, LENGTH
from walt_jax.data.parts import Parts
from walt_jax.data.pipeline import DataConfig, HostBatch, Pipeline
from walt_jax.data.records import Dataset, exact, open_dataset
from walt_jax.errors import UserError
from walt_jax.models.text import Embeddings, FrozenText, FrozenTextConfig
from walt_jax.models.text.frozen import check_finite, half
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.models.tokenizer.quantizers import pack_codes
from walt_jax.models.tokenizer.streaming import encode_chunks, split_frames
from walt_jax.parallel import Layout, MeshConfig, make_mesh
from walt_jax.parallel.sharding import batch_sharding, frozen_shardings, place, replicated
from walt_jax.progress import bar as progress_bar
from walt_jax.tasks import to_unit

_AT_ONCE = 65  # frames; longer clips are encoded chunk by chunk, in memory that does not grow
_CHUNK = 16  # latent frames
_COMMON = {
    "num_frames": tfds.features.Scalar(np.int64),  # t, h and w of the latents
    "height": tfds.features.Scalar(np.int64),
    "width": tfds.features.Scalar(np.int64),
    "fps": exact(np.float64),  # of the clip's pixels
    "caption": tfds.features.Text(),
    "label": tfds.features.Scalar(np.int64),
    "source": tfds.features.Text(),
    "tokenizer_hash": tfds.features.Text(),
}
LATENT_FEATURES = tfds.features.FeaturesDict(
    {"latents": exact(np.float16, None, None, None, None), **_COMMON}  # (t, h, w, c), normalised
)
CODE_FEATURES = tfds.features.FeaturesDict(
    {"codes": exact(np.uint8, None), **_COMMON}  # (t, h, w) by `pack_codes`
)
TEXT_FEATURES = {
    EMBEDDINGS: exact(np.float16, None, None),  # (tokens, width); of none one row: TFDS reads no 0
    LENGTH: tfds.features.Scalar(np.int64),  # tokens
    "text_hash": tfds.features.Text(),
}


class _Encoded(NamedTuple):
    number: int
    batch: HostBatch
    latents: jax.Array  # or codes
    text: Embeddings | None


def encode_dataset(
    tokenizer: FrozenTokenizer,
    data: DataConfig,
    output: str | Path,
    *,
    text: FrozenTextConfig | None = None,
    epochs: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    batches_per_shard: int = 32,
    overwrite: bool = False,
    progress: bool = True,
    process: tuple[int, int] | None = None,
) -> Dataset:
    """Encodes `epochs` random clips of every video, on all devices of all processes.

    Of a table of buckets each epoch draws each video's anew, so that its clips differ in size and
    length.

    Every process encodes a run of consecutive shards on its own devices. What is written depends
    on the number of neither (that of a process's devices may change the rounding). Interrupted and
    called again with the same arguments, it goes on with the shards that are missing.

    Args:
      tokenizer: encodes; its hash goes into the dataset and every record.
      data: the prepared videos and how clips are cut from them.
      output: the folder to write, the same for all processes.
      text: an encoder whose embeddings of the captions go into the records with its hash; captions
        that are too long are cut.
      epochs: passes over the videos; each cuts its clips at other times.
      batch_size: clips encoded together.
      seed: of the clips' times and buckets.
      batches_per_shard: batches whose latents make up a file; a shard is whole or missing.
      overwrite: replace a dataset in `output`, and begin anew what was interrupted.
      progress: show a progress bar.
      process: which of how many processes this is; by default as JAX says.

    Raises:
      UserError: the dataset or the output does not fit, or `output` was begun in another way.
    """
    dataset = open_dataset(data.path)
    if dataset.metadata.get("kind") == "latents":
        raise UserError(f"{data.path} holds latents already: give prepared videos.")
    if min(epochs, batch_size, batches_per_shard) < 1:
        raise UserError(
            f"epochs={epochs}, batch_size={batch_size} and batches_per_shard={batches_per_shard} "
            "must be at least 1."
        )
    data = dataclasses.replace(data, max_broken=0.0)  # latents of another video are no stand-in
    # In the records' order: so a row is known that only fills up a batch.
    order = {"split": "all", "shuffle": False, "redraw": True}
    pipeline = Pipeline(dataset, data, batch_size=batch_size, seed=seed, **order)
    config = tokenizer.config
    for shapes in pipeline.shapes():
        config.latent_shape(*shapes["video"].shape[1:4])  # refuses what does not fit
    discrete = config.quantizer.num_codes(config.latent_channels) is not None
    settings = {
        "tokenizer_hash": tokenizer.hash,
        "videos": dataset.fingerprint,
        "num_frames": data.num_frames,
        "fps": data.fps,
        "sizes": data.sizes,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "batches_per_shard": batches_per_shard,
    }
    encoder = None if text is None else FrozenText.open(text)
    if encoder is not None:
        settings["text"] = {"hash": encoder.hash, "max_tokens": text.max_tokens}
    if data.buckets is not None:
        settings["buckets"] = dataclasses.asdict(data.buckets)
    batches = range(pipeline.plan.batches_before(epochs))
    shards = [batches[k : k + batches_per_shard] for k in batches[::batches_per_shard]]
    features = CODE_FEATURES if discrete else LATENT_FEATURES
    if encoder is not None:
        features = tfds.features.FeaturesDict({**features, **TEXT_FEATURES})
    process = process or (jax.process_index(), jax.process_count())

    def clips(numbers: Iterable[int]) -> int:
        return sum(len(_new_rows(pipeline.plan(k)[1])) for i in numbers for k in shards[i])

    def examples(encoded: Iterable[_Encoded], bar: tqdm.tqdm) -> Iterator[dict[str, Any]]:
        for k, batch, latents, said in encoded:
            records, latents = pipeline.plan(k)[1], np.asarray(latents)
            said = None if said is None else jax.device_get(said)
            t, h, w = latents.shape[1:4]
            for row in _new_rows(records):
                latent = latents[row]
                content = (
                    {"codes": pack_codes(latent, config.latent_channels)}
                    if discrete
                    else {"latents": latent}
                )
                if said is not None:
                    length = int(said.mask[row].sum())
                    tokens = said.tokens[row, : max(1, length)]
                    check_finite(tokens, text.path)
                    content |= {EMBEDDINGS: tokens, LENGTH: length, "text_hash": encoder.hash}
                yield content | {
                    "num_frames": t,
                    "height": h,
                    "width": w,
                    "fps": float(batch["fps"][row]),
                    "caption": str(batch["caption"][row]),
                    "label": int(batch["label"][row]),
                    "source": dataset.index["source"][records[row]],
                    "tokenizer_hash": tokenizer.hash,
                }
                bar.update()

    with Parts(
        output, features, len(shards), settings, process=process, overwrite=overwrite
    ) as parts:
        missing = parts.missing()
        total, quiet = clips(parts.mine), not progress or process[0] > 0
        done = total - clips(missing)
        with progress_bar(
            total=total, initial=done, what="encode", unit="clip", disable=quiet
        ) as bar:
            numbers = [k for i in missing for k in shards[i]]
            encoded = _encode(tokenizer, encoder, pipeline, numbers, discrete)
            for shard, results in itertools.groupby(
                encoded, lambda r: r.number // batches_per_shard
            ):
                parts.write(shard, examples(results, bar))
        return parts.finish(
            name="latents",
            description=f"Latents of {dataset.directory.name} by tokenizer {tokenizer.hash}.",
            metadata=_metadata(tokenizer, encoder, dataset, discrete),
        )


def _metadata(
    tokenizer: FrozenTokenizer, encoder: FrozenText | None, videos: Dataset, discrete: bool
) -> dict[str, Any]:
    metadata = {
        "kind": "latents",
        "tokenizer_hash": tokenizer.hash,
        "latent_channels": tokenizer.config.latent_channels,
        "dtype": "float16",
        "label_names": list(videos.label_names),
        "videos": videos.fingerprint,
    }
    if discrete:  # what makes latents of codes
        moments = {"mean": tokenizer.mean, "std": tokenizer.std}
        metadata["codes"] = {name: np.asarray(x).tolist() for name, x in moments.items()}
    if encoder is not None:
        text = encoder.config
        metadata["text"] = {
            "hash": encoder.hash,
            "width": text.width,
            "max_tokens": text.max_tokens,
        }
    return metadata


def _new_rows(records: np.ndarray) -> np.ndarray:
    """The rows of a batch that an epoch has not had.

    Records rise within a bucket; its last batch is filled up from the bucket's start.
    """
    rows = np.unique(records, return_index=True)[1]
    return rows[records[rows] >= records[0]]


def _encode(
    tokenizer: FrozenTokenizer,
    encoder: FrozenText | None,
    pipeline: Pipeline,
    numbers: Sequence[int],
    discrete: bool,
) -> Iterator[_Encoded]:
    """The batches of these numbers, with float16 latents or int32 codes, and their captions read.

    A batch lies over the devices of this process, filled up to a multiple of them; so do the
    weights of a text encoder, which may be large.
    """
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
    weights = place(tokenizer, jax.tree.map(lambda _: replicated(mesh), tokenizer))
    texts = {"text": encoder}
    texts = place(texts, frozen_shardings(texts, mesh))

    @jax.jit
    def encode(weights: FrozenTokenizer, video: jax.Array) -> jax.Array:
        x, layout = to_unit(video), Layout(mesh)
        return weights.codes(x, layout) if discrete else weights.encode(x, layout).astype("float16")

    def encode_long(video: np.ndarray) -> np.ndarray:
        chunk = _CHUNK * tokenizer.config.factors[0]
        first = 1 + chunk - tokenizer.config.factors[0]
        pieces = (place(x, batch_sharding(mesh)) for x in split_frames(video, chunk, first))
        found = encode_chunks(weights, map(to_unit, pieces), Layout(mesh))
        if discrete:
            found = (tokenizer.config.quantizer.codes(weights.denormalise(z)) for z in found)
        latents = np.concatenate([np.asarray(z) for z in found], axis=1)
        return latents if discrete else latents.astype("float16")

    @jax.jit
    def read(encoder: FrozenText, tokens: jax.Array) -> Embeddings:
        return half(encoder(tokens, Layout(mesh)))

    def started() -> Iterator[_Encoded]:
        batches, following = iter(()), None
        for k in numbers:
            if k != following:
                batches = pipeline.batches(k)
            batch, following = next(batches), k + 1
            video, said = batch.pop("video"), None
            rows = np.arange(-(-len(video) // mesh.size) * mesh.size)
            rows = np.minimum(rows, len(video) - 1)
            if encoder is not None:
                tokens = encoder.config.tokenize([str(c) for c in batch["caption"]], cut=True)
                said = read(texts["text"], place(tokens[rows], batch_sharding(mesh)))
            if video.shape[1] > _AT_ONCE:
                latents = encode_long(video[rows])
            else:
                latents = encode(weights, place(video[rows], batch_sharding(mesh)))
            yield _Encoded(k, batch, latents, said)

    # In pairs, so that the devices have the next batch while this one is written.
    for result, _ in itertools.pairwise(itertools.chain(started(), [None])):
        yield result
