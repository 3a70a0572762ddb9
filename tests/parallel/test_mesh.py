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
