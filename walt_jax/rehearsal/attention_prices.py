"""Cycles of the kernels of window attention in a program that is too large to walk through."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from walt_jax.kernels import ExtraKv, window_attention
from walt_jax.models import DenoiserConfig
from walt_jax.rehearsal.estimate import estimate
from walt_jax.rehearsal.hlo import Instruction

_NAME = re.compile(r"window_attention_(\d+)x(\d+)x(\d+)(_grid)?(?:_(\d+)_more)?(_gradient)?")

_WINDOWS = 4  # priced, and twice as many


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """One of the kernels, as its instruction tells.

    Attributes:
      block: the window.
      has_grid: whether keys of the grid are among its keys; extra: how many others.
      shape: (B, T, H, W, D) of the queries on one device.
      gradient: whether it is the backward pass.
    """

    block: tuple[int, int, int]
    has_grid: bool
    extra: int
    shape: tuple[int, int, int, int, int]
    gradient: bool

    @classmethod
    def of(cls, instruction: Instruction, grid: tuple[int, int, int]) -> "AttentionKernel | None":
        """Reads it from its name and the shape of its result; None for other kernels.

        Args:
          instruction: of the compiled program.
          grid: (T, H, W) of the tokens of a video, over all devices.
        """
        if not (found := _NAME.search(instruction.name)):
            return None
        result = re.search(r"\[([\d,]+)\]", instruction.text)[1]
        batch, *tokens, width = map(int, result.split(","))
        frames = tokens[0]
        if len(tokens) == 2:  # whole rows, flat
            tokens = frames, tokens[1] // grid[2], grid[2]
        block = tuple(int(n) for n in found.groups()[:3])
        shape = (batch, *tokens, width)
        return cls(block, bool(found[4]), int(found[5] or 0), shape, bool(found[6]))

    @property
    def windows(self) -> int:
        """On one device."""
        return math.prod(self.shape[:4]) // math.prod(self.block)


class AttentionPrices:
    """Prices kernels on few videos and on twice as many, and goes on linearly.

    The compiler walks through a kernel's whole grid, and gives no cycles of one that copies several
    pieces of an array that lie far apart. So videos are cut to one window's frames and height,
    which, for windows of 256 tokens as the papers have them, changes neither the windows nor how
    many of them a step of the kernel has. Of such windows there are 4 and 8: enough for steps of
    two on each of two cores. Of small windows, which share tiles, it is an approximation.
    """

    def __init__(self, model: DenoiserConfig, chip: str) -> None:
        self._model, self._chip = model, chip
        self._head_width = model.width // model.num_heads

    def __call__(self, kernels: dict[str, Instruction]) -> dict[str, int]:
        """Cycles by name; without those that are no window attention or have no price."""
        found = {}
        for name, instruction in kernels.items():
            kernel = AttentionKernel.of(instruction, self._model.tokens)
            if kernel is not None and (cycles := self._price(kernel)) is not None:
                found[name] = cycles
        return found

    def _price(self, kernel: AttentionKernel) -> int | None:
        """From few videos and twice as many, as some work is done once a kernel."""
        (frames, rows, width), columns, d = kernel.block, *kernel.shape[3:]
        videos = max(2, _WINDOWS * width // columns)
        found = []
        for number in (videos, 2 * videos):
            shape = (number, frames, rows, columns, d)
            small = dataclasses.replace(kernel, shape=shape, gradient=False)
            bias = self._model.relative_bias and kernel.has_grid and not kernel.extra
            options = bias, self._model.qk_norm, self._model.causal
            cycles = _cycles(small, self._head_width, *options, self._chip)
            found.append((small.windows, cycles["gradient" if kernel.gradient else "forward"]))
        (few, cost), (more, higher) = found
        if cost is None or higher is None:
            return None
        return round(cost + (higher - cost) * (kernel.windows - few) / (more - few))


@functools.cache
def _cycles(
    kernel: AttentionKernel, head_width: int, bias: bool, norm: bool, causal: bool, chip: str
) -> dict[str, int | None]:
    """Of the forward kernel and of the gradient."""
    d, heads = kernel.shape[-1], kernel.shape[-1] // head_width
    length = math.prod(kernel.block)
    x = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16)
    arguments: dict[str, Any] = {"q": x}
    if kernel.has_grid:
        arguments |= {"k": x, "v": x}
    if bias:
        arguments["bias"] = jax.ShapeDtypeStruct((heads, length, length), jnp.float32)
    if norm:
        arguments["qk_norm"] = (jax.ShapeDtypeStruct((head_width,), jnp.float32),) * 2
    if kernel.extra:
        more = jax.ShapeDtypeStruct((kernel.shape[0], kernel.extra, d), jnp.bfloat16)
        arguments["extra"] = more, more

    def forward(arguments: dict[str, Any]) -> jax.Array:
        rest = dict(arguments)
        q, k, v = rest.pop("q"), rest.pop("k", None), rest.pop("v", None)
        if more := rest.pop("extra", None):
            mask = jnp.ones(more[0].shape[:2], bool)
            rest["extra_kv"] = ExtraKv(*more, mask)
        options = {"num_heads": heads, "window": kernel.block, "causal": causal}
        return window_attention(q, k, v, implementation="pallas_tpu", **rest, **options)

    def both(arguments: dict[str, Any], dy: jax.Array) -> Any:
        y, pull = jax.vjp(forward, arguments)
        return y, pull(dy)

    cost = estimate(both, arguments, x, chip=chip)
    found: dict[str, int | None] = {"forward": None, "gradient": None}
    for name, cycles in cost.instructions.items():
        if (match := _NAME.search(name)) and name not in cost.unpriced:
            found["gradient" if match[6] else "forward"] = cycles
    return found
