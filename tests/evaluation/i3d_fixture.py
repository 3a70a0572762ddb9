"""Stand-in weights of I3D and what the official graph gives with them; tests skip without."""

import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).parents[2]


@functools.cache
def folder():
    """Of the fixtures: beside the clips of $WALT_TEST_DATA, or in ../shared."""
    clips = Path(os.environ.get("WALT_TEST_DATA", REPO.parent / "shared" / "clips"))
    return clips.parent / "fvd"


def needs_fixture():
    """Skips a whole module."""
    if not (folder() / "fixture_weights.py").exists():
        pytest.skip(f"no fixtures of the official I3D in {folder()}", allow_module_level=True)


@functools.cache
def maker():
    """The module that makes the stand-in weights."""
    path = folder() / "fixture_weights.py"
    spec = importlib.util.spec_from_file_location("fixture_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def tensors():
    """230 tensors by their official names."""
    return maker().tf_weights()


def expected():
    """Outputs of the official graph."""
    return np.load(folder() / "expected.npz")


@functools.cache
def windows():
    """uint8 (64, 16, 64, 64, 3), real videos."""
    return np.load(folder() / "windows64.npz")["x"]


@pytest.fixture(scope="session")
def i3d_file(tmp_path_factory):
    """An .npz of the 230 tensors by their official names."""
    path = tmp_path_factory.mktemp("i3d") / "fixture.npz"
    np.savez(path, **tensors())
    return path
