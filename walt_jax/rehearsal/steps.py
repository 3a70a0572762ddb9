"""The programs of a config, ready to compile without data, weights or devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from walt_jax.data.captions import Captions
from walt_jax.data.joint import IMAGES
from walt_jax.data.pipeline import DataConfig
from walt_jax.errors import UserError
from walt_jax.models.text import Embeddings, TextConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import Layout, state_shardings
from walt_jax.parallel.sharding import batch_sharding, lying, replicated
from walt_jax.tasks import DenoiserTask, Wanted
from walt_jax.tasks.base import to_unit
from walt_jax.tasks.captions import Text
from walt_jax.training.experiment import Experiment
from walt_jax.training.flops import forward_flops
from walt_jax.training.program import Program

KINDS = ("train", "sample", "encode")
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Step:
    """One program of a run.

    Attributes:
      name: what it is of.
      clips: that it takes or makes, over all devices.
      flops: counts model FLOPs, over all devices.
      lower: traces it for the mesh.
    """

    name: str
    clips: int
    flops: Callable[[], float]
    lower: Callable[[], jax.stages.Lowered]


def steps(experiment: Experiment, mesh: Mesh, kind: str) -> list[Step]:
    """What `kind` of work compiles: a training step for every bucket, or one program.

    Raises:
      UserError: no such kind of work for this task, or a mesh that does not fit.
    """
    if kind == "train":
        return list(_training(experiment, mesh))
    task = experiment.task
    if kind == "sample":
        if not isinstance(task, DenoiserTask):
            raise UserError("--job sample needs the config of a denoiser.")
        return [_sampling(task, mesh, experiment.batch_size)]
    if isinstance(task, DenoiserTask):
        raise UserError("--job encode needs the config of a tokenizer.")
    return [_encoding(experiment, mesh)]


def _training(experiment: Experiment, mesh: Mesh) -> Iterator[Step]:
    program, frozen = Program(experiment, mesh), experiment.task.stand_in()
    for name, shapes in batches(experiment):
        yield Step(
            f"training step, {name}",
            experiment.batch_size + experiment.image_batch_size,
            lambda shapes=shapes: program.flops(frozen, shapes),
            lambda shapes=shapes: program.lower(frozen, shapes),
        )


def batches(experiment: Experiment) -> Iterator[tuple[str, Shapes]]:
    """Name and shapes of a batch for every bucket; of cached latents where the task takes such."""
    data, size = experiment.data, experiment.batch_size
    for name, shapes in _clips(experiment, data, size):
        if experiment.images is None:
            yield name, shapes
            continue
        for of_images, images in _clips(experiment, experiment.images, experiment.image_batch_size):
            beside = {f"{IMAGES}{key}": value for key, value in images.items()}
            yield f"{name} and {of_images}", shapes | beside


def _clips(experiment: Experiment, data: DataConfig, size: int) -> Iterator[tuple[str, Shapes]]:
    task = experiment.task
    cached = isinstance(task, DenoiserTask) and task.model.upsampling is None
    # As latents are cached, embeddings of their captions are.
    captions = Captions(data.caption_bytes, task.text_encoder, "cached" if cached else "")
    if data.packing is not None:
        packing = data.packing
        arrays = packing.arrays(task.model.latent_channels, "bfloat16")
        arrays = {n: jax.ShapeDtypeStruct((size, *s), dtype) for n, (s, dtype) in arrays.items()}
        name = f"{size} rows of {packing.blocks} x {'x'.join(map(str, packing.block))}"
        yield name, _common(captions, size, packing.videos) | arrays
        return
    if data.buckets is not None:
        for shape, clips in sorted(data.buckets.batches(size, latents=cached).items()):
            name, kind, channels, dtype = (
                ("latents", "latents ", task.model.latent_channels, jnp.bfloat16)
                if cached
                else ("video", "", 3, jnp.uint8)
            )
            arrays = {name: jax.ShapeDtypeStruct((clips, *shape, channels), dtype)}
            name = f"{clips} x {kind}{'x'.join(map(str, shape))}"
            yield name, _common(captions, clips) | arrays
        return
    common = _common(captions, size)
    if cached:
        frames = 1 if data is experiment.images else task.model.grid[0]
        shape = (size, frames, *task.model.grid[1:], task.model.latent_channels)
        latents = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        yield f"{size} x latents {'x'.join(map(str, shape[1:4]))}", common | {"latents": latents}
        return
    for height, width in data.sizes:
        shape = (size, data.num_frames, height, width, 3)
        video = jax.ShapeDtypeStruct(shape, jnp.uint8)
        yield f"{size} x {'x'.join(map(str, shape[1:4]))}", common | {"video": video}


def _common(captions: Captions, *lead: int) -> Shapes:
    """What a batch holds beside the clips themselves."""
    arrays = {"label": ((), np.int32), "fps": ((), np.float32)} | captions.arrays()
    return {n: jax.ShapeDtypeStruct((*lead, *s), dtype) for n, (s, dtype) in arrays.items()}


def _sampling(task: DenoiserTask, mesh: Mesh, clips: int) -> Step:
    """As `walt_jax.sample` compiles it: all steps of the sampler, and decoding."""
    model, layout = task.model, Layout(mesh)
    params = jax.eval_shape(task.init, jax.random.key(0))
    tokenizer = task.stand_in().tokenizer
    given = None
    if model.given != "none":
        given = jax.ShapeDtypeStruct((clips, *model.grid, model.latent_channels), jnp.float32)
    low = None
    if model.upsampling is not None:
        t, h, w = (n // f for n, f in zip(model.grid, model.upsampling))
        low = jax.ShapeDtypeStruct((clips, t, h, w, model.latent_channels), jnp.float32)
    wanted = Wanted(
        label=jax.ShapeDtypeStruct((clips,), jnp.int32) if model.num_classes else None,
        text=_prompts(task.text, clips),
        given=given,
        given_mask=None if given is None else jax.ShapeDtypeStruct(given.shape[:-1], jnp.bool_),
        low=low,
    )
    rows = jax.ShapeDtypeStruct((clips,), np.int32)

    def run(task: DenoiserTask, layout: Layout, *inputs: Any) -> jax.Array:
        params, tokenizer, wanted, rows = inputs
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(rows)
        guidance = task.guidance
        return task.sample(params, tokenizer, wanted, keys, task.sampler, guidance, layout=layout)

    inputs = params, tokenizer, wanted, rows
    shardings = (
        state_shardings(params, mesh),
        jax.tree.map(lambda _: replicated(mesh), tokenizer),
        *jax.tree.map(lambda _: batch_sharding(mesh), (wanted, rows)),
    )
    return Step(
        f"{clips} samples, {task.sampler.num_steps} steps of {task.sampler.name}, decoded",
        clips,
        lambda: forward_flops(lambda *inputs: run(task.plain(), Layout(), *inputs), *inputs),
        lambda: jax.jit(lambda *inputs: run(task, layout, *inputs)).lower(
            *jax.tree.map(lying, inputs, shardings)
        ),
    )


def _prompts(text: TextConfig | None, clips: int) -> Text | None:
    if text is None:
        return None
    if text.trained:
        return jax.ShapeDtypeStruct((clips, text.max_bytes), jnp.uint8)
    shape = (clips, text.max_tokens)
    return Embeddings(
        jax.ShapeDtypeStruct((*shape, text.width), jnp.float16),
        jax.ShapeDtypeStruct(shape, jnp.bool_),
    )


def _encoding(experiment: Experiment, mesh: Mesh) -> Step:
    """As `walt_jax.encode` compiles it."""
    data, clips = experiment.data, experiment.batch_size
    tokenizer = FrozenTokenizer.abstract(dataclasses.replace(experiment.task.model, remat=False))
    video = jax.ShapeDtypeStruct((clips, data.num_frames, *data.sizes[0], 3), jnp.uint8)
    model = tokenizer.config
    discrete = model.quantizer.num_codes(model.latent_channels) is not None

    def run(tokenizer: FrozenTokenizer, video: jax.Array, layout: Layout) -> jax.Array:
        encode = tokenizer.codes if discrete else tokenizer.encode
        return encode(to_unit(video), layout)

    everywhere = jax.tree.map(lambda x: lying(x, replicated(mesh)), tokenizer)
    return Step(
        f"{clips} clips of {'x'.join(map(str, video.shape[1:4]))} encoded",
        clips,
        lambda: forward_flops(lambda t, v: run(t, v, Layout()), tokenizer, video),
        lambda: jax.jit(lambda t, v: run(t, v, Layout(mesh))).lower(
            everywhere, lying(video, batch_sharding(mesh))
        ),
    )
