"""A file of stand-in weights."""

import i3d_fixture
import numpy as np
import pytest


@pytest.fixture(scope="session")
def i3d_file(tmp_path_factory):
    """An .npz of the 230 tensors by their official names."""
    path = tmp_path_factory.mktemp("i3d") / "fixture.npz"
    np.savez(path, **i3d_fixture.tensors())
    return path
