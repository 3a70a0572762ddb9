"""The mesh of several TPU slices."""

import dataclasses

import pytest

from walt_jax.errors import UserError
from walt_jax.parallel import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What is asked of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "stand-in"
    core_on_chip: int = 0

    @property
    def coords(self):
        place = self.id % 4
        return place % 2, place // 2, 0


@dataclasses.dataclass(frozen=True)
class _Placed(_Chip):
    """One of a slice of 4 x 8 x 8 chips."""

    slice_index: int = 0

    @property
    def coords(self):
        return self.id % 4, self.id // 4 % 8, self.id // 32


def _chips(slices, each):
    return [_Chip(s * each + i, s) for s in range(slices) for i in range(each)]


def test_slices_divide_data():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), _chips(2, 4))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    found = [{chip.slice_index for chip in row.flat} for row in mesh.devices]
    assert found == [{0}, {0}, {1}, {1}]


def test_slices_that_would_share_more_than_gradients_are_refused():
    with pytest.raises(UserError, match=r"data=1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), _chips(2, 4))


def test_sizes_that_are_no_products_of_a_slices_sides_are_a_mesh_too():
    chips = [_Placed(i) for i in range(256)]
    for data, fsdp in ((32, 8), (16, 16)):
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), chips)
        assert dict(mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": 1, "context": 1}
        assert {chip.id for chip in mesh.devices.flat} == set(range(256))
    slices = [dataclasses.replace(chip, slice_index=s) for s in range(2) for chip in chips]
    mesh = make_mesh(MeshConfig(data=32, fsdp=16), slices)
    assert {chip.slice_index for chip in mesh.devices[:16].flat} == {0}
