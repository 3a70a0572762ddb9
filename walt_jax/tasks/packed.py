"""The denoiser's loss on packed rows: a mean over videos, as it is without packing."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.data.captions import EMBEDDINGS, LENGTH
from walt_jax.data.packing import SEGMENTS
from walt_jax.diffusion import standard_normal
from walt_jax.errors import UserError
from walt_jax.models import Conditions, Packing
from walt_jax.parallel import Layout
from walt_jax.tasks import captions
from walt_jax.tasks.base import Batch, Metrics, PyTree, fold, sample_keys, uniform
from walt_jax.tasks.frozen import Frozen
from walt_jax.tasks.given import draw_block_masks
from walt_jax.training.denoisers import without_text

if TYPE_CHECKING:
    from walt_jax.tasks.denoiser import DenoiserTask


def is_packed(batch: Batch) -> bool:
    """Whether a batch is of packed rows."""
    return SEGMENTS in batch


def packing_of(batch: Batch, patch: tuple[int, int, int]) -> Packing:
    """Where the videos of a batch lie, in tokens of so many latents.

    Raises:
      UserError: a block is no multiple of the patch.
    """
    block = batch["latents"].shape[2:5]
    if any(n % p for n, p in zip(block, patch)):
        raise UserError(
            f"config.data.packing.block={tuple(block)} must be a multiple of "
            f"config.task.model.patch_size={tuple(patch)}."
        )
    sizes = np.asarray(patch, np.int32)
    return Packing(
        batch[SEGMENTS],
        batch["places"] // sizes,
        batch["extents"] // sizes,
        block=tuple(n // p for n, p in zip(block, patch)),
    )


def first_videos(batch: Batch) -> Batch:
    """What is said of the first video of each row, with none of its latents."""
    names = ("label", "text", EMBEDDINGS, LENGTH)
    said = {name: batch[name][:, 0] for name in names if name in batch}
    return said | {"latents": batch["latents"][:, 0, :0]}


def loss(
    task: "DenoiserTask",
    params: PyTree,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
    layout: Layout,
) -> tuple[jax.Array, Metrics]:
    """The mean over the videos that there are, their number, and the share of padding."""
    losses, packing = packed_losses(task, params, frozen, batch, key, layout)
    videos = packing.valid.sum()
    metrics = {"videos": videos, "padding": (packing.segments < 0).mean()}
    return losses.sum() / jnp.maximum(videos, 1), metrics


def evaluate(
    task: "DenoiserTask",
    params: PyTree,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
    layout: Layout,
) -> Metrics:
    """`loss` float32 (B, S) at times spread evenly, whose mean over all is that over the videos."""
    losses, packing = packed_losses(task, params, frozen, batch, key, layout, evaluates=True)
    return {"loss": losses * (losses.size / jnp.maximum(packing.valid.sum(), 1))}


def packed_losses(
    task: "DenoiserTask",
    params: PyTree,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
    layout: Layout,
    *,
    evaluates: bool = False,
) -> tuple[jax.Array, Packing]:
    """The loss of each video, float32 (B, S), 0 where there is none; and where they lie.

    Args:
      task: sizes and shares.
      params: its networks.
      frozen: with its text encoder.
      batch: `latents` (B, N, t, h, w, C), where its blocks belong, `label` (B, S) and so on.
      key: of the noise and all else that is drawn, for each video by itself.
      layout: where activations lie on the mesh.
      evaluates: times are spread evenly, and the network is told everything.
    """
    model, diffusion = task.model, task.diffusion
    packing = packing_of(batch, model.patch_size)
    rows, videos = packing.extents.shape[:2]
    blocks = batch["latents"].shape
    keys = sample_keys(key, rows)
    keys = jax.vmap(lambda k: sample_keys(k, videos))(keys).reshape(-1)  # one a video

    def drawn(tag: int, share: float) -> jax.Array:
        return (uniform(keys, tag) < share).reshape(rows, videos)

    if evaluates:
        order = np.random.default_rng(0).permutation(rows * videos)
        t = jnp.asarray(diffusion.process.even_times(rows * videos)[order])
    else:
        t = diffusion.process.draw_times(fold(keys, 0))
    t = t.reshape(rows, videos)
    conditions = Conditions(label=batch["label"] if model.num_classes else None)
    if model.num_classes and not evaluates:
        label = jnp.where(drawn(1, task.class_dropout), model.num_classes, batch["label"])
        conditions = dataclasses.replace(conditions, label=label)
    if model.text_features:
        text = captions.of_batch(task, frozen, batch, layout)
        if not evaluates:
            text = captions.without(text, drawn(3, task.text_dropout))
        tokens, mask = captions.read(task, params, text)
        conditions = dataclasses.replace(conditions, text=tokens, text_mask=mask)

    def by_block(x: jax.Array) -> jax.Array:
        """What belongs to videos, (B, S), for each block: (B N,)."""
        return packing.of_blocks(x).reshape(-1)

    # Each block is a sample of its own for the process, at its video's time.
    x0 = batch["latents"].astype(jnp.float32).reshape(-1, *blocks[2:])
    times = by_block(t)
    eps = standard_normal(
        _of_places(by_block(fold(keys, 2).reshape(rows, videos)), batch), blocks[2:]
    )
    x_t = diffusion.add_noise(x0, eps, times)

    given = jnp.zeros(x0.shape[:-1], bool)
    if model.given != "none":
        own = by_block(fold(keys, 4).reshape(rows, videos))
        extents = packing.of_blocks(batch["extents"]).reshape(-1, 3)
        places = batch["places"].reshape(-1, 3)
        given = draw_block_masks(task.given, own, places, extents, blocks[2:5])
        if model.grid[0] > 1:  # no image beside videos
            given &= (extents[:, 0] > 1)[:, None, None, None]
        # Of a video that is given whole, as far as it is kept, nothing would be learned.
        left = packing.sum_of_videos((~given).sum((1, 2, 3)).reshape(blocks[:2]))
        given &= by_block(left > 0)[:, None, None, None]
        conditions = dataclasses.replace(
            conditions, given=x0.reshape(blocks), given_mask=given.reshape(blocks[:-1])
        )

    def predict(params: PyTree, conditions: Conditions) -> jax.Array:
        network = task.network.bind(without_text(params))
        out = network(x_t.reshape(blocks), t, conditions, layout, packing)
        return out.reshape(-1, *out.shape[2:])

    if model.self_conditioning and task.self_conditioning > 0:
        guess = predict(*jax.lax.stop_gradient((params, conditions)))
        told = drawn(5, 1.0 if evaluates else task.self_conditioning)
        estimate = jnp.where(given[..., None], x0, diffusion.read(guess, x_t, times).x0)
        estimate = jnp.where(by_block(told).reshape(-1, 1, 1, 1, 1), estimate, 0.0)
        conditions = dataclasses.replace(conditions, estimate=estimate.reshape(blocks))
    counts = ~given
    losses = diffusion.losses(predict(params, conditions), x0, eps, times, counts[..., None])
    weights = counts.sum((1, 2, 3)).reshape(blocks[:2])
    return packing.mean_of_videos(losses.reshape(blocks[:2]), weights), packing


def _of_places(keys: jax.Array, batch: Batch) -> jax.Array:
    """A key a block, of its video's key and its place: noise does not depend on the row."""
    t, h, w = jnp.moveaxis(batch["places"].reshape(-1, 3), -1, 0)
    return jax.vmap(jax.random.fold_in)(keys, (t * 2**10 + h) * 2**10 + w)
