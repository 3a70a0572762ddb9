"""How fast are videos sampled? Against PyTorch, in one run.

    python -m benchmarks.sampling_speed [--width 256] [--device cuda] [--compile]

All of a sample: DDIM with classifier-free guidance, two evaluations a step in one call, and
decoding, by `walt_jax.tasks.DenoiserTask.sample`, and by the same networks in PyTorch
(`torch_denoiser.py`, `torch_tokenizer.py`) with the same weights and noise. The pixels are compared
first, in float32. Printed are the time to the first video of a fresh process, compilation included
and imports not, of one video and of `--batch` of them; then both run in turn for videos a second,
and the medians and their ratio. PyTorch runs eagerly, or with `--compile` its denoiser through
torch.compile. On a CPU set GLIBC_TUNABLES as the Makefile does. Where other programs use the cores
too, compare core seconds on one core (`taskset -c 0 python -m ...`).

What a TPU takes, by its compiler:

    python -m walt_jax.rehearse --job sample --config configs/walt_ucf101.py:l --topology v5e:1x1
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import denoiser_speed, timing, tokenizer_speed
from benchmarks.timing import Record
from walt_jax import cli
from walt_jax.diffusion import Constant, Ddim, standard_normal
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig, TokenizerConfig, count
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.tasks import DenoiserTask, Wanted

TOLERANCE = 1e-3  # of pixels in [-1, 1], after all steps


def main() -> None:
    args = _arguments()
    records = compare(args)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, default=128, help="of the denoiser")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--grid", type=denoiser_speed.grid, default=(3, 8, 8), metavar="TxHxW")
    parser.add_argument("--channels", type=int, default=16, help="of the tokenizer's first level")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="PyTorch through torch.compile")
    return parser.parse_args()


def compare(args: argparse.Namespace) -> list[Record]:
    """Checks that both frameworks sample the same videos, then times them in turn.

    Raises:
      UserError: PyTorch or the device is missing, or the videos differ.
    """
    try:
        import torch

        from benchmarks import torch_denoiser, torch_tokenizer
    except ModuleNotFoundError as e:
        raise UserError("PyTorch is missing: pip install torch to compare with it.") from e
    timing.choose_device(args.device, torch.cuda.is_available())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    jax.config.update("jax_default_matmul_precision", "float32")  # GPUs would take TF32
    task, tokenizer_config = _sizes(args)
    params = denoiser_speed.random_params(task.model)
    weights = tokenizer_speed.random_params(tokenizer_config)
    frozen = _frozen(tokenizer_config, weights)
    sampler, guidance = Ddim(num_steps=args.steps), Constant(args.guidance)

    @jax.jit
    def run(params: Any, frozen: FrozenTokenizer, keys: jax.Array, label: jax.Array) -> jax.Array:
        return task.sample(params, frozen, Wanted(label=label), keys, sampler, guidance)

    model = torch_denoiser.TorchDenoiser(task.model).to(args.device)
    model.load_state_dict(torch_denoiser.torch_state(params))
    decoder = torch_tokenizer.TorchTokenizer(tokenizer_config)
    torch_tokenizer.load_params(decoder, weights)
    decoder = decoder.decoder.to(args.device, memory_format=torch.channels_last_3d)
    denoise = torch.compile(model) if args.compile else model
    plan = _plan(task, sampler)

    def both(videos: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """What samples so many videos, here and there, from the same noise."""
        keys = jax.random.split(jax.random.key(1), videos)
        label = jnp.arange(videos, dtype=jnp.int32) % task.model.num_classes
        noise = standard_normal(keys, (*task.model.grid, task.model.latent_channels))
        z, c = (torch.tensor(np.asarray(x), device=args.device) for x in (noise, label))

        def theirs() -> np.ndarray:
            none = torch.full_like(c, task.model.num_classes)
            latents = torch_denoiser.sample(denoise, z, c, none, args.guidance, plan)
            # The tokenizer's moments are 0 and 1: latents are decoded as they are.
            pixels = torch_tokenizer.apply(decoder, latents.movedim(-1, 1))
            return pixels.movedim(1, -1).clamp(-1, 1).cpu().numpy()

        return lambda: run(params, frozen, keys, label), theirs

    grid = "x".join(map(str, args.grid))
    print(
        f"videos of {grid} latents, {count(params) / 1e6:.1f}M + "
        f"{count(weights['decoder']) / 1e6:.1f}M parameters, {args.steps} steps, float32, "
        f"{timing.where(args.device, torch)}, {'compiled' if args.compile else 'eager'}"
    )
    ours, theirs = both(1)
    (mine, first), (other, first_there) = _timed(ours), _timed(theirs)
    error = float(np.abs(mine - other).max())
    print(f"largest difference of pixels in [-1, 1]: {error:.1e}")
    if not error < TOLERANCE:
        raise UserError(f"The videos differ by {error:.1e}: speeds mean nothing then.")
    print(f"time to the first video: {first:.2f} s, PyTorch {first_there:.2f} s")
    common = {"device": args.device, "compile": args.compile, "difference": error}
    common |= {"first_video": dict(zip(timing.FRAMEWORKS, (first, first_there)))}
    timing.print_header()
    records = []
    for videos in sorted({1, args.batch}):
        name = f"{videos} video{'s' * (videos > 1)} at a time"
        run_both = both(videos)
        race = timing.race(name, *run_both, clips=videos, repeats=args.repeats)
        records.append(common | race)
    print(f"load of this machine in the last minute: {os.getloadavg()[0]:.1f}")
    return records


def _sizes(args: argparse.Namespace) -> tuple[DenoiserTask, TokenizerConfig]:
    model = DenoiserConfig(
        grid=args.grid,
        width=args.width,
        num_heads=args.heads,
        num_layers=args.layers,
        windows=((1, 0, 0), (0, args.grid[1] // 2, args.grid[2] // 2)),
        num_classes=101,
        remat=False,
        dtype="float32",
    )
    # In proportion to the paper's: four channels a group at the first level.
    groups = max(1, args.channels // 4)
    tokenizer = TokenizerConfig(
        channels=args.channels, num_res_blocks=2, norm_groups=groups, dtype="float32"
    )
    return DenoiserTask(tokenizer="", model=model), tokenizer


def _frozen(config: TokenizerConfig, params: Any) -> FrozenTokenizer:
    params = jax.tree.map(np.asarray, params)
    ones = np.ones(config.latent_channels, np.float32)
    return FrozenTokenizer.create(config, params, 0 * ones, ones)


def _plan(task: DenoiserTask, sampler: Ddim) -> list[tuple[float, ...]]:
    """Of each step the time, and signal and noise before and after it."""
    grid = task.diffusion.process.grid(sampler.num_steps)
    levels = grid.signal[:-1], grid.noise[:-1], grid.signal[1:], grid.noise[1:]
    return [tuple(map(float, step)) for step in zip(grid.times, *levels)]


def _timed(run: Callable[[], Any]) -> tuple[np.ndarray, float]:
    began = time.perf_counter()
    videos = np.asarray(run())
    return videos, time.perf_counter() - began


if __name__ == "__main__":
    cli.run(main)
