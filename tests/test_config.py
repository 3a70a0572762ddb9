"""Configs are read strictly, and every mistake in one is told in a sentence."""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Literal

import pytest

from walt_jax import config
from walt_jax.errors import UserError
from walt_jax.tasks import Task
from walt_jax.training.experiment import Experiment

REPO = Path(__file__).parents[1]
CONFIGS = sorted((REPO / "configs").rglob("*.py"))


@dataclasses.dataclass(frozen=True)
class Inner:
    channels: int = 16
    multipliers: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    rate: float = 0.1
    on: bool = False
    path: str = "a"
    pair: tuple[int, float] = (1, 2.0)
    sizes: tuple[tuple[int, int], ...] = ((8, 8),)
    limit: float | None = 1.0
    kind: Literal["linear", "cosine"] = "linear"
    window: int | tuple[int, int] = 8
    inner: Inner = Inner()


FILE = """
from ml_collections import ConfigDict
from walt_jax.config import variants

def get_config(arg=""):
    config = ConfigDict({"steps": 3, "inner": {"channels": 4}})
    config.update(variants(arg, {"": {}, "debug": {"steps": 1}}, __file__))
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return path


def outer(*overrides):
    return config.build(Outer, config.override({"steps": 3}, overrides))


def says(*parts):
    """Expects one sentence, on one line, that holds the parts in this order."""
    return pytest.raises(UserError, match=r"^[^\n]*" + r"[^\n]*".join(map(re.escape, parts)))


def variants_of(path):
    """The names that a config file offers, from its own complaint about another."""
    try:
        config.load(f"{path}:no_such_variant")
    except UserError as e:
        return re.findall(r"'([^']*)'", str(e).split("choose one of")[1])
    raise AssertionError(f"{path} takes any variant")


# Files and variants


def test_load_gives_the_file_its_arg(file):
    assert config.load(str(file)) == {"steps": 3, "inner": {"channels": 4}}
    assert config.load(f"{file}:debug")["steps"] == 1


def test_load_applies_overrides(file):
    values = config.load(f"{file}:debug", ["inner.channels=5", "rate=2"])
    assert config.build(Outer, values) == Outer(steps=1, rate=2.0, inner=Inner(channels=5))


def test_loading_twice_gives_fresh_values(file):
    config.load(str(file), ["inner.channels=99"])
    assert config.load(str(file))["inner"]["channels"] == 4


def test_unknown_variant_names_those_there_are(file):
    with says("experiment.py", "'tiny'", "'', 'debug'"):
        config.load(f"{file}:tiny")


def test_no_such_file(tmp_path):
    with says("No config file", "nothing.py", "--config"):
        config.load(str(tmp_path / "nothing.py"))


@pytest.mark.parametrize("text", ["x = 1", "def get_config(arg):\n    return {'steps': 3}"])
def test_file_that_is_no_config(tmp_path, text):
    path = tmp_path / "odd.py"
    path.write_text(text)
    with says("odd.py", "get_config"):
        config.load(str(path))


# Values


@pytest.mark.parametrize(
    "override, expected",
    [
        ("steps=-7", -7),
        ("rate=3e-4", 3e-4),
        ("rate=2", 2.0),
        ("on=True", True),
        ("on=true", True),
        ("on=False", False),
        ("path=out/videos", "out/videos"),
        ("path=gs://bucket/a=b", "gs://bucket/a=b"),
        ("path=2024", "2024"),
        ("path='3'", "3"),
        ("path=", ""),
        ("path={{name}}", "{{name}}"),
        ("path={{1}}", "{{1}}"),
        ("pair=(3, 4)", (3, 4.0)),
        ("sizes=((16,24),(24,16))", ((16, 24), (24, 16))),
        ("sizes=[[16,24]]", ((16, 24),)),
        ("limit=None", None),
        ("limit=none", None),
        ("limit=2", 2.0),
        ("kind=cosine", "cosine"),
        ("window=4", 4),
        ("window=(4, 8)", (4, 8)),
    ],
)
def test_override(override, expected):
    value = getattr(outer(override), override.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_override_converts_inside_tuples():
    assert [type(v) for v in outer("pair=(3, 4)").pair] == [int, float]
    assert outer("inner.multipliers=[1, 2, 4]").inner == Inner(multipliers=(1, 2, 4))


def test_override_below_none_turns_a_group_on():
    spec = f"{REPO / 'configs/tokenizer_ucf101.py'}:debug"
    assert config.load(spec)["task"]["perceptual"] is None
    values = config.load(spec, ["task.perceptual.name=lpips", "task.perceptual.weight=2"])
    perceptual = config.build(Experiment, values).task.perceptual
    assert (type(perceptual).__name__, perceptual.weight) == ("LpipsVgg", 2.0)
    with says("config.task.perceptual.name must be one of lpips, resnet50"):
        config.build(Experiment, config.load(spec, ["task.perceptual.weight=2"]))


def test_later_overrides_win():
    assert outer("steps=1", "steps=2").steps == 2


@pytest.mark.parametrize(
    "override, parts",
    [
        ("stepz=1", ("config.stepz", "did you mean 'steps'?")),
        ("inner.chanels=1", ("config.inner.chanels", "did you mean 'channels'?")),
        ("iner.channels=1", ("config.iner", "did you mean 'inner'?")),
        ("inner.zzz=1", ("config.inner.zzz", "known: channels, multipliers")),
        ("steps=1.5", ("config.steps", "int", "1.5")),
        ("steps=True", ("config.steps", "int", "True")),
        ("steps=None", ("config.steps", "int", "None")),
        ("rate=fast", ("config.rate", "float", "'fast'")),
        ("rate=True", ("config.rate", "float", "True")),
        ("on=1", ("config.on", "bool", "1")),
        ("on=yes", ("config.on", "bool", "'yes'")),
        ("path=True", ("config.path", "str", "True")),
        ("path=None", ("config.path", "str", "None")),
        ("pair=(1,)", ("config.pair", "tuple[int, float]", "(1,)")),
        ("pair=(1,'x')", ("config.pair[1]", "float", "'x'")),
        ("sizes=(8,8)", ("config.sizes[0]", "8")),
        ("sizes=((8,8),(8,'x'))", ("config.sizes[1][1]", "int", "'x'")),
        ("limit=high", ("config.limit", "float", "'high'")),
        ("window=None", ("config.window", "int", "None")),
        ("kind=cubic", ("config.kind", "linear", "cosine", "'cubic'")),
        ("inner=3", ("config.inner", "group of keys", "3")),
        ("steps", ("'steps'", "no value", "--config.key=value")),
        ("=3", ("'=3'", "no value")),
        ("limit.more=1", ("config.limit", "float", "'more': 1")),
        ("steps.more=1", ("--config.steps.more", "config.steps is a value")),
        ("sizes.a.b=1", ("config.sizes", "'b': 1")),
    ],
)
def test_bad_override(override, parts):
    with says(*parts):
        outer(override)


def test_unknown_key_in_the_file(file):
    file.write_text(FILE.replace('"channels": 4', '"chanels": 4'))
    with says("Nothing reads config.inner.chanels", "did you mean 'channels'?"):
        config.build(Outer, config.load(str(file)))


def test_missing_key():
    with says("config.steps is missing"):
        config.build(Outer, {"rate": 1.0})


# The experiment


def test_unknown_override_of_the_experiment_names_the_nearest_key():
    values = config.load(str(REPO / "configs/sprites_tokenizer.py"), ["task.model.chanels=8"])
    with says("config.task.model.chanels", "did you mean 'channels'?"):
        config.build(Experiment, values)


@pytest.mark.parametrize("name", ["tokeniser", None])
def test_unknown_task(name):
    values = config.load(str(REPO / "configs/sprites_tokenizer.py"), [f"task.name={name}"])
    with says("config.task.name", *sorted(Task.registry), repr(str(name).lower())):
        config.build(Experiment, values)


def test_a_key_of_another_task_is_unknown():
    values = config.load(str(REPO / "configs/sprites_tokenizer.py"), ["task.tokenizer=out"])
    with says("Nothing reads config.task.tokenizer"):
        config.build(Experiment, values)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_has_a_debug_variant(path):
    assert {"", "debug"} <= set(variants_of(path))


@pytest.mark.parametrize(
    "spec",
    [f"{path}:{name}" for path in CONFIGS for name in variants_of(path)],
    ids=lambda s: s[s.rindex("/") + 1 :],
)
def test_config_builds_and_survives_json(spec):
    experiment = config.build(Experiment, config.load(spec))
    resolved = json.loads(json.dumps(config.to_dict(experiment)))
    assert config.build(Experiment, resolved) == experiment


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_commands_in_the_docstring_would_run(path, capsys, monkeypatch):
    """Their flags exist, the required ones are there, and their configs build."""
    doc = re.match(r'"""(.*?)"""', path.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    commands = [
        shlex.split(line) for line in re.findall(r"^ +python -m (walt_jax\..*)$", doc, re.M)
    ]
    assert any(module == "walt_jax.train" for module, *_ in commands)
    assert "Hardware" in doc
    monkeypatch.chdir(REPO)
    for module, *args in commands:
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(module).main(["--help"])
        text = capsys.readouterr().out
        usage = text.split("\n\n")[0]
        required = set(re.findall(r"--[\w-]+", re.sub(r"\[[^]]*\]", "", usage)))
        flags = [a.partition("=")[0] for a in args if a.startswith("--")]
        overrides = [f for f in flags if f.startswith("--config.")]
        assert required <= set(flags), module
        assert set(flags) - set(overrides) <= set(re.findall(r"--[\w-]+", text)), module
        if module == "walt_jax.train":
            given = [a.removeprefix("--config.") for a in args if a.startswith("--config.")]
            spec = args[args.index("--config") + 1]
            assert Path(spec.partition(":")[0]).samefile(path)
            config.build(Experiment, config.load(spec, given))


def test_a_key_of_another_choice_says_how_to_begin_anew():
    """DiT's sampler has a key that the chosen one lacks; a mere typo has no such sentence."""
    spec = str(REPO / "configs/family/dit.py")
    values = config.load(spec, ["task.sampler.name=ddim"])
    with pytest.raises(
        UserError, match=r"variance, which is of another .*--config\.task\.sampler="
    ):
        config.build(Experiment, values)
    anew = config.load(spec, ["task.sampler={'name': 'ddim'}"])
    assert config.build(Experiment, anew).task.sampler.name == "ddim"
    with pytest.raises(UserError, match="did you mean 'sampler'") as error:
        config.build(Experiment, config.load(spec, ["task.smapler=1"]))
    assert "begin anew" not in str(error.value)


