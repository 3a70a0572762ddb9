"""Training on packed rows is training on the videos, one by one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import small_text
from test_denoiser_task import TEXT, random_params

from walt_jax.data.packing import Packed, PackingConfig, chosen, fill_row
from walt_jax.diffusion import Diffusion, Linear, MinSnr
from walt_jax.errors import UserError
from walt_jax.models import Conditions, DenoiserConfig
from walt_jax.models.text import to_bytes
from walt_jax.parallel import Layout, MeshConfig, make_mesh
from walt_jax.parallel.sharding import batch_sharding
from walt_jax.tasks import DenoiserTask, sample_keys
from walt_jax.tasks.given import GivenConfig, draw_block_masks, draw_masks

WINDOWS = DenoiserConfig(
    grid=(2, 8, 8),
    latent_channels=2,
    width=16,
    num_heads=4,
    num_layers=2,
    windows=((1, 0, 0), (2, 4, 4)),
    positions="fractional",
    self_conditioning=True,
    num_classes=4,
    remat=False,
    dtype="float32",
)
TOKENS = dataclasses.replace(
    WINDOWS,
    patch_size=(1, 2, 2),
    windows=((0, 0, 0),),
    relative_bias=False,
    image_identity=False,
    self_conditioning=False,
)
SHAPES = [(2, 4, 4), (4, 4, 8), (2, 4, 4)]
ROWS = [(0, 1), (2,)]  # videos of each row
WITH_IMAGE = [(2, 4, 4), (4, 4, 8), (1, 4, 6)]
STEP = np.zeros((), np.int32)


def packed_batch(packing, drop=1.0, shapes=SHAPES):
    """The videos, and the batch of the rows that hold them."""
    rng = np.random.default_rng(0)
    clips = [
        {
            "latents": rng.standard_normal((*shape, 2)).astype(np.float32),
            "label": np.int32(i + 1),
            "text": to_bytes(f"video {i}", 12),
            "text_embeddings": rng.standard_normal((5, 8)).astype(np.float16),
            "text_length": np.int32(i + 2),
        }
        for i, shape in enumerate(shapes)
    ]
    counts = packing.count(np.array(shapes))
    rows = [tuple(Packed(i, max(1, round(drop * counts[i])), 0) for i in row) for row in ROWS]
    filled = [fill_row(row, lambda i: dict(clips[i]), packing, seed=0) for row in rows]
    batch = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
    return clips, rows, batch


def read(task, batch):
    """Of a batch what the task's captions are: bytes or embeddings."""
    cached = task.text is not None and not task.text.trained
    return {n: x for n, x in batch.items() if cached or not n.startswith("text_")}


def drawn(task, packing, rows, clips):
    """Clip, time, noise and what is given of each video, drawn as the task is to draw them."""
    for key, row in zip(sample_keys(jax.random.key(3), len(rows)), rows):
        for video, own in zip(row, sample_keys(key, packing.videos)):
            clip = clips[video.record]
            x0 = clip["latents"]
            t = task.diffusion.process.draw_times(jax.random.fold_in(own, 0)[None])
            eps, noise = np.zeros(x0.shape, np.float32), jax.random.fold_in(own, 2)
            for place in np.ndindex(*(n // b for n, b in zip(x0.shape, packing.block))):
                corner = np.array(place) * packing.block
                number = (corner[0] * 2**10 + corner[1]) * 2**10 + corner[2]
                at = tuple(slice(c, c + b) for c, b in zip(corner, packing.block))
                eps[at] = NORMAL(jax.random.fold_in(noise, int(number)), packing.block)
            given = np.zeros((1, *x0.shape[:3]), bool)
            if task.model.given != "none" and len(x0) > 1:
                given = draw_masks(task.given, jax.random.fold_in(own, 4)[None], x0.shape[:3])
            yield clip, t, eps[None], given


NORMAL = jax.jit(lambda key, block: jax.random.normal(key, (*block, 2)), static_argnums=1)


def by_hand(task, params, videos):
    """The mean over the videos of the loss of each alone."""
    total = 0.0
    for clip, t, eps, mask in videos:
        x0 = clip["latents"][None]
        x_t = task.diffusion.add_noise(x0, eps, t)
        told = Conditions(label=clip["label"][None])
        if task.model.given != "none":
            told = dataclasses.replace(told, given=x0, given_mask=mask)
        if task.text is not None:
            if task.text.trained:
                text, seen = task.text_network.bind(params["text"])(clip["text"][None])
            else:
                text = clip["text_embeddings"][None]
                seen = np.arange(5)[None] < clip["text_length"]
            told = dataclasses.replace(told, text=text, text_mask=seen)
        denoiser = {k: v for k, v in params.items() if k != "text"}
        if task.model.self_conditioning:
            fixed, said = jax.lax.stop_gradient((denoiser, told))
            estimate = task.diffusion.read(task.network.bind(fixed)(x_t, t, said), x_t, t).x0
            estimate = jax.numpy.where(mask[..., None], x0, estimate)
            told = dataclasses.replace(told, estimate=estimate)
        out = task.network.bind(denoiser)(x_t, t, told)
        total = total + task.diffusion.losses(out, x0, eps, t, ~mask[..., None])[0]
    return total / len(videos)


def same(a, b):
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale, rtol=1e-3), a, b)


