"""One update: the same on any mesh, and able to learn."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from walt_jax.models import Conditions, DenoiserConfig, TokenizerConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import Layout, MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import batch_sharding, place
from walt_jax.tasks import DenoiserTask, TokenizerTask
from walt_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from walt_jax.training.state import TrainState, train_step

TOKENIZER = TokenizerTask(
    model=TokenizerConfig(
        channels=8,
        multipliers=(1, 2),
        num_res_blocks=1,
        temporal_downsample=(True,),
        norm_groups=4,
        dtype="float32",
    )
)
DEEP = TokenizerTask(
    model=TokenizerConfig(
        channels=8, multipliers=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4, dtype="float32"
    )
)
DENOISER = DenoiserTask(
    tokenizer="",
    model=DenoiserConfig(
        grid=(3, 16, 2),
        width=32,
        num_heads=8,
        num_layers=2,
        windows=((1, 0, 0), (0, 2, 2)),
        num_classes=5,
        dtype="float32",
    ),
)
VIDEO = {"video": np.random.default_rng(0).integers(0, 256, (8, 5, 16, 16, 3), np.uint8)}
LATENTS = {"latents": np.random.default_rng(0).normal(size=(8, 3, 16, 2, 8)).astype(np.float16)}
REST = {"label": np.arange(8, dtype=np.int32) % 5, "fps": np.full((8,), 8, np.float32)}


@functools.cache
def fresh(task):
    """The first state, on the host: what is compiled for it is compiled once a task."""
    optimizer = make_optimizer(OptimizerConfig(), 10_000)
    create = functools.partial(TrainState.create, task, optimizer)
    return jax.device_get(jax.jit(create)(jax.random.key(0)))


def updates(task, batch, mesh_config, steps, rate=1e-3, fixed_noise=False):
    """Losses and the final state, on the host; on as many devices as the mesh has."""
    mesh = make_mesh(mesh_config, jax.devices()[: math.prod(dataclasses.astuple(mesh_config))])
    config = OptimizerConfig(learning_rate=rate, warmup_steps=1, ema_decay=0.9)
    shardings = state_shardings(fresh(task), mesh)
    step = functools.partial(
        train_step,
        task=task,
        optimizer=make_optimizer(config, 10_000),
        schedule=make_schedule(config, 10_000),
        config=config,
        layout=Layout(mesh),
    )
    with jax.set_mesh(mesh):
        state = place(fresh(task), shardings)
        batch = place(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
        jitted = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
        losses = []
        for _ in range(steps):
            if fixed_noise:
                state = dataclasses.replace(state, step=jnp.zeros_like(state.step))
            state, metrics = jitted(state, {}, batch, jax.random.key(7))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


@functools.cache
def reference(name):
    """The same on one device; computed once."""
    task, batch = CASES[name]
    return updates(task, batch, MeshConfig(data=1), 2)


CASES = {
    "denoiser": (DENOISER, LATENTS | REST),
    "tokenizer": (TOKENIZER, VIDEO | REST),
    "deep tokenizer": (DEEP, VIDEO | REST),
}
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "context": MeshConfig(data=1, context=8),
    "data, fsdp and tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "data, tensor and context": MeshConfig(data=2, tensor=2, context=2),
    "fsdp and context": MeshConfig(data=1, fsdp=2, context=4),
    "fsdp, tensor and context": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}


@pytest.mark.parametrize(
    ("name", "mesh"),
    # The deep tokenizer takes long to compile.
    [("denoiser", mesh) for mesh in MESHES]
    + [("tokenizer", "fsdp, tensor and context")]
    + [pytest.param("deep tokenizer", mesh, marks=pytest.mark.slow) for mesh in MESHES],
)
def test_eight_devices_equal_one(name, mesh):
    task, batch = CASES[name]
    losses, state = updates(task, batch, MESHES[mesh], 2)
    expected_losses, expected = reference(name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    for part in ("extra", "params", "ema"):
        ours, theirs = getattr(state, part), getattr(expected, part)
        # Adam's first updates are +-rate wherever the gradient's sign is noise.
        tolerance = 1e-5 if part == "extra" else 2.5e-3
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), ours, theirs)  # noqa: B023
        total = sum(float(np.abs(a - b).sum()) for a, b in _pairs(ours, theirs))
        size = sum(a.size for a, _ in _pairs(ours, theirs))
        assert total <= 2e-4 * size  # a wrong gradient moves all by 1e-3


def test_a_state_is_made_the_same_on_any_mesh():
    mesh = make_mesh(MESHES["fsdp, tensor and context"])
    expected = fresh(DENOISER)
    create = functools.partial(TrainState.create, DENOISER, make_optimizer(OptimizerConfig(), 10))
    made = jax.jit(create, out_shardings=state_shardings(expected, mesh))(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made, expected)


@pytest.mark.parametrize("name", ["denoiser", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_bfloat16_follows_float32(name):
    """What accelerators compute in, on a mesh of every kind of axis; the state stays float32."""
    task, batch = CASES[name]
    task = dataclasses.replace(task, model=dataclasses.replace(task.model, dtype="bfloat16"))
    losses, state = updates(task, batch, MESHES["data, fsdp and tensor"], 2)
    np.testing.assert_allclose(losses, reference(name)[0], rtol=0.02)
    leaves = jax.tree.leaves((state.params, state.ema, state.opt_state, state.extra))
    assert all(x.dtype in (np.float32, np.int32) and np.all(np.isfinite(x)) for x in leaves)


def _pairs(a, b):
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_fsdp_and_tensor_really_shard():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    shapes = jax.eval_shape(
        functools.partial(TrainState.create, DENOISER, optimizer), jax.random.key(0)
    )
    shardings = state_shardings(shapes, mesh)
    spec = shardings.params["stages"][0]["layers"][0]["attentions"][0]["qkv"]["kernel"].spec
    assert tuple(spec) == (None, ("fsdp", "tensor"), None)
    moments = [
        s.spec
        for path, s in jax.tree_util.tree_leaves_with_path(shardings.opt_state)
        if "qkv" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 4 and all(s == spec for s in moments)  # mu and nu, two layers


def test_a_tokenizer_gathers_its_weights_and_a_denoiser_keeps_tensor():
    """A tokenizer's tensor axis divides columns: AdaGN's dense layers may not divide features."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout, shapes = Layout(mesh), TOKENIZER.network.shapes()
    divided = state_shardings(shapes, mesh)
    assert "tensor" in divided["decoder"]["levels"][0]["norm"]["gamma"]["kernel"].spec
    gather = jax.jit(
        lambda params: nnx.to_pure_dict(nnx.split(TOKENIZER._bind(params, layout))[1]),
        in_shardings=(divided,),
    )
    gathered = jax.tree.leaves(gather.lower(shapes).compile().output_shardings)
    assert gathered and all(s.is_fully_replicated for s in gathered)
    z, t = jnp.zeros(LATENTS["latents"].shape), jnp.zeros((8,), jnp.int32)
    network, label = DENOISER.network, Conditions(label=t)
    program = jax.make_jaxpr(lambda p: network.bind(p)(z, t, label, layout))(network.shapes())
    kept = re.findall(r"spec=P\([^)]*'tensor'", str(program))
    assert len(kept) == 2 * 5  # a layer's matrices, but that of queries, keys and values