# The workdir


def test_claim_writes_the_resolved_config(tmp_path):
    workdir = tmp_path / "new" / "run"
    config.claim_workdir(workdir, Outer(steps=3))
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    resolved = config.read_resolved(workdir)
    assert resolved["rate"] == 0.1 and resolved["inner"] == {"channels": 16, "multipliers": [1, 2]}
    assert config.build(Outer, resolved) == Outer(steps=3)


def test_claim_again_with_the_same_config(tmp_path):
    config.claim_workdir(tmp_path, Outer(steps=3))
    before = (tmp_path / "config.json").read_bytes()
    config.claim_workdir(tmp_path, Outer(steps=3))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_config_from_before_a_key_existed_has_its_default(tmp_path):
    config.claim_workdir(tmp_path, Outer(steps=3))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rate"], values["inner"]["multipliers"]
    path.write_text(json.dumps(values))
    config.claim_workdir(tmp_path, Outer(steps=3))
    with says("rate: 0.1 -> 0.2"):
        config.claim_workdir(tmp_path, Outer(steps=3, rate=0.2))


def test_claim_with_another_config_lists_every_difference(tmp_path):
    config.claim_workdir(tmp_path, Outer(steps=3))
    before = (tmp_path / "config.json").read_bytes()
    other = Outer(steps=4, sizes=((8, 16),), limit=None, inner=Inner(channels=32))
    with says(str(tmp_path), "another config", "--replace_config") as error:
        config.claim_workdir(tmp_path, other)
    listed = re.search(r"\((.*)\): choose", str(error.value))[1].split("; ")
    assert sorted(listed) == [
        "inner.channels: 16 -> 32",
        "limit: 1.0 -> None",
        "sizes: [[8, 8]] -> [[8, 16]]",
        "steps: 3 -> 4",
    ]
    assert (tmp_path / "config.json").read_bytes() == before


def test_claim_tells_tasks_apart(tmp_path):
    tokenizer, denoiser = (
        config.build(Task, {"name": name, **values})
        for name, values in (("tokenizer", {}), ("denoiser", {"tokenizer": "out"}))
    )
    config.claim_workdir(tmp_path, tokenizer)
    with says("name: 'tokenizer' -> 'denoiser'"):
        config.claim_workdir(tmp_path, denoiser)


def test_replace_takes_the_new_config(tmp_path):
    config.claim_workdir(tmp_path, Outer(steps=3))
    config.claim_workdir(tmp_path, Outer(steps=4), replace=True)
    assert config.read_resolved(tmp_path)["steps"] == 4


def test_workdir_without_a_run(tmp_path):
    with says(str(tmp_path), "no run", "--workdir"):
        config.read_resolved(tmp_path)


def test_differences_of_groups_on_one_side_only():
    assert config.differences({"a": {"b": 1}, "c": 2}, {"c": 2, "d": 3}) == {
        "a": ({"b": 1}, None),
        "d": (None, 3),
    }
