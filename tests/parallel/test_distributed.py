"""What the flags of several processes are asked before jax is."""

import argparse

import jax
import pytest

from walt_jax.errors import UserError
from walt_jax.parallel import distributed


def start(line):
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    distributed.start(parser.parse_args(line.split()))


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("--coordinator=h:1 --num_processes=2", "go together"),
        (
            "--coordinator=h:1 --num_processes=2 --process_id=2",
            "less than --num_processes=2, got 2",
        ),
        ("--coordinator=h:1 --num_processes=2 --process_id=-1", "at least 0 .* got -1"),
        ("--coordinator=h:1 --num_processes=0 --process_id=0", "less than --num_processes=0"),
        ("--coordinator=x --num_processes=2 --process_id=0", "HOST:PORT of process 0, got 'x'"),
        ("--coordinator=h: --num_processes=2 --process_id=0", "HOST:PORT of process 0, got 'h:'"),
        ("--coordinator=h:99999 --num_processes=2 --process_id=0", "HOST:PORT"),
        ("--distributed --heartbeat_timeout=0", "--heartbeat_timeout must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_one_sentence(line, sentence):
    with pytest.raises(UserError, match=sentence):
        start(line)


def test_no_pod_is_one_sentence(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        UserError, match=r"no pod here \(coordinator_address should be defined\): give"
    ):
        start("--distributed")


def test_right_flags_reach_jax(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    start("--coordinator=[::1]:8476 --num_processes=2 --process_id=1")
    start("")
    assert calls == [("[::1]:8476", 2, 1)]