def test_gradients_of_gathered_weights_lie_as_the_weights():
    """A constraint's own transpose would make every device hold the whole gradient first."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    network, layout = DENOISER.network, Layout(mesh)
    shapes = network.shapes()
    shardings = state_shardings(shapes, mesh)
    z, t = jnp.zeros(LATENTS["latents"].shape), jnp.zeros((8,), jnp.int32)
    gradient = jax.jit(
        jax.grad(lambda p: network.bind(p)(z, t, Conditions(label=t), layout).sum()),
        in_shardings=(shardings,),
    )
    found = gradient.lower(shapes).compile().output_shardings
    layers = [tree["stages"][0]["layers"] for tree in (shardings, found, shapes)]
    named = jax.tree_util.tree_leaves_with_path(layers[0])
    kernels = 0
    for (path, ours), theirs, leaf in zip(named, *map(jax.tree.leaves, layers[1:])):
        if "'kernel'" in jax.tree_util.keystr(path) and not ours.is_fully_replicated:
            assert theirs.is_equivalent_to(ours, leaf.ndim), path
            kernels += 1
    assert kernels


def test_tensor_moves_no_activations_between_queries_keys_and_values():
    """Parts of a weight at most, which are split as the activations lie."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    z, t = jnp.zeros(LATENTS["latents"].shape), jnp.zeros((8,), jnp.int32)
    network, layout = DENOISER.network, Layout(mesh)
    shapes = network.shapes()
    shardings = state_shardings(shapes, mesh)
    forward = jax.jit(
        lambda p: network.bind(p)(z, t, Conditions(label=t), layout), in_shardings=(shardings,)
    )
    program = forward.lower(shapes).compile().as_text()
    assert "all-reduce" in program
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* collective-permute", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in moved]
    assert max(sizes, default=0) <= 32 * 32 < 2 * 96 * 16  # a device's tokens


