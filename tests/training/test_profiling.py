"""Profiles: when they begin and end, what they hold."""

import os
import runpy
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_task

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.models import Conditions, Denoiser, DenoiserConfig, Network, TokenizerConfig
from walt_jax.models.tokenizer.frozen import network as tokenizer_network
from walt_jax.training import loop, profiling
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.profiling import ProfileConfig, Profiler

STATE = jnp.zeros(())


@pytest.fixture
def traced(monkeypatch):
    """The steps between which traces lay."""
    now, traces = [0], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: traces.append([now[0]]))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traces[-1].append(now[0]))

    def run(profiler, steps, at=None):
        for done in range(steps):
            now[0] = done
            if at and done == at[0]:
                at[1]()
            profiler.step(done, STATE)
        now[0] = steps
        return traces

    return run


def test_a_planned_window(tmp_path, traced):
    with Profiler(ProfileConfig(first_step=4, num_steps=2), tmp_path) as profiler:
        assert traced(profiler, 10) == [[4, 6]]


def test_one_asked_for_by_a_signal(tmp_path, traced):
    before = signal.getsignal(signal.SIGUSR1)
    with Profiler(ProfileConfig(), tmp_path) as profiler:
        ask = 7, lambda: os.kill(os.getpid(), signal.SIGUSR1)
        assert traced(profiler, 12, ask) == [[7, 10]]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_one_asked_for_by_a_file_and_cut_off_by_the_end(tmp_path, traced):
    file = tmp_path / profiling.REQUEST
    with Profiler(ProfileConfig(num_steps=5, poll_every=4), tmp_path) as profiler:
        traces = traced(profiler, 11, (5, file.touch))
        assert traces == [[8]]
    assert traces == [[8, 11]] and not file.exists()


def test_one_asked_for_while_steps_compile(tmp_path, sprite_records, monkeypatch):
    traces, compile_steps = [], loop._Run.compile_steps
    monkeypatch.setattr(jax.profiler, "start_trace", traces.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traces.append("end"))

    def asked(run):
        os.kill(os.getpid(), signal.SIGUSR1)
        return compile_steps(run)

    monkeypatch.setattr(loop._Run, "compile_steps", asked)
    values = tiny_task.get_config().to_dict()
    values |= {"num_steps": 2, "mesh": {"data": 2, "context": -1}, "checkpoint_every": 100}
    values["data"]["path"] = str(sprite_records)
    train(config_lib.build(Experiment, values), tmp_path, quiet=True)
    assert traces == [str(tmp_path / "tensorboard"), "end"]


def test_one_asked_for_too_early_ends_nothing(monkeypatch):
    monkeypatch.setattr(cli, "run", lambda main: os.kill(os.getpid(), signal.SIGUSR1))
    before = signal.getsignal(signal.SIGUSR1)
    try:
        runpy.run_module("walt_jax.train", run_name="__main__")
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_real_profile_is_where_tensorboard_looks(tmp_path, sprite_records):
    values = tiny_task.get_config().to_dict()
    values |= {"num_steps": 4, "mesh": {"data": 2, "context": -1}, "profile": {"first_step": 2}}
    values["data"]["path"] = str(sprite_records)
    train(config_lib.build(Experiment, values), tmp_path, quiet=True)
    files = list((tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))
    assert len(files) == 1 and files[0].stat().st_size > 1000


def scopes(function, *args):
    return jax.jit(jax.grad(function)).lower(*args).as_text(debug_info=True)


def test_the_rooms_of_the_models_have_their_names():
    config = DenoiserConfig(
        grid=(1, 4, 4), latent_channels=2, width=8, num_heads=2, num_layers=1,
        windows=((0, 0, 0),), text_features=4, dtype="float32",
    )  # fmt: skip
    network = Network.of(lambda rngs: Denoiser(config, rngs=rngs))
    z, t = jnp.zeros((1, 1, 4, 4, 2)), jnp.zeros(1, jnp.int32)
    told = Conditions(text=jnp.zeros((1, 3, 4)), text_mask=jnp.ones((1, 3), bool))
    text = scopes(lambda p: network.bind(p)(z, t, told).sum(), network.shapes())
    for room in ("embed", "layers", "attention", "cross_attention", "mlp", "read_out"):
        assert f"{room})/" in text or f"/{room}/" in text, room
    sizes = TokenizerConfig(channels=2, multipliers=(1, 1, 1, 1), num_res_blocks=1, norm_groups=2)
    tokenizer = tokenizer_network(sizes)

    def error(params):
        model = tokenizer.bind(params)
        return jnp.square(model.decode(model.encode(np.zeros((1, 1, 8, 8, 3), np.float32)))).sum()

    text = scopes(error, tokenizer.shapes())
    for room in ("encoder", "decoder", "level", "res_block"):
        assert f"{room})/" in text or f"/{room}/" in text, room
