"""What the command makes of its arguments, and what a search tries."""

import json
import math
import re
from pathlib import Path

import jax
import pytest

from walt_jax import config as config_lib
from walt_jax import rehearse
from walt_jax.errors import UserError
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.report import Report
from walt_jax.rehearsal.search import candidates, remat, table, with_clips

CONFIGS = Path(__file__).parents[1] / "configs"


def test_a_search_has_parameters_along_a_side_and_ranks_by_the_whole_step():
    slices = Topology.parse("v5e:4x8", 2)
    meshes = [
        found["mesh"] for found in candidates(_values("walt_ucf101.py:debug"), slices, "train")
    ]
    assert meshes and all(math.prod(mesh.values()) == slices.chips for mesh in meshes)
    assert {m["fsdp"] * m["tensor"] * m["context"] for m in meshes} == {8, 32}

    def report(name, fits, share, exposed):
        about = {"mesh": {"fsdp": 8}, "hbm_bytes": 1, "hbm_limit_bytes": 2, "compile_seconds": 0.0}
        times = {"est_mfu": share, "est_step_seconds": 1.0, "exposed_seconds": exposed}
        return Report(name, "v5e:4x8", fits=fits, **about, **times)

    reports = (
        report("big", False, 0.9, 0),
        report("sends", True, 0.6, 1),
        report("best", True, 0.5, 0),
    )
    assert [line.split()[1] for line in table(reports)[1:]] == ["best", "sends", "big"]


@pytest.mark.parametrize(
    ("config", "job", "policies"),
    [
        (
            "walt_ucf101.py:debug",
            "train",
            ["full", "keeps qkv+attention", "keeps qkv+attention+up", "off"],
        ),
        ("tokenizer_ucf101.py:debug", "train", ["full", "off"]),
        ("tokenizer_ucf101.py:debug", "encode", ["-"]),
    ],
)
def test_a_search_tries_what_a_config_has_of_remat(config, job, policies):
    found = candidates(_values(config), Topology.parse("v5e:2x2"), job, clips=(2,))
    assert list(dict.fromkeys(remat(values, job) for values in found)) == policies


def test_clips_a_chip_bring_images_in_the_configs_proportion():
    slices = Topology.parse("v6e:16x16", 4)
    found = with_clips({"batch_size": 512, "image_batch_size": 256}, 16, slices)
    assert found == {"batch_size": 16 * 1024, "image_batch_size": 8 * 1024}
    assert with_clips({"batch_size": 512}, 16, slices) == {"batch_size": 16 * 1024}
    tried = candidates(_values("walt_t2v.py:debug"), slices, "train", clips=(4,))
    assert {(v["batch_size"], v["image_batch_size"]) for v in tried} == {(4096, 4096)}


@pytest.mark.slow
def test_the_commands_of_the_page_run_up_to_the_compiler(monkeypatch, capsys):
    """Topologies, batches and meshes fit each other; compiling them would take an hour."""
    pytest.importorskip("libtpu")
    seen = []

    def compiled(step, topology, mesh, price):
        seen.append((str(topology), step.name))
        about = {"hbm_bytes": 1, "hbm_limit_bytes": 2, "compile_seconds": 0.0}
        return Report(step.name, str(topology), dict(mesh.shape), True, **about)

    first = candidates(_values("walt_ucf101.py:l"), Topology.parse("v5e:4x4"), "train")
    monkeypatch.setattr(rehearse, "candidates", lambda *arguments: [next(first)])
    monkeypatch.setattr(rehearse, "rehearse", compiled)
    monkeypatch.chdir(CONFIGS.parent)
    page = Path("docs/rehearse.md").read_text()
    commands = re.findall(r"^python -m walt_jax.rehearse (--config [^#\n]*)", page, re.M)
    for command in commands:
        rehearse.main(command.replace("--json report.json", "--json").split())
    assert len(commands) >= 7 and len(seen) == len(commands)
    (of_slices,) = (name for topology, name in seen if topology == "4 slices of v6e:16x16")
    assert "16384 x latents" in of_slices and of_slices.count("16384") == 2  # and of images


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mesh fsdp=--4", "is no mesh"),
        ("--mesh fsdp=2 fsdp=4", "is no mesh"),
        ("--clips 0", "at least 1 a chip, got 0"),
        ("--search --mesh fsdp=4", "leave --mesh out"),
        ("--json /nowhere/x", "no folder /nowhere"),
        ("--json .", "it is a folder"),
        ("--job encode --mesh data=4", "leave --mesh out"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(arguments, words, monkeypatch):
    monkeypatch.setattr(Topology, "devices", lambda self: [])
    command = f"--config {CONFIGS}/walt_ucf101.py:debug --topology v5e:2x2 {arguments}"
    with pytest.raises(UserError, match=words):
        rehearse.main(command.split())


def test_a_search_goes_on_after_an_error_of_the_compiler(monkeypatch, capsys):
    """Of two candidates one fails, and the other's JSON ends with status 1: it does not fit."""

    def run(experiment, topology, devices, job):
        if experiment.task.model.remat:
            raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed\nand why")
        about = {"hbm_bytes": 2, "hbm_limit_bytes": 1, "compile_seconds": 0.0}
        return [Report("step", str(topology), {"fsdp": 1}, False, **about)]

    monkeypatch.setattr(Topology, "devices", lambda self: [])
    monkeypatch.setattr(rehearse, "run", run)
    command = f"--config {CONFIGS}/tokenizer_ucf101.py:debug --topology v5e:1x1 --search --clips 2"
    with pytest.raises(SystemExit) as left:
        rehearse.main(command.split())
    assert left.value.code == 1
    out = capsys.readouterr().out.splitlines()
    assert "one chip" in out[1] and out[1].split()[3:5] == ["off", "no"]
    assert out[2].endswith("the compiler failed: INTERNAL: Mosaic failed") and len(out) == 3
    with pytest.raises(SystemExit) as left:
        rehearse.main([*command.split(), "--json"])
    records = json.loads(capsys.readouterr().out)
    assert left.value.code == 1 and [r["remat"] for r in records] == ["full", "off"]


def _values(config):
    return config_lib.load(f"{CONFIGS / config}")