@pytest.mark.slow
def test_the_tokenizer_learns_one_batch():
    y, x = np.mgrid[0:16, 0:16]
    ramp = np.stack([x * 16, y * 16, 255 - x * 16], -1).astype(np.uint8)
    batch = {"video": np.broadcast_to(ramp, (8, 5, 16, 16, 3)).copy()} | REST
    losses, state = updates(TOKENIZER, batch, MeshConfig(data=1), 120, rate=1e-2)
    assert losses[-1] < 0.02 * losses[0]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_the_denoiser_learns_one_batch():
    losses, _ = updates(
        DENOISER, LATENTS | REST, MeshConfig(data=1), 150, rate=1e-2, fixed_noise=True
    )
    assert losses[-1] < 0.25 * losses[0]


def test_what_a_row_draws_depends_on_no_other_row():
    """The loss of a batch is the mean of its halves' where rows keep their place."""
    network = DENOISER.network
    params = network.init(jax.random.key(0))
    batch = {k: jnp.asarray(v) for k, v in (LATENTS | REST).items()}

    step = jnp.zeros((), jnp.int32)
    loss = jax.jit(lambda *x: DENOISER.loss(x[0], {}, {}, *x[1:], step, Layout())[0])

    def errors(batch):
        return float(loss(params, batch, jax.random.key(3)))

    first = {k: v[:4] for k, v in batch.items()}
    changed = {k: jnp.concatenate([v[:4], v[:4]]) for k, v in batch.items()}
    assert errors(first) == pytest.approx(errors(first))
    assert errors(changed) != pytest.approx(errors(batch))


def test_the_frozen_tokenizer_normalises_and_names_itself():
    params = jax.device_get(TOKENIZER.network.init(jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(1), (4, 5, 16, 16, 3), minval=-1.0)
    model = TOKENIZER.network.bind(params)
    z = jax.jit(model.encode)(x)
    moments = np.asarray(z.mean((0, 1, 2, 3))), np.asarray((z * z).mean((0, 1, 2, 3)))
    frozen = FrozenTokenizer.create(TOKENIZER.model, params, *moments)
    normal = np.asarray(frozen.encode(x))
    np.testing.assert_allclose(normal.mean((0, 1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(normal.std((0, 1, 2, 3)), 1, atol=1e-3)
    decoded = np.clip(np.asarray(jax.jit(model.decode)(z)), -1, 1)
    np.testing.assert_allclose(frozen.decode(normal), decoded, atol=1e-4)
    other = FrozenTokenizer.create(TOKENIZER.model, params, moments[0] + 1e-3, moments[1])
    assert frozen.hash != other.hash and len(frozen.hash) == 16
    recomputing = dataclasses.replace(TOKENIZER.model, remat=True)
    assert FrozenTokenizer.create(recomputing, params, *moments).hash == frozen.hash
