"""Checkpoints: what is saved comes back, on any mesh, and what is damaged does not."""

import dataclasses
import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.models import Network
from walt_jax.models.text import ByteEncoder, ByteEncoderConfig
from walt_jax.parallel import MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import place
from walt_jax.training import checkpoints as checkpoints_module
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.checksums import checksums
from walt_jax.training.progress import Progress
from walt_jax.training.state import TrainState

DEEP = ByteEncoderConfig(width=8, num_layers=12, num_heads=2, max_bytes=4, dtype="float32")
PROGRESS = Progress(step=4, next_batch=5, left_out=[2], losses=[0.1, 1 / 3], spent={"step": 1.5})


def numbers(seed=0, width=16):
    """A state of NumPy arrays."""
    draw = np.random.default_rng(seed).normal
    params = {
        "stages": [{"kernel": draw(size=(width, 32)).astype(np.float32)}, {"bias": np.ones(3)}]
    }
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    moments = {"mu": jax.tree.map(np.square, params), "count": np.int32(7)}
    return TrainState(np.int32(4), params, jax.tree.map(np.sin, params), moments, {})


def lying(state, num_devices, **axes):
    """The state on a mesh, and its shape there."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:num_devices])
    shardings = state_shardings(state, mesh)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    return place(jax.tree.map(np.asarray, state), shardings), shapes


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4, the arrays of seeds 2 and 4, on 8 devices."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in (2, 4):
            state, _ = lying(numbers(step), 8, data=2, fsdp=4)
            checkpoints.save(state, dataclasses.replace(PROGRESS, step=step))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_lists_of_more_than_ten_keep_their_order(tmp_path):
    """orbax names their entries "0", "1", "10", "11", "2" ..."""
    network = Network.of(lambda rngs: ByteEncoder(DEEP, rngs=rngs))
    params = network.init(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, params, {}, {})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Progress(step=3))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore_part(("ema",))["ema"]
    assert list(restored["layers"]) == list(range(12))
    text = jnp.array([[1, 2, 3, 0]], jnp.uint8)
    expected = network.bind(params)(text)[0]
    np.testing.assert_allclose(network.bind(restored)(text)[0], expected, atol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 4}, {"data": 1}, {"data": 2, "tensor": 4}])
def test_a_state_comes_back_on_another_mesh(saved, axes):
    expected = numbers(4)
    _, shapes = lying(expected, int(np.prod(list(axes.values()))), **axes)
    with Checkpoints(saved, read_only=True) as checkpoints:
        state, progress = checkpoints.restore(shapes)
        assert checkpoints.steps == [2, 4] and checkpoints.restored == 4
    same(state, expected)
    assert progress == PROGRESS
    placed = jax.tree.map(lambda x, s: x.sharding == s.sharding, state, shapes)
    assert all(jax.tree.leaves(placed))


def test_parts_are_read_on_their_own(copy):
    shutil.rmtree(copy / "checkpoints" / "4" / "opt_state")
    with Checkpoints(copy, read_only=True) as checkpoints:
        parts = checkpoints.restore_part(("ema", "extra", "step"))
    expected = numbers(4)
    np.testing.assert_array_equal(
        parts["ema"]["stages"][0]["kernel"], expected.ema["stages"][0]["kernel"]
    )
    assert parts["extra"] == {} and parts["step"] == 4


def test_any_changed_byte_is_harmless_or_found(saved, tmp_path):
    """A byte in the middle of every file of the newest checkpoint, one file at a time."""
    _, shapes = lying(numbers(4), 1, data=1)
    found = 0
    files = [p for p in sorted((saved / "checkpoints" / "4").rglob("*")) if p.is_file()]
    assert len(files) > 8
    shutil.copytree(saved, tmp_path / "run")
    for file in files:
        path = tmp_path / "run" / file.relative_to(saved)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
        with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
            state, _ = checkpoints.restore(shapes)
        same(state, numbers(checkpoints.restored))
        found += checkpoints.restored == 2
        shutil.copy(file, path)
    assert found >= 6


@pytest.mark.parametrize("damage", ["truncated", "emptied", "file gone", "item gone"])
def test_a_damaged_checkpoint_is_passed_over_and_out_of_the_way(copy, damage, caplog):
    newest = copy / "checkpoints" / "4"
    for file in (newest / "params").rglob("d/*"):
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "emptied":
            file.write_bytes(b"")
        elif damage == "file gone":
            file.unlink()
    if damage == "item gone":
        shutil.rmtree(newest / "params")
    on_mesh, shapes = lying(numbers(4), 8, fsdp=8, data=1)
    with caplog.at_level(logging.WARNING, "walt_jax"), Checkpoints(copy) as checkpoints:
        state, progress = checkpoints.restore(shapes)
        assert progress.step == checkpoints.latest == 2
        same(state, numbers(2))
        assert "checkpoints/4 is damaged (" in caplog.text and "passed over" in caplog.text
        assert (copy / "damaged" / "4").is_dir()
        checkpoints.save(on_mesh, PROGRESS)
    with Checkpoints(copy, read_only=True) as checkpoints:
        same(checkpoints.restore(shapes)[0], numbers(4))


def test_nothing_whole_is_one_sentence_and_begins_nothing_anew(copy):
    for step in ("2", "4"):
        (copy / "checkpoints" / step / "contents" / "metadata").write_text("{")
    _, shapes = lying(numbers(), 1, data=1)
    with (
        pytest.raises(UserError, match=r"All checkpoints .* damaged \(steps 4, 2\)"),
        Checkpoints(copy) as checkpoints,
    ):
        checkpoints.restore(shapes)
    assert (copy / "checkpoints" / "4").is_dir() and not (copy / "damaged").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("UNAVAILABLE: no connection")])
def test_what_is_no_fault_of_the_checkpoint_leaves_it_in_place(copy, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(checkpoints_module, "_check_sums", fails)
    _, shapes = lying(numbers(), 1, data=1)
    with pytest.raises(type(error)), Checkpoints(copy) as checkpoints:
        checkpoints.restore(shapes)
    assert (copy / "checkpoints" / "4").is_dir() and not (copy / "damaged").exists()


def test_a_progress_of_another_version_is_no_damage(copy):
    about = copy / "checkpoints" / "4"
    progress = json.loads((about / "progress" / "metadata").read_text()) | {"mood": 1}
    contents = json.loads((about / "contents" / "metadata").read_text())
    contents["sha256"] = checkpoints_module._digest(contents["arrays"], progress)
    (about / "progress" / "metadata").write_text(json.dumps(progress))
    (about / "contents" / "metadata").write_text(json.dumps(contents))
    _, shapes = lying(numbers(), 1, data=1)
    with pytest.raises(UserError, match=r"keeps .*mood"), Checkpoints(copy) as checkpoints:
        checkpoints.restore(shapes)
    assert about.is_dir() and not (copy / "damaged").exists()


def test_another_model_is_no_damage(copy):
    _, shapes = lying(numbers(width=24), 1, data=1)
    with (
        pytest.raises(UserError, match=r"ema/stages/0/kernel: .* \(16, 32\), .* \(24, 32\)"),
        Checkpoints(copy) as checkpoints,
    ):
        checkpoints.restore(shapes)
    assert not (copy / "damaged").exists()


def test_what_a_cut_off_save_left_is_no_checkpoint_and_goes(copy):
    half = copy / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "4", half)
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.latest == 4 and half.exists()
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(lying(numbers(), 1, data=1)[0], Progress(step=6))
    assert not half.exists() and (copy / "checkpoints" / "6").is_dir()


def test_the_newest_stay_and_every_nth(tmp_path):
    state, _ = lying(numbers(), 1, data=1)
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(2, 13, 2):
            checkpoints.save(state, Progress(step=step))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [4, 8, 10, 12]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    state, shapes = lying(numbers(4), 1, data=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(
                UserError, match=r"could not be written .* good one is of step 2: make room"
            ),
            Checkpoints(tmp_path, keep=1) as checkpoints,
        ):
            checkpoints.save(state, Progress(step=2))
            checkpoints.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
            checkpoints.save(state, Progress(step=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored, progress = checkpoints.restore(shapes)
        assert progress.step == 2
        same(restored, numbers(4))
        checkpoints.save(state, Progress(step=4))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_see_every_bit_and_no_mesh(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2 if dtype == "bool" else 100, (8, 4, 3)).astype(np.dtype(dtype))
    plain = checksums({"x": x})["x"]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    divided = jax.device_put(x, state_shardings({"kernel": x}, mesh)["kernel"])
    assert checksums({"x": divided})["x"] == plain
    from walt_jax.training import checksums as module

    assert int(module._on_devices(mesh)(divided)) == plain
    other = x.copy()
    other.view(np.uint8).reshape(-1)[5] ^= 1
    assert checksums({"x": other})["x"] != plain
    assert checksums({"x": x[::-1]})["x"] != plain
    assert checksums({"a": np.float32(1), "b": ml_dtypes.bfloat16(1)}) == {
        "a": 0x3F800000,
        "b": 0x3F80,
    }