PLAIN = {"class_dropout": 0.0, "self_conditioning": 1.0, "tokenizer": ""}
TASKS = {
    "windows": (DenoiserTask(model=WINDOWS, **PLAIN), (2, 4, 4), 6),
    "tokens": (DenoiserTask(model=TOKENS, **PLAIN), (1, 2, 2), 48),
    "text": (
        DenoiserTask(
            model=dataclasses.replace(WINDOWS, text_features=8),
            text=TEXT,
            text_dropout=0.0,
            diffusion=Diffusion(Linear(), weight=MinSnr()),
            **PLAIN,
        ),
        (2, 4, 4),
        6,
    ),
    "embeddings": (
        DenoiserTask(
            model=dataclasses.replace(WINDOWS, text_features=8),
            text=small_text.t5("nowhere", model=dataclasses.replace(small_text.T5, width=8)),
            text_dropout=0.0,
            **PLAIN,
        ),
        (2, 4, 4),
        6,
    ),
}


MASKS = GivenConfig(first=0.2, last=0.2, random=0.3, region=0.3, first_frames=(1,))
for given, model in (("channels", WINDOWS), ("in_place", TOKENS)):
    name = f"{'windows' if model is WINDOWS else 'tokens'}, given {given}"
    model = dataclasses.replace(model, given=given)
    _, *sizes = TASKS["windows" if model.relative_bias else "tokens"]
    TASKS[name] = (DenoiserTask(model=model, given=MASKS, **PLAIN), *sizes)
SLOW = ("windows", "tokens", "text", "embeddings", "tokens, given in_place")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TASKS]
)
def test_loss_and_gradients_are_those_of_the_videos(name):
    task, block, blocks = TASKS[name]
    packing = PackingConfig(block, blocks, 3)
    # A row of tokens holds an image, too.
    clips, rows, batch = packed_batch(packing, shapes=WITH_IMAGE if block[0] == 1 else SHAPES)
    params, key = random_params(task), jax.random.key(3)

    def packed(params):
        return task.loss(params, {}, None, read(task, batch), key, STEP, Layout())[0]

    videos = list(drawn(task, packing, rows, clips))
    if task.model.given != "none":
        assert any(mask.any() for *_, mask in videos)
    alone = functools.partial(by_hand, task, videos=videos)
    ours, theirs = (jax.jit(jax.value_and_grad(f))(params) for f in (packed, alone))
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
    same(ours[1], theirs[1])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(ours[1]))


