"""Options of XLA reach the compiler, and only that of TPUs."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax.demo import CONFIGS
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.parallel.compiler import TPU, compiler_options
from walt_jax.rehearsal.steps import steps
from walt_jax.training import program
from walt_jax.training.experiment import Experiment


def test_options_are_those_of_the_devices():
    tpu = SimpleNamespace(devices=np.array([[SimpleNamespace(platform="tpu")]]))
    assert compiler_options(tpu) == TPU
    assert compiler_options(make_mesh(MeshConfig())) == {}


def test_the_training_step_is_compiled_with_them(monkeypatch):
    monkeypatch.setattr(program, "compiler_options", lambda mesh: {"xla_no_such_option": True})
    values = config_lib.load(str(CONFIGS / "walt_ucf101.py:debug"))
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        (step,) = steps(config_lib.build(Experiment, values), mesh, "train")
        lowered = step.lower()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        lowered.compile()
