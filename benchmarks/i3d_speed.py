"""How fast is I3D? Against PyTorch on this machine, and on a TPU by its compiler.

    python -m benchmarks.i3d_speed [--weights FILE] [--batch 2] [--device cuda]
    python -m benchmarks.i3d_speed --tpu

Without `--tpu`: clips a second from frames of 16x224x224 to logits, of `walt_jax.evaluation` and of
the same graph in PyTorch (`torch_i3d.py`) with the same weights, which are random unless a file is
given. The outputs are compared first; then both run in turn, and the medians and their ratio are
printed. PyTorch runs eagerly, in the faster of its two memory formats. On a CPU, set
GLIBC_TUNABLES as the Makefile does: XLA's buffers then lie in huge pages. Where other programs use
the cores too, compare core seconds on one core (`taskset -c 0 python -m ...`), as PyTorch's threads
wait for each other.

With `--tpu`: cycles and share of the bf16 peak of one clip on one chip by the TPU compiler, with no
TPU attached, stage by stage (a convolution or an Inception module and the pooling behind it) and
summed; the averages and the small product at the end are not in it. Products are exact in float32,
for which a TPU multiplies six times in bf16. A chip takes a few minutes of one core.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Record
from walt_jax import cli
from walt_jax.errors import UserError
from walt_jax.evaluation import i3d, i3d_weights

TOLERANCE = 1e-4
PRODUCTS = 6  # of bf16 parts, for one that is exact in float32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="of I3D, of any layout (docs/evaluation.md)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tpu", action="store_true", help="the TPU compiler's estimates")
    parser.add_argument("--chips", nargs="+", default=["v5e"], choices=("v5e", "v5p", "v6e"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    tensors = i3d_weights.read(str(args.weights)).tensors if args.weights else random_tensors()
    records = price(args, tensors) if args.tpu else [compare(args, tensors)]
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


def random_tensors() -> dict[str, np.ndarray]:
    """Kernels that keep the variance through ReLUs; statistics that count."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in i3d_weights.shapes().items():
        noise = rng.standard_normal(shape, np.float32)
        if len(shape) == 5:
            tensors[name] = noise * np.float32((2 / np.prod(shape[:4])) ** 0.5)
        else:
            tensors[name] = 1 + 0.1 * noise if name.endswith("variance") else 0.1 * noise
    return tensors


def compare(args: argparse.Namespace, tensors: dict[str, np.ndarray]) -> Record:
    """Checks that both frameworks compute the same, then times them in turn.

    Raises:
      UserError: PyTorch or the device is missing, or the outputs differ.
    """
    try:
        import torch

        from benchmarks.torch_i3d import TorchI3D
    except ModuleNotFoundError as e:
        raise UserError("PyTorch is missing: pip install torch to compare with it.") from e
    timing.choose_device(args.device, torch.cuda.is_available())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    params = jax.tree.map(jnp.asarray, i3d.assemble(tensors))
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (args.batch, args.frames, 224, 224, 3)).astype(np.float32)
    video = jnp.asarray(x)
    # A clip at a time, as `features.Extractor` computes them.
    one = jax.jit(i3d.logits)
    clips = [video[i : i + 1] for i in range(args.batch)]

    def ours() -> jax.Array:
        return jnp.concatenate([one(params, clip) for clip in clips])

    model = TorchI3D().eval().requires_grad_(False).to(args.device)
    model.load(tensors)
    frames = torch.from_numpy(x).movedim(-1, 1).to(args.device)
    formats = {"channels first": torch.contiguous_format, "channels last": torch.channels_last_3d}

    def theirs(name: str) -> torch.Tensor:
        with torch.inference_mode():
            y = model(frames.contiguous(memory_format=formats[name]))
        if args.device == "cuda":
            torch.cuda.synchronize()
        return y

    print(
        f"{args.batch} clips of {args.frames}x224x224, float32, {timing.where(args.device, torch)}"
    )
    expected = theirs("channels first").cpu().numpy()
    error = float(np.abs(np.asarray(ours()) - expected).max() / np.abs(expected).max())
    print(f"outputs differ by {error:.1e} of the largest")
    if not error < TOLERANCE:
        raise UserError(f"The outputs differ by {error:.1e}, more than {TOLERANCE}: see above.")
    timing.print_header()
    rows = []
    for name, format_ in formats.items():
        model.to(memory_format=format_)
        rows.append(
            timing.race(
                f"logits, PyTorch {name}",
                ours,
                lambda name=name: theirs(name),
                clips=args.batch,
                repeats=args.repeats,
            )
        )
    slowest = min(row["ratio"] for row in rows)
    print(f"against the faster format: {slowest:.2f}x")
    return {"error": error, "batch": args.batch, "device": args.device, "rows": rows}


def price(args: argparse.Namespace, tensors: dict[str, np.ndarray]) -> list[Record]:
    """Prints and gives the TPU compiler's estimates for one clip.

    Raises:
      UserError: no TPU compiler.
    """
    jax.config.update("jax_platforms", "cpu")
    from benchmarks.tokenizer_parts import Part, Row, total
    from walt_jax.rehearsal.estimate import NOTE, peak_share

    params = i3d.assemble(tensors)
    x = jax.ShapeDtypeStruct((1, args.frames, i3d.SIZE, i3d.SIZE, 3), jnp.float32)
    parts = []
    for name in i3d.STAGES:
        parts.append(Part(name, functools.partial(i3d.stage, name), (params[name], x)))
        x = parts[-1].output
    print(f"{NOTE}; one clip of {args.frames}x{i3d.SIZE}x{i3d.SIZE} a chip, stage by stage")
    records = []
    for chip in args.chips:
        print(f"\n{'on ' + chip:<16}{'input':>18}{'GFLOP':>8}{'Mcycles':>9}{'share of peak':>15}")
        rows = []
        for part in parts:
            began = time.perf_counter()
            rows.append(Row(part, "forward", chip, part.price("forward", chip)))
            share, cycles = PRODUCTS * rows[-1].share, rows[-1].estimate.cycles
            seconds, size = time.perf_counter() - began, "x".join(map(str, part.input))
            print(
                f"{part.name:<16}{size:>18}{part.flops / 1e9:>8.2f}{cycles / 1e6:>9.2f}"
                f"{share:>15.1%}   compiled in {seconds:.0f} s",
                flush=True,
            )
            records.append({**rows[-1].record(), "share_of_products": share})
        whole = total(rows)
        share = peak_share(PRODUCTS * whole["flops"], whole["cycles"], chip)
        print(
            f"sum: {whole['flops'] / 1e9:.1f} GFLOP, {whole['cycles'] / 1e6:.2f} Mcycles = "
            f"{whole['seconds'] * 1e3:.2f} ms a clip, {1 / whole['seconds']:.0f} clips/s a chip; "
            f"{share:.1%} of the bf16 peak in {PRODUCTS} products for one"
        )
        records.append({"part": "sum", **whole, "share_of_products": share})
    return records


if __name__ == "__main__":
    cli.run(main)
