"""Optimizers: what they move, and how fast."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig
from walt_jax.parallel import Layout, MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import batch_sharding, place
from walt_jax.tasks import DenoiserTask
from walt_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from walt_jax.training.state import TrainState, train_step

TASK = DenoiserTask(
    tokenizer="",
    model=DenoiserConfig(
        grid=(1, 4, 4),
        latent_channels=2,
        width=16,
        num_heads=2,
        num_layers=2,
        windows=((0, 0, 0),),
        dtype="float32",
    ),
)
BATCH = {
    "latents": np.random.default_rng(0).normal(size=(8, 1, 4, 4, 2)).astype(np.float32),
    "label": np.zeros(8, np.int32),
}
LEARNING = {
    "adafactor": OptimizerConfig(
        name="adafactor",
        learning_rate=3e-3,
        warmup_steps=1,
        accumulate=2,
        grad_dtype="bfloat16",
    ),
    "muon": OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=1, weight_decay=0.01),
    "accumulated in float32": OptimizerConfig(warmup_steps=1, grad_clip=0.0, accumulate=2),
    "accumulated in bfloat16": OptimizerConfig(
        warmup_steps=1, grad_clip=0.0, accumulate=2, grad_dtype="bfloat16"
    ),
}


@functools.cache
def fresh(config):
    """The first state, on the host."""
    create = functools.partial(TrainState.create, TASK, make_optimizer(config, 100))
    return jax.device_get(jax.jit(create)(jax.random.key(0)))


@functools.cache
def program(config, mesh_config):
    """The mesh, the first state and the batch on it, and the compiled step."""
    mesh = make_mesh(mesh_config, jax.devices()[: math.prod(dataclasses.astuple(mesh_config))])
    shardings = state_shardings(fresh(config), mesh)
    step = functools.partial(
        train_step,
        task=TASK,
        optimizer=make_optimizer(config, 100),
        config=config,
        schedule=make_schedule(config, 100),
        layout=Layout(mesh),
    )
    batch = place(BATCH, jax.tree.map(lambda _: batch_sharding(mesh), BATCH))
    return (
        mesh,
        place(fresh(config), shardings),
        batch,
        jax.jit(step, out_shardings=(shardings, None)),
    )


def train(config, steps, mesh_config=None):
    """Losses, metrics of the last step, the first state and the last; else on one device."""
    mesh, first, batch, step = program(config, mesh_config or MeshConfig(data=1))
    state, losses = first, []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state = dataclasses.replace(state, step=jnp.zeros_like(state.step))  # the same noise
            state, metrics = step(state, {}, batch, jax.random.key(1))
            losses.append(float(metrics["loss"]))
    return losses, metrics, first, state


def moved(first, last):
    """Which parameters changed, by the first two names of their paths."""
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, last.params)
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(changed):
        out.setdefault(path[0].key, []).append(leaf)
    return {name: any(leaves) for name, leaves in out.items()}


def test_frozen_parameters_stay_and_the_others_move():
    config = OptimizerConfig(
        frozen=("^stages/", "embedding$"), weight_decay=0.1, warmup_steps=1, grad_clip=1.0
    )
    _, metrics, first, last = train(config, 3)
    assert moved(first, last) == {
        "patch_in": True, "spatial_embedding": False, "embed": True, "adaln": True,
        "stages": False, "adaln_out": True, "patch_out": True,
    }  # fmt: skip
    assert metrics["grad_norm/stages"] == 0 < metrics["grad_norm/patch_out"]
    sizes = [x.size for x in jax.tree.leaves(last.opt_state) if x.ndim]
    stages = sum(x.size for x in jax.tree.leaves(last.params["stages"]))
    total = sum(x.size for x in jax.tree.leaves(last.params))
    assert sum(sizes) <= 2 * (total - stages)  # no moments of what is frozen


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("nowhere",), "found in the path of no parameter"),
        (("",), "leaves no parameter to train"),
        (("(",), "no regular expression"),
    ],
)
def test_freezing_nothing_or_all_is_one_sentence(frozen, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(frozen=frozen), 10).init(TASK.init(jax.random.key(0)))


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adafactor_learns_with_little_memory(b1):
    config = dataclasses.replace(LEARNING["adafactor"], b1=b1)
    losses, _, _, _ = train(config, 40)
    assert losses[-1] < 0.5 * losses[0]
    wide = {"kernel": jnp.zeros((256, 512))}
    kept = jax.tree.leaves(make_optimizer(config, 10).init(wide))
    assert sum(x.size for x in kept) < 2000 + (b1 > 0) * 256 * 512


def test_schedules():
    cosine = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 110)
    constant = make_schedule(
        OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="constant"), 110
    )
    for schedule in (cosine, constant):
        assert schedule(0) == pytest.approx(0.1) and schedule(10) == pytest.approx(1.0)
    assert cosine(60) == pytest.approx(0.5, abs=0.01) and cosine(110) == pytest.approx(0, abs=1e-6)
    assert constant(110) == pytest.approx(1.0)


def test_no_moving_average_is_the_parameters():
    _, _, _, last = train(OptimizerConfig(ema_decay=0.0, warmup_steps=1), 2)
    jax.tree.map(np.testing.assert_array_equal, last.ema, last.params)
    _, _, _, last = train(LEARNING["adafactor"], 2)
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(last.ema), jax.tree.leaves(last.params))
    )


def test_muon_learns_and_orthogonalises_kernels_only():
    losses, _, _, _ = train(LEARNING["muon"], 40)
    assert losses[-1] < 0.5 * losses[0]
    rng = np.random.default_rng(0)
    shapes = {"dense": (48, 16), "stacked": (3, 16, 48), "conv": (3, 3, 3, 8, 16)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    params["dense"]["bias"] = jnp.zeros(16)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(OptimizerConfig(name="muon", warmup_steps=1, grad_clip=0.0), 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    rate = OptimizerConfig().learning_rate
    for name, (inputs, outputs) in {
        "dense": (48, 16),
        "stacked": (16, 48),
        "conv": (3 * 3 * 3 * 8, 16),
    }.items():
        for matrix in np.asarray(updates[name]["kernel"]).reshape(-1, inputs, outputs):
            values = np.linalg.svd(matrix / rate, compute_uv=False)
            scale = 0.2 * np.sqrt(max(inputs, outputs))
            assert np.all((0.5 * scale < values) & (values < 1.4 * scale))
    np.testing.assert_allclose(np.abs(updates["dense"]["bias"]), rate, rtol=1e-3)  # Adam's first


@functools.cache
def gradients_by_hand():
    """Losses and gradients of every second row, each half with its own noise."""
    params = fresh(LEARNING["accumulated in float32"]).params
    key = jax.random.fold_in(jax.random.key(1), 0)

    @jax.jit
    def part(rows, number):
        def loss(params):
            step = jnp.zeros((), jnp.int32)
            own = jax.random.fold_in(key, number)
            return TASK.loss(params, {}, {}, rows, own, step, Layout())[0]

        return jax.value_and_grad(loss)(params)

    return tuple(zip(*(part({name: x[i::2] for name, x in BATCH.items()}, i) for i in (0, 1))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulated_gradients_are_the_mean_of_the_parts(dtype):
    _, metrics, _, _ = train(LEARNING[f"accumulated in {dtype}"], 1)
    values, grads = gradients_by_hand()
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert float(metrics["loss"]) == pytest.approx(float(sum(values)) / 2, rel=1e-5)
    norms = {name: float(optax.global_norm(part)) for name, part in mean.items()}
    got = {name: float(metrics[f"grad_norm/{name}"]) for name in norms}
    assert got == pytest.approx(norms, rel=tolerance)
    if dtype == "bfloat16":
        assert got != pytest.approx(norms, rel=1e-6)  # it was rounded


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_eight_devices_update_as_one(name):
    """Moments by rows and columns of gradients summed in bfloat16, and orthogonal matrices."""
    expected, _, _, theirs = train(LEARNING[name], 5)
    losses, _, _, ours = train(LEARNING[name], 5, MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params)):
        apart = np.abs(np.asarray(a) - np.asarray(b))  # a sum may round to the next bfloat16
        assert apart.max() < 5e-4 and apart.mean() < 1e-5
