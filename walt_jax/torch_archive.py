"""Tensors of a torch `.pt` or `.pth` file, without torch and without running what is in it.

Such a file is a zip archive: raw storages, and a program for Python's pickle machine that says how
the tensors lie in them. Unpickling would run any function that the program names. Here the program
is read by an interpreter that can make dicts, lists, tuples, numbers, strings and tensors, and
refuses everything else.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.dtype("bfloat16"),
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_NUMBERS_AND_STRINGS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}


class _Name(NamedTuple):
    """A class or function that the program names; never looked up."""

    module: str
    name: str


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """Reads the tensors of a torch file.

    Args:
      data: the bytes of a file written by `torch.save` of torch >= 1.6.

    Returns:
      Name -> array; names of nested dicts are joined by dots. What is no tensor is left out.

    Raises:
      ValueError: another kind of file, or a program that does more than build dicts of tensors.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        program = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(program) != 1:
            raise ValueError("no archive of torch.save")
        folder = program[0].removesuffix("data.pkl")
        machine = _Machine(lambda key: archive.read(f"{folder}data/{key}"))
        return dict(_tensors("", machine.run(archive.read(program[0]))))


def _tensors(prefix: str, value: Any) -> list[tuple[str, np.ndarray]]:
    if isinstance(value, np.ndarray):
        return [(prefix, value)]
    if not isinstance(value, dict):
        return []
    dot = f"{prefix}." if prefix else ""
    return [pair for key, part in value.items() for pair in _tensors(f"{dot}{key}", part)]


class _Machine:
    """The few instructions of the pickle machine that dicts of tensors need."""

    def __init__(self, storage: Callable[[str], bytes]) -> None:
        self.storage = storage
        self.stack, self.marks, self.memo = [], [], {}

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("the program has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _NUMBERS_AND_STRINGS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Name(*stack[-2:])]
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._dict(stack[-1]).update(zip(items[::2], items[1::2]))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            # An ordered dict's attributes, such as a state dict's `_metadata`.
            stack.pop()
            self._dict(stack[-1])
        else:
            raise ValueError(f"the instruction {name} builds no dict of tensors")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    @staticmethod
    def _dict(value: Any) -> dict:
        if not isinstance(value, dict):
            raise ValueError("the program changes an object that is no dict")
        return value

    def _storage(self, about: Any) -> np.ndarray:
        kind, storage, key, _, size = about
        if kind != "storage" or storage[0] != "torch" or storage[1] not in _DTYPES:
            raise ValueError(f"unknown storage {about}")
        return np.frombuffer(self.storage(key), _DTYPES[storage[1]], count=size)

    @staticmethod
    def _call(function: Any, arguments: tuple) -> Any:
        if function == _Name("collections", "OrderedDict") and not arguments:
            return {}
        if function == _Name("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        if function == _Name("torch._utils", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, np.ndarray) or min((0, offset, *shape, *strides)) < 0:
                raise ValueError("a tensor without a storage, or of a negative size")
            last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
            if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
                raise ValueError("a tensor larger than its storage")
            steps = [stride * storage.itemsize for stride in strides]
            view = np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
            return view.copy()
        raise ValueError(f"the program calls {function}, which builds no tensor")
