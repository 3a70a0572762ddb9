"""Batches on their way to the devices."""

import time

import jax
import numpy as np
import pytest
from reading import make, take

from walt_jax.data.feeding import Share, on_devices
from walt_jax.errors import UserError
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.parallel.sharding import batch_sharding


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(fsdp=2), MeshConfig(data=2, tensor=2, context=2)], ids=str
)
def test_rows_lie_on_their_devices(sprite_records, mesh):
    mesh = make_mesh(mesh)
    assert mesh.devices.size == 8
    pipeline = make(sprite_records)
    host = take(pipeline, 3, start=2)
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    device_rows = mesh.devices.reshape(groups, -1)  # in the order of the rows
    share = 8 // groups
    placed = pipeline.on_devices(batch_sharding(mesh), start=2)
    for batch, expected in zip(placed, host):
        assert batch.keys() == expected.keys() - {"caption"}
        for name, array in batch.items():
            assert isinstance(array, jax.Array)
            assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
            shards = {s.device: np.asarray(s.data) for s in array.addressable_shards}
            for i, devices in enumerate(device_rows):
                for device in devices:
                    rows = expected[name][i * share : (i + 1) * share]
                    np.testing.assert_array_equal(shards[device], rows)


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_put_on_the_devices_ahead_of_need(sprite_records, monkeypatch, ahead):
    pipeline = make(sprite_records)
    puts = []
    put = jax.make_array_from_process_local_data

    def counted(*args):
        puts.append(args)
        return put(*args)

    monkeypatch.setattr(jax, "make_array_from_process_local_data", counted)
    placed = pipeline.on_devices(batch_sharding(make_mesh(MeshConfig())), ahead=ahead)
    arrays = 3
    for taken in range(2):
        next(placed)
        deadline = time.monotonic() + 60
        while len(puts) < arrays * (ahead + taken) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # a batch too many would come now
        assert len(puts) == arrays * (ahead + taken)
    placed.close()


def test_an_error_of_a_batch_comes_when_it_is_due(sprite_records):
    def batches():
        yield from take(make(sprite_records), 2)
        raise UserError("the third is broken")

    sharding = batch_sharding(make_mesh(MeshConfig()))
    placed = on_devices(batches(), sharding, Share(0, 8, 8), 3)
    assert len([next(placed) for _ in range(2)]) == 2
    with pytest.raises(UserError, match="the third is broken"):
        next(placed)
