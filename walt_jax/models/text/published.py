"""Files of published encoders: config.json, and tensors of safetensors read a slice at a time."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from walt_jax.errors import UserError

Index = tuple[slice, ...]

_WHOLE, _SHARDS = "model.safetensors", "model.safetensors.index.json"
_KINDS = {"F16", "BF16", "F32"}


def read_config(folder: Path) -> dict[str, Any]:
    """What a model's config.json says.

    Raises:
      UserError: it is missing or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json: give a folder as transformers' save_pretrained writes "
            "it."
        )
    return _json(path)


def required(values: Mapping[str, Any], key: str) -> int:
    """A size in a config.json.

    Raises:
      UserError: it is not there.
    """
    if not isinstance(values.get(key), int):
        raise UserError(f"config.json has no number {key!r}: get the file again.")
    return values[key]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, of which slices are read.

    Attributes:
      path, name: of the file, in it.
      shape: of the tensor; kind: its dtype's name in the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str

    def __getitem__(self, index: Index) -> np.ndarray:
        return _opened(self.path).get_slice(self.name)[index]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A parameter that still lies in its files: what `parallel.sharding.place` takes of an array.

    Attributes:
      parts: the tensors of its layers, or the only one.
      stacked: whether the layers are its first axis.
      transposed: whether a tensor is the parameter's transpose.
      dtype: of what is read.
    """

    parts: tuple[Tensor, ...]
    stacked: bool
    transposed: bool
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""
        one = self.parts[0].shape[:: -1 if self.transposed else 1]
        return (len(self.parts), *one) if self.stacked else one

    @property
    def size(self) -> int:
        """As an array's."""
        return int(np.prod(self.shape))

    def __getitem__(self, index: Index) -> np.ndarray:
        parts = self.parts
        if self.stacked:
            parts, index = parts[index[0]], index[1:]
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape[self.stacked :]))
        out = np.empty((len(parts), *(s.stop - s.start for s in index)), self.dtype)
        for row, part in zip(out, parts):
            found = part[index[::-1] if self.transposed else index]
            row[...] = found.T if self.transposed else found
        return out if self.stacked else out[0]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards that its index names.

    Raises:
      UserError: there are none, a shard is missing, or a file is damaged or of another kind.
    """
    if (folder / _SHARDS).exists():
        names = _json(folder / _SHARDS).get("weight_map", {}).values()
        files = sorted({Path(name).name for name in names})
    elif (folder / _WHOLE).exists():
        files = [_WHOLE]
    elif any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds its weights as .bin, which is pickle and may run anything: save them "
            "as safetensors, as docs/text.md says."
        )
    else:
        raise UserError(f"{folder} has neither {_WHOLE} nor {_SHARDS}: get the whole folder.")
    found = {}
    for path in (folder / file for file in files):
        file = _opened(path)
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            found[name] = Tensor(path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def stored(
    folder: Path,
    names: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
) -> dict[str, Stored]:
    """Parameters by path, of which nothing is read yet.

    Args:
      folder: with the files.
      names: path -> what the tensor may be called; `{}` stands for the layer, the first axis, and
        the parameter is the transpose where the path ends with kernel.
      shapes: path -> the parameter's, of all parameters wanted.
      dtype: of matrices; vectors are float32.

    Raises:
      UserError: a tensor is missing, has another shape or is of integers.
    """
    tensors = tensors_in(folder)

    def find(names: Sequence[str], layer: int) -> Tensor:
        for name in names:
            if (tensor := tensors.get(name.format(layer))) is not None:
                if tensor.kind not in _KINDS:
                    raise UserError(
                        f"{tensor.path} holds {tensor.name} as {tensor.kind}: give weights in "
                        "float32, bfloat16 or float16."
                    )
                return tensor
        raise UserError(
            f"{folder} has no tensor {names[0].format(layer)!r}: give the files of the encoder "
            "that config.json describes."
        )

    params = {}
    for path, shape in shapes.items():
        stacked = "{}" in names[path][0]
        parts = tuple(find(names[path], layer) for layer in range(shape[0] if stacked else 1))
        matrix = len(shape) - stacked > 1
        transposed = path.endswith("kernel")
        param = Stored(parts, stacked, transposed, dtype if matrix else np.dtype(np.float32))
        for part in parts:
            if part.shape[:: -1 if transposed else 1] != shape[stacked:]:
                raise UserError(
                    f"{part.path}: {part.name} has the shape {part.shape}, which does not go with "
                    "config.json: get the whole folder again."
                )
        params[path] = param
    return params


def fingerprint(about: Any, params: Mapping[str, Stored], files: Iterable[Path]) -> str:
    """16 hex digits that name an encoder.

    Of its sizes and its tokenizer's files whole, and of every tensor the kind, the shape and its
    first, middle and last row: to read all of the largest would take every host minutes.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path in sorted(params):
        for part in params[path].parts:
            digest.update(f"{path} {part.kind} {part.shape}".encode())
            rows = part.shape[0]
            for at in (0, rows // 2, rows - 1) if len(part.shape) > 1 else (slice(None),):
                at = at if isinstance(at, slice) else slice(at, at + 1)
                digest.update(np.ascontiguousarray(part[(at,)]).tobytes())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _opened(path: Path) -> Any:
    """A safetensors file, of which only the header is read; its tensors are mapped into memory."""
    if not path.exists():
        raise UserError(f"{path} is missing: get the whole folder, all shards.")
    try:
        return safetensors.safe_open(path, "np")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): get it again.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): get it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged, it holds no object: get it again.")
    return values
