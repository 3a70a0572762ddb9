"""What rests in the memory of hosts: the same numbers come out; checkpoints go in and out."""

import dataclasses

import jax
import numpy as np
import pytest

from walt_jax.data.pipeline import DataConfig
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig
from walt_jax.parallel import MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import batch_sharding, on_host, path_of, place
from walt_jax.tasks import DenoiserTask
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.experiment import Experiment
from walt_jax.training.optimizers import OptimizerConfig
from walt_jax.training.program import Program
from walt_jax.training.progress import Progress

MODEL = DenoiserConfig(
    grid=(2, 4, 4), width=16, num_heads=2, num_layers=4, num_classes=5, dtype="float32",
    windows=((1, 0, 0), (0, 2, 2)), self_conditioning=False,
)  # fmt: skip
BATCH = {
    "latents": np.random.default_rng(0).normal(size=(8, 2, 4, 4, 8)).astype(np.float16),
    "label": np.arange(8, dtype=np.int32) % 5,
}


def trained(offload, offloaded, folder=None):
    """Losses of two steps and the state after them; kept in `folder` and read again if given."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])
    experiment = Experiment(
        DenoiserTask(tokenizer="", model=dataclasses.replace(MODEL, offloaded=offloaded)),
        DataConfig(path="", sizes=((32, 32),), num_frames=5, fps=4.0),
        num_steps=10,
        batch_size=8,
        optimizer=OptimizerConfig(warmup_steps=1, offload=offload),
    )
    losses = []
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        state = program.create(np.uint32(0))
        step = program.lower({}, jax.eval_shape(lambda: BATCH)).compile()
        assert program.flops({}, jax.eval_shape(lambda: BATCH)) > 0  # as the loop counts them
        batch = place(BATCH, jax.tree.map(lambda _: batch_sharding(mesh), BATCH))
        for i in range(2):
            state, metrics = step(state, {}, batch, np.uint32(0))
            losses.append(float(metrics["loss"]))
            if folder and i == 0:
                with Checkpoints(folder) as checkpoints:
                    checkpoints.save(state, Progress(step=1, next_batch=1))
                with Checkpoints(folder) as checkpoints:
                    state, _ = checkpoints.restore(program.abstract)
    return losses, state


def test_resting_on_the_host_changes_no_number(tmp_path):
    losses, state = trained(False, ())
    others, resting = trained(True, ("input", "down"), tmp_path)
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *jax.device_get((state, resting))
    )
    leaves = jax.tree_util.tree_leaves_with_path(resting.opt_state)
    kinds = {x.sharding.memory_kind for path, x in leaves if path_of(path).endswith("kernel")}
    assert kinds == {"pinned_host"}
    elsewhere = {x.sharding.memory_kind for x in jax.tree.leaves((resting.params, resting.ema))}
    assert "pinned_host" not in elsewhere


def test_what_a_tpu_does_not_move_stays():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])
    shapes = {"count": (), "bias": (1024,), "v_row/kernel": (1024,), "kernel": (4, 16)}
    shapes |= {"a/embedding": (3, 16), "b/embedding": (3, 1024)}
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    resting = on_host(state_shardings(shapes, mesh), shapes)
    there = {name for name, sharding in resting.items() if sharding.memory_kind == "pinned_host"}
    assert there == {"kernel", "b/embedding"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kept": ("up",), "offloaded": ("up",)}, "kept and offloaded both have up"),
        ({"offloaded": ("input",), "remat": False}, "set remat to True"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(MODEL, **change)