def test_what_is_given_does_not_depend_on_the_row():
    """Blocks of a clip, wherever they lie, are given what the clip is given."""
    keys, grid, block = jax.random.split(jax.random.key(5), 64), (4, 4, 8), (2, 4, 4)
    corners, sizes = (np.array([n] * 64, np.int32) for n in ((2, 0, 4), grid))
    both = jax.jit(
        lambda *of: (draw_masks(MASKS, of[0], grid), draw_block_masks(MASKS, *of, block))
    )
    clips, found = map(np.asarray, both(keys, corners, sizes))
    differ = (found != clips[:, 2:, :, 4:]).any((1, 2, 3))
    assert differ.sum() < 8 and not clips[differ].any()  # all frames came up heads
    assert len({m.tobytes() for m in found}) > 5


@pytest.mark.slow
def test_of_a_video_given_whole_nothing_is():
    """Both frames of the smaller clips would be given: they count as if nothing were."""
    task, block, blocks = TASKS["windows, given channels"]
    task = dataclasses.replace(task, given=GivenConfig(first=1.0, first_frames=(2,)))
    nothing = dataclasses.replace(task, given=GivenConfig(random=1e-9))
    _, _, batch = packed_batch(PackingConfig(block, blocks, 3))
    params, key = random_params(task), jax.random.key(3)
    loss = jax.jit(
        lambda task: task.evaluate(params, {}, None, batch, key, Layout())["loss"], static_argnums=0
    )
    ours, plain = (np.asarray(loss(t)) for t in (task, nothing))
    assert (ours[plain > 0] > 0).all()
    np.testing.assert_allclose(ours[[0, 1], [0, 0]], plain[[0, 1], [0, 0]], rtol=1e-6)
    assert abs(ours[0, 1] / plain[0, 1] - 1) > 1e-3


def test_the_loss_is_of_the_tokens_that_are_kept():
    """With half of the tokens dropped the padding and what is dropped change nothing."""
    task, block, blocks = TASKS["tokens"]
    packing = PackingConfig(block, blocks, 3)
    _, rows, batch = packed_batch(packing, drop=0.5)
    params, key = random_params(task), jax.random.key(3)
    loss = jax.jit(lambda batch: task.loss(params, {}, None, batch, key, STEP, Layout()))
    value, (metrics, _) = loss(batch)
    kept = (batch["segments"] >= 0).sum()
    assert kept == sum(video.kept for row in rows for video in row) == 4 + 16 + 4
    assert metrics["videos"] == 3 and metrics["padding"] == pytest.approx(1 - kept / 96)
    noisy = batch | {"latents": batch["latents"].copy()}
    noisy["latents"][batch["segments"] < 0] = 7.0
    assert float(loss(noisy)[0]) == pytest.approx(float(value), rel=1e-6)
    assert len(chosen(rows[0][1], 32, seed=0)) == 16


def test_evaluation_is_the_mean_over_the_videos():
    task, block, blocks = TASKS["tokens"]
    _, _, batch = packed_batch(PackingConfig(block, blocks, 3))
    params, key = random_params(task), jax.random.key(0)
    run = jax.jit(lambda b: task.evaluate(params, {}, None, b, key, Layout())["loss"])
    losses = np.asarray(run(batch))
    assert losses.shape == (2, 3) and (losses[0, 2], losses[1, 1], losses[1, 2]) == (0, 0, 0)
    real = losses[losses > 0] * 3 / 6
    assert losses.mean() == pytest.approx(real.mean(), rel=1e-6)


def test_rows_are_divided_over_the_devices():
    task, block, blocks = TASKS["windows"]
    _, _, batch = packed_batch(PackingConfig(block, blocks, 3))
    params, key = random_params(task), jax.random.key(3)

    def loss(params, batch, layout):
        return task.loss(params, {}, None, batch, key, STEP, layout)[0]

    alone = jax.jit(lambda p, b: loss(p, b, Layout()))(params, batch)
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    placed = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        together = jax.jit(lambda p, b: loss(p, b, Layout(mesh)))(params, placed)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


def test_a_block_is_a_multiple_of_the_patch():
    task, _, _ = TASKS["tokens"]
    _, _, batch = packed_batch(PackingConfig((1, 1, 1), 256, 3))
    with pytest.raises(UserError, match=r"multiple of config\.task\.model\.patch_size"):
        task.loss(random_params(task), {}, None, batch, jax.random.key(0), STEP, Layout())
