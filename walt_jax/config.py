"""Experiment configs: `configs/*.py` (ml_collections) read into dataclasses, strictly.

A config file says only what differs from the dataclasses' defaults. Reading is strict: a key that
no dataclass has, in the file or in an override, is an error that names the nearest key. So a key
that nothing reads cannot exist.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ml_collections
from etils import epath

from walt_jax.errors import UserError

T = TypeVar("T")
RESOLVED = "config.json"
DATASET = "dataset.json"  # what sampling needs to know of a run's data


def load(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Loads `path[:arg]` and applies overrides `a.b=value`; returns nested plain dicts.

    Args:
      spec: path of a Python file with `get_config(arg="")` returning a ConfigDict; what follows the
        colon is given to it as a string.
      overrides: `key.path=value`, values as Python literals; what is no literal is a string.

    Raises:
      UserError: no such file, no get_config, an unknown arg, or an override without `=`.
    """
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"No config file {path!r}: give --config configs/NAME.py[:variant].")
    module_spec = importlib.util.spec_from_file_location("walt_jax_experiment", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(arg): a config file defines that function.")
    config = module.get_config(arg)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config returned {type(config).__name__}, not a ConfigDict.")
    return override(config.to_dict(), overrides)


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets `a.b=value` in nested dicts, in place; values are Python literals, or else strings.

    Where `a` is None, what is turned off, it becomes a group with defaults for the other keys.

    Raises:
      UserError: an override without `=`, or below a key that is a value.
    """
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"The override {item!r} has no value: write --config.key=value.")
        *parents, leaf = key.split(".")
        node = values
        for i, parent in enumerate(parents):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                where = ".".join(parents[: i + 1])
                raise UserError(f"The override --config.{key} fails: config.{where} is a value.")
        node[leaf] = _literal(text)
    return values


def variants(arg: str, known: Mapping[str, T], path: str) -> T:
    """Looks up a config file's `:arg` among its variants.

    Raises:
      UserError: the file has no such variant; the sentence names the ones it has.
    """
    if arg not in known:
        names = ", ".join(repr(k) for k in known)
        raise UserError(f"{path} has no variant {arg!r}: choose one of {names}.")
    return known[arg]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # TypeError: {{1}}
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def build(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Reads nested dicts into the dataclass `cls`, recursively; every key must be a field.

    A field annotated with a base class that has a `registry` (name -> dataclass) takes a dict whose
    `name` chooses the class; without one it is the base class's `default_name`, if that has one.

    Raises:
      UserError: an unknown key (naming the nearest), a missing one, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a group of keys, got {values!r}.")
    values, others, name = dict(values), {}, None
    if (registry := getattr(cls, "registry", None)) is not None:
        name = values.pop("name", getattr(cls, "default_name", ""))
        name = "none" if name is None else name  # a literal such as --config.x.name=none
        if name not in registry:
            known = ", ".join(sorted(registry))
            raise UserError(f"{where}.name must be one of {known}, got {name!r}.")
        cls, others = registry[name], registry
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            if any(key in getattr(other, "__dataclass_fields__", {}) for other in others.values()):
                raise UserError(
                    f"Nothing reads {where}.{key}, which is of another {where}.name than {name!r}: "
                    f"leave it out, or begin anew with --{where}=\"{{'name': '{name}'}}\"."
                )
            raise UserError(f"Nothing reads {where}.{key}{_nearest(key, fields)}")
    kwargs = {k: _coerce(v, hints[k], f"{where}.{k}") for k, v in values.items()}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in kwargs:
            raise UserError(f"{where}.{name} is missing: set it in the config file.")
    return cls(**kwargs)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})."


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for arg in (a for a in args if a is not type(None)):
            try:
                return _coerce(value, arg, where)
            except UserError as e:
                errors.append(e)
        raise errors[0]
    if dataclasses.is_dataclass(hint) or hasattr(hint, "registry"):
        return build(hint, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) == len(args):
            pairs = enumerate(zip(value, args))
            return tuple(_coerce(v, a, f"{where}[{i}]") for i, (v, a) in pairs)
    if origin is typing.Literal and value in args:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a literal such as --config.name=2024
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and isinstance(value, bool) == (hint is bool)
    ):
        return value
    shown = getattr(hint, "__name__", None) if origin is None else str(hint).replace("typing.", "")
    raise UserError(f"{where} must be {shown}, got {value!r}.")


def to_dict(config: Any) -> Any:
    """Nested plain values of a dataclass, JSON-ready; registered classes carry their `name`."""
    if dataclasses.is_dataclass(config):
        out = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        registry = getattr(type(config), "registry", None) or {}
        names = [name for name, cls in registry.items() if cls is type(config)]
        return {"name": names[0], **out} if names else out
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return config


def claim_workdir(
    workdir: str | Path,
    config: Any,
    *,
    replace: bool = False,
    write: bool = True,
    free: Sequence[str] = (),
) -> None:
    """Writes the resolved config to `workdir/config.json`, or checks that it is the one there.

    With several processes every one checks and one writes. The groups of keys in `free` may differ:
    what does not change the numbers, such as the mesh.

    Raises:
      UserError: the workdir holds another config; the sentence lists every difference.
    """
    path = epath.Path(workdir) / RESOLVED
    ours = to_dict(config)
    if path.exists() and not replace:
        theirs = _with_defaults(type(config), json.loads(path.read_text()))
        found = differences(theirs, ours)
        if diff := {k: v for k, v in found.items() if k.split(".")[0] not in free}:
            lines = "; ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in diff.items())
            raise UserError(
                f"{path} was started with another config ({lines}): choose another --workdir, or "
                "add --replace_config to go on with the new one."
            )
    if not write:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(ours, indent=2) + "\n")
    temporary.replace(path)


def _with_defaults(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """A config written before a key existed has that key's default."""
    try:
        return to_dict(build(cls, values))
    except UserError:  # keys that are no more: a difference to be told
        return values


def read_resolved(workdir: str | Path) -> dict[str, Any]:
    """The config that a run in `workdir` was started with, as nested plain dicts.

    Raises:
      UserError: the folder holds no run.
    """
    path = epath.Path(workdir) / RESOLVED
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no {RESOLVED}): give a --workdir of train.")
    return json.loads(path.read_text())


def differences(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves in which two nested dicts differ: dotted key -> (value in a, value in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        out: dict[str, tuple[Any, Any]] = {}
        for key in [*a, *(k for k in b if k not in a)]:
            out |= differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
        return out
    return {} if a == b else {prefix: (a, b)}
