"""How fast is the tokenizer? Against PyTorch on this machine, and on TPUs by the compiler.

    python -m benchmarks.tokenizer_speed [--channels 128] [--device cuda]
    python -m benchmarks.tokenizer_speed --tpu [--levels]

Without `--tpu`: clips a second of encode + decode, and of the gradients of the L2 reconstruction
error, of `walt_jax.models.Tokenizer` and of the same layers in PyTorch (`torch_tokenizer.py`) with
the same weights. Outputs, loss and gradients are compared first, in float32; then both run in turn,
and the medians and their ratio are printed, beside those of one convolution of the first level.
PyTorch runs eagerly, in the memory format that suits it (channels last). On a CPU, set
GLIBC_TUNABLES as the Makefile does: XLA's buffers then lie in huge pages. Where other programs use
the cores too, compare core seconds on one core (`taskset -c 0 python -m ...`), as PyTorch's threads
wait for each other.

With `--tpu`: cycles, share of peak and HBM of the W.A.L.T tokenizer (bfloat16, one clip a chip) by
the TPU compiler, with no TPU attached, part by part (`tokenizer_parts.py`); with `--levels` only
the residual block of each level. A small video takes half an hour a chip on one core; the
backward passes of a large one take 20 GB of memory to price (`--forward` leaves them out).
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Record
from walt_jax import cli
from walt_jax.errors import UserError
from walt_jax.models import Network, Tokenizer, TokenizerConfig, count
from walt_jax.models.tokenizer.layers import CausalConv
from walt_jax.models.tokenizer.whole import Whole

TOLERANCE = 1e-4


def main() -> None:
    args = _arguments()
    records = []
    new = price(args) if args.tpu else compare(args)
    for record in new:
        records.append(record)
        if args.json:
            args.json.write_text(json.dumps(records, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    ours = parser.add_argument_group("against PyTorch")
    ours.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ours.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by the device")
    ours.add_argument("--channels", type=int, default=32, help="width of the first level")
    ours.add_argument("--video", type=_video, default=(9, 64, 64), metavar="TxHxW")
    ours.add_argument("--batch", type=int, default=2)
    ours.add_argument("--repeats", type=int, default=5)
    tpu = parser.add_argument_group("the TPU compiler's estimates")
    tpu.add_argument("--tpu", action="store_true")
    tpu.add_argument("--levels", action="store_true", help="the residual block of each level alone")
    tpu.add_argument("--forward", action="store_true", help="no backward passes")
    tpu.add_argument("--plain", action="store_true", help="without our kernels, to compare")
    tpu.add_argument("--chips", nargs="+", default=["v5e", "v5p"], choices=("v5e", "v5p", "v6e"))
    videos = [(17, 128, 128), (17, 512, 896)]
    tpu.add_argument("--videos", type=_video, nargs="+", default=videos, metavar="TxHxW")
    return parser.parse_args()


def _video(text: str) -> tuple[int, int, int]:
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def compare(args: argparse.Namespace) -> Iterator[Record]:
    """Checks that both frameworks compute the same, then times them in turn.

    Raises:
      UserError: PyTorch or the device is missing, or the outputs differ.
    """
    try:
        import torch

        from benchmarks import torch_tokenizer as twin
    except ModuleNotFoundError as e:
        raise UserError("PyTorch is missing: pip install torch to compare with it.") from e
    timing.choose_device(args.device, torch.cuda.is_available())
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    # In proportion to the paper's: four channels a group at the first level.
    groups = max(1, args.channels // 4)
    config = TokenizerConfig(channels=args.channels, norm_groups=groups, dtype="float32")
    params = random_params(config)
    x = jax.random.uniform(jax.random.key(1), (args.batch, *args.video, 3), minval=-1.0)
    model = twin.TorchTokenizer(config).to(args.device, memory_format=torch.channels_last_3d)
    twin.load_params(model, params)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    jax.config.update("jax_default_matmul_precision", "float32")  # GPUs would take TF32
    reconstruct, train, convolve = _ours(config)
    print(_setting(args, dtype, count(params), torch))
    ours = np.asarray(reconstruct(params, x)), *train(params, x)
    errors = _differences(twin, model, twin.to_torch(x, args.device), *ours)
    print("largest differences, float32: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    if not errors["outputs"] < TOLERANCE:
        raise UserError(f"The outputs differ by {errors['outputs']:.1e}: speeds mean nothing then.")

    if dtype != "float32":
        reconstruct, train, convolve = _ours(dataclasses.replace(config, dtype=dtype))
    h = jax.random.normal(jax.random.key(2), (args.batch, *args.video, args.channels))
    model.to(getattr(torch, dtype))
    y, g = (twin.to_torch(a, args.device).to(getattr(torch, dtype)) for a in (x, h))
    g.requires_grad_()
    kernel, conv = params["encoder"]["stages"][0]["conv1"], model.encoder.stages[0].conv1
    rows = (
        ("encode + decode", lambda: reconstruct(params, x), lambda: twin.apply(model, y)),
        ("the same, gradients of L2", lambda: train(params, x), lambda: twin.train(model, y, y)),
        (
            "one 3x3x3 convolution, likewise",
            lambda: convolve(kernel, h),
            lambda: twin.train(conv, g, 0.0),
        ),
    )
    timing.print_header()
    for name, mine, theirs in rows:
        yield {
            **timing.race(name, mine, theirs, clips=args.batch, repeats=args.repeats),
            "device": args.device,
            "dtype": dtype,
            "channels": args.channels,
            "shape": x.shape,
            "errors": errors,
        }
    print(f"load of this machine in the last minute: {os.getloadavg()[0]:.1f}")


def _differences(
    twin: ModuleType, model: Any, x: Any, ours: np.ndarray, loss: jax.Array, grads: Any
) -> dict[str, float]:
    """How far PyTorch's outputs, loss and gradients are from ours."""
    theirs = twin.apply(model, x).movedim(1, -1).cpu().numpy()
    errors = {"outputs": abs(ours - theirs).max(), "loss": abs(loss - twin.train(model, x, x))}
    grads = twin.torch_state(grads)
    errors["gradients, of their largest"] = max(
        (p.grad.cpu() - grads[name]).abs().max() / grads[name].abs().max()
        for name, p in model.named_parameters()
    )
    return {name: float(error) for name, error in errors.items()}


