"""What window attention costs on a TPU by the compiler's estimate, beside what else there is.

    python -m benchmarks.window_attention [--topology v5e:2x2 ...] [--shapes 20x256x16x64 ...]
    python -m benchmarks.window_attention --record
    python -m benchmarks.window_attention --hlo

A shape is windows x tokens x heads x head width; `+bias` adds a relative position bias. For each,
forward and forward + backward, the cycles of

- ours: the Pallas kernels of `walt_jax.kernels.attention.tpu`,
- XLA: `jax.nn.dot_product_attention`,
- splash and flash: the Pallas kernels that come with JAX, with the best of the block sizes tried
  (splash takes no bias; tokens are padded to what both divide, heads to the 128 lanes of splash);
  priced on one window, times the windows, as the compiler's walk takes minutes for each of them,
- the floor: the matrix unit alone, contracted and resulting lanes padded to its width and tokens
  that move through it not; forward it runs 2 products, backward 5 (a forward pass within).

All start from and end in (B, T, H, W, D), so that the transposes that one needs count. Nothing is
random. The compiler gives no cycles of kernels that copy several far apart pieces of an array at a
time, so the videos here are shaped so that windows of a step are neighbours.

`--record` writes our cycles to `cycles/<version of libtpu>.json`, which a slow test compares.
`--hlo` prints what a compiled program runs beside the kernels, and fails where that copies or
transposes an array of q's size, inside of a fusion too. Estimates are not readings from a chip.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from walt_jax.errors import UserError
from walt_jax.kernels.attention.tpu import attention
from walt_jax.kernels.rows import LANES
from walt_jax.rehearsal.chips import CHIPS
from walt_jax.rehearsal.estimate import NOTE, estimate

PASSES = ("forward", "forward + backward")
MATRIX_UNIT = {"v5e": 128, "v5p": 128, "v6e": 256}  # rows and columns
PRODUCTS = {"forward": 2, "forward + backward": 7}
Function = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Windows of a video (B, T, H, W) of heads of some width."""

    video: tuple[int, int, int, int]
    block: tuple[int, int, int]
    heads: int
    width: int
    bias: bool = False

    @property
    def name(self) -> str:
        sizes = self.windows, self.tokens, self.heads, self.width
        return "x".join(map(str, sizes)) + "+bias" * self.bias

    @property
    def windows(self) -> int:
        return math.prod(self.video) // self.tokens

    @property
    def tokens(self) -> int:
        return math.prod(self.block)

    @property
    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        """q, k, v in bfloat16 and the bias."""
        x = jax.ShapeDtypeStruct((*self.video, self.heads * self.width), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((self.heads, self.tokens, self.tokens), jnp.float32)
        return [x, x, x, *([bias] if self.bias else [])]

    def floor(self, passes: str, chip: str) -> int:
        """Cycles of the matrix unit."""
        unit = MATRIX_UNIT[chip]
        width, tokens = (-(-n // unit) * unit for n in (self.width, self.tokens))
        each = 2 * math.prod(self.video) * self.heads * width * tokens
        return PRODUCTS[passes] * each // CHIPS[chip].flops_per_cycle

    def split(self, x: jax.Array) -> jax.Array:
        """(B, T, H, W, D) to (windows, tokens, heads, width)."""
        counts = [g // n for g, n in zip(self.video[1:], self.block)]
        (t, h, w), (wt, wh, ww) = counts, self.block
        x = x.reshape(-1, t, wt, h, wh, w, ww, self.heads, self.width)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7, 8)
        return x.reshape(-1, self.tokens, self.heads, self.width)

    def join(self, x: jax.Array) -> jax.Array:
        """The reverse of `split`."""
        counts = [g // n for g, n in zip(self.video[1:], self.block)]
        x = x.reshape(-1, *counts, *self.block, self.heads * self.width)
        return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(*self.video, -1)


SPATIAL = Shape((2, 10, 16, 16), (1, 16, 16), 16, 64)
SPATIOTEMPORAL = Shape((8, 5, 8, 16), (5, 8, 8), 16, 64)
SHAPES = [
    SPATIAL,
    SPATIOTEMPORAL,
    dataclasses.replace(SPATIAL, width=72),
    dataclasses.replace(SPATIAL, width=112),
    Shape((4, 5, 16, 16), (5, 16, 16), 16, 64),
    dataclasses.replace(SPATIAL, bias=True),
    dataclasses.replace(SPATIOTEMPORAL, bias=True),
]


def ours(shape: Shape) -> Iterator[tuple[str, Function]]:
    def function(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any = None) -> jax.Array:
        optional = bias, None, None, None
        return attention(q, k, v, *optional, num_heads=shape.heads, block=shape.block, causal=False)

    yield "", function


def xla(shape: Shape) -> Iterator[tuple[str, Function]]:
    def function(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any = None) -> jax.Array:
        windows = (shape.split(x) for x in (q, k, v))
        bias = None if bias is None else bias[None].astype(q.dtype)
        return shape.join(jax.nn.dot_product_attention(*windows, bias=bias))

    yield "", function


def _heads_first(shape: Shape, tokens: int, width: int, kernel: Callable[..., Any]) -> Function:
    """A kernel of (windows, heads, tokens, width), padded; it is told which tokens are padding."""

    def function(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any = None) -> jax.Array:
        sizes = [(0, 0), (0, 0), (0, tokens - shape.tokens), (0, width - shape.width)]
        windows = (jnp.pad(shape.split(x).swapaxes(1, 2), sizes) for x in (q, k, v))
        ids = None
        if tokens > shape.tokens:
            ids = (jnp.arange(tokens) >= shape.tokens).astype(jnp.int32)
        if bias is not None:
            bias = jnp.pad(bias, [(0, 0), *[(0, tokens - shape.tokens)] * 2])
        out = kernel(*windows, ids, bias)[:, :, : shape.tokens, : shape.width]
        return shape.join(out.swapaxes(1, 2))

    return function


def _blocks(shape: Shape) -> tuple[int, list[int]]:
    """Tokens in whole tiles, and block sizes that divide them: the least, some and all of them."""
    tokens = -(-shape.tokens // LANES) * LANES
    return tokens, [n for n in (LANES, 256, 640, tokens) if tokens % n == 0 and n <= tokens]


def splash_attention(shape: Shape) -> Iterator[tuple[str, Function]]:
    if shape.bias:
        return
    tokens, blocks = _blocks(shape)
    mask = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * shape.heads)
    for n in dict.fromkeys(blocks):
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        sizes = splash.BlockSizes(**{f"block_{name}": n for name in names})

        def kernel(q: Any, k: Any, v: Any, ids: Any, bias: Any, sizes: Any = sizes) -> jax.Array:
            make = splash.make_splash_mha_single_device
            run = make(mask, block_sizes=sizes)
            segments = None if ids is None else splash.SegmentIds(ids, ids)
            run = functools.partial(run, segment_ids=segments)
            return jax.vmap(run)(q * shape.width**-0.5, k, v)

        yield str(n), _heads_first(shape, tokens, -(-shape.width // LANES) * LANES, kernel)


def flash_attention(shape: Shape) -> Iterator[tuple[str, Function]]:
    tokens, blocks = _blocks(shape)
    for n in dict.fromkeys(blocks):
        fields = (f.name for f in dataclasses.fields(flash.BlockSizes))
        sizes = flash.BlockSizes(**{name: 1 if name == "block_b" else n for name in fields})

        def kernel(q: Any, k: Any, v: Any, ids: Any, bias: Any, sizes: Any = sizes) -> jax.Array:
            if bias is not None:
                bias = jnp.broadcast_to(bias, (len(q), *bias.shape))
            if ids is not None:
                ids = flash.SegmentIds(*[jnp.broadcast_to(ids, (len(q), tokens))] * 2)
            scale = shape.width**-0.5
            return flash.flash_attention(q, k, v, bias, ids, sm_scale=scale, block_sizes=sizes)

        yield str(n), _heads_first(shape, tokens, shape.width, kernel)


WAYS = {"ours": ours, "xla": xla, "splash": splash_attention, "flash": flash_attention}


def program(function: Function, shape: Shape, passes: str) -> tuple[Callable[..., Any], list[Any]]:
    """What is priced and its arguments."""
    if passes == "forward":
        return function, shape.arguments

    def both(dy: jax.Array, *args: jax.Array) -> Any:
        y, pull = jax.vjp(function, *args)
        return y, pull(dy)

    return both, [shape.arguments[0], *shape.arguments]


def price(way: str, shape: Shape, passes: str, chip: str) -> tuple[int | None, str]:
    """The least cycles of a way and its block size; None where it has no price."""
    found: tuple[int | None, str] = None, ""
    times = 1
    if way in ("splash", "flash"):
        shape, times = dataclasses.replace(shape, video=(1, *shape.block)), shape.windows
    for name, function in WAYS[way](shape):
        run, arguments = program(function, shape, passes)
        try:
            cost = estimate(run, *arguments, chip=chip)
        except (NotImplementedError, ValueError, UserError) as e:
            print(f"{way} {name} at {shape.name}: {e}", file=sys.stderr)
            continue
        if not cost.unpriced and (found[0] is None or times * cost.cycles < found[0]):
            found = times * cost.cycles, name
    return found


def record_file() -> Path:
    """Where the cycles under the installed TPU compiler are kept."""
    version = importlib.metadata.version("libtpu")
    return Path(__file__).parent / "cycles" / f"{version}.json"


def main() -> None:
    args = _arguments()
    chips = [topology.partition(":")[0] for topology in args.topology]
    shapes = [s for s in SHAPES if s.name in args.shapes]
    if args.hlo:
        sys.exit(any([_print_beside(s, p, c) for c in chips for s in shapes for p in PASSES]))
    rows = []
    for chip in chips:
        for shape in shapes:
            for passes in PASSES:
                row = {"chip": chip, "shape": shape.name, "passes": passes}
                row["floor"] = shape.floor(passes, chip)
                for way in ["ours"] if args.record else args.ways:
                    row[way], row[f"{way}_block"] = price(way, shape, passes, chip)
                rows.append(row)
                print(json.dumps(row) if args.json else _line(row), flush=True)
    if args.record:
        _record(rows)
    elif not args.json:
        print(NOTE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    topologies, names = [c.topology for c in CHIPS.values()], [s.name for s in SHAPES]
    parser.add_argument("--topology", nargs="+", default=topologies, choices=topologies)
    parser.add_argument("--shapes", nargs="+", default=names, choices=names)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--record", action="store_true", help="ours alone, to be compared later")
    parser.add_argument("--hlo", action="store_true", help="what runs beside our kernels")
    return parser.parse_args()


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['chip']} {row['shape']:22} {row['passes']:18} floor {row['floor']:>9,}"]
    for way in WAYS:
        if way in row:
            cycles, block = row[way], row[f"{way}_block"]
            parts.append(f"{way} {cycles or 0:>9,}{f' ({block})' if block else ''}")
    if row.get("ours"):
        parts.append(f"{row['ours'] / row['floor']:.2f} x floor")
        parts += [f"{row[w] / row['ours']:.1f} x {w}" for w in ("xla", "splash") if row.get(w)]
    return "  ".join(parts)


def _record(rows: list[dict[str, Any]]) -> None:
    path = record_file()
    records = json.loads(path.read_text()) if path.exists() else {}
    for row in rows:
        of_chip = records.setdefault(row["chip"], {})
        of_chip.setdefault(row["shape"], {})[row["passes"]] = row["ours"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")


def _print_beside(shape: Shape, passes: str, chip: str) -> bool:
    """Prints the instructions beside the kernels; whether they move q, k, v or the output."""
    (_, function), *_ = ours(shape)
    run, arguments = program(function, shape, passes)
    cost = estimate(run, *arguments, chip=chip, walk=False)
    whole = arguments[0].size * arguments[0].dtype.itemsize
    moved = [name for name, size in cost.relayouts.items() if size >= whole]
    print(
        f"{chip} {shape.name} {passes}: cycles beside the kernels: {cost.instructions or 'none'}; "
        f"copies of a whole q, k, v or output: {', '.join(moved) or 'none'}"
    )
    return bool(moved)


if __name__ == "__main__":
    main()