def _network(config: TokenizerConfig) -> Network[Tokenizer]:
    return Network.of(lambda rngs: Tokenizer(config, rngs=rngs))


def random_params(config: TokenizerConfig) -> Any:
    """Kernels that keep the variance; scales near 1 and biases near 0 that all count."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, noise = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            return jnp.asarray(noise / math.sqrt(math.prod(leaf.shape[:-1])))
        return jnp.asarray(0.1 * noise + (name == "scale"))

    return jax.tree.map_with_path(draw, _network(config).shapes())


def _ours(config: TokenizerConfig) -> tuple[Callable, Callable, Callable]:
    """Reconstruction; loss and gradients; the same of one convolution, its input's too."""
    network = _network(config)

    def reconstruct(params: Any, x: jax.Array) -> jax.Array:
        model = network.bind(params)
        return model.decode(model.encode(x))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(reconstruct(params, x) - x))

    conv = Network.of(
        lambda rngs: CausalConv(
            config.channels, config.channels, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
    )

    def conv_loss(params: Any, h: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(Whole().convolve(conv.bind(params), h).astype(jnp.float32)))

    train = jax.jit(jax.value_and_grad(loss))
    return jax.jit(reconstruct), train, jax.jit(jax.value_and_grad(conv_loss, argnums=(0, 1)))


def _setting(args: argparse.Namespace, dtype: str, params: int, torch: Any) -> str:
    video = "x".join(map(str, args.video))
    return (
        f"{args.batch} clips of {video}, {args.channels} channels ({params / 1e6:.1f}M parameters),"
        f" {dtype}, {timing.where(args.device, torch)}"
    )


def price(args: argparse.Namespace) -> Iterator[Record]:
    """Prints and gives the TPU compiler's estimates.

    Raises:
      UserError: no TPU compiler, or a video that does not fit the tokenizer.
    """
    jax.config.update("jax_platforms", "cpu")
    from benchmarks import tokenizer_parts as tokenizer
    from walt_jax.rehearsal.estimate import NOTE, TooLarge

    all_passes = tokenizer.PASSES[:1] if args.forward else tokenizer.PASSES
    print(f"{NOTE}; one clip a chip, bfloat16, each distinct part by itself and summed by count")
    for video in args.videos:
        fused = False if args.plain else None
        parts = tokenizer.tokenizer_parts(TokenizerConfig(), video, fused)
        for chip in args.chips:
            print(f"\n{'x'.join(map(str, video))} on {chip}: Mcycles of one and share of peak")
            header = "".join(f"{p:>22}" for p in all_passes)
            print(f"{'part':<30}{'input':>20}{'count':>7}{header}")
            rows, too_large = [], set()
            for part in tokenizer.level_blocks(parts) if args.levels else parts:
                size = "x".join(map(str, part.input))
                print(f"{part.name:<30}{size:>20}{part.count:>7}", end="", flush=True)
                for passes in all_passes:
                    try:
                        row = tokenizer.Row(part, passes, chip, part.price(passes, chip))
                    except TooLarge as e:
                        yield {"video": video, "part": part.name, "passes": passes, "error": str(e)}
                        print(f"{'does not fit':>22}", end="", flush=True)
                        too_large.add(passes)
                        continue
                    rows.append(row)
                    yield {"video": video, **row.record()}
                    lost = "?" if row.estimate.unpriced else " "
                    text = f"{row.estimate.cycles / 1e6:.2f} {row.share:7.1%}{lost}"
                    print(f"{text:>22}", end="", flush=True)
                print()
            if not args.levels:
                for passes in (p for p in all_passes if p not in too_large):
                    sums = tokenizer.total([r for r in rows if r.passes == passes])
                    _print_total(sums)
                    yield {"video": video, "part": "sum", **sums}


def _print_total(sums: Record) -> None:
    memory = ", ".join(f"{k} {v / 2**30:.1f}" for k, v in sums["hbm"].items())
    lost = f"; {len(sums['unpriced'])} kernels without a price" if sums["unpriced"] else ""
    print(
        f"sum, {sums['passes']}: {sums['cycles'] / 1e6:.1f} Mcycles = {sums['seconds']:.3f} s, "
        f"MFU {sums['share_of_peak']:.1%}, HBM in GiB: {memory}{lost}"
    )


if __name__ == "__main__":
    cli.run(main)
