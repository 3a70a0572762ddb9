"""How fast does the denoiser train? Against PyTorch on this machine, and on TPUs by the compiler.

    python -m benchmarks.denoiser_speed [--width 256] [--device cuda] [--compile]
    python -m benchmarks.denoiser_speed --tpu [--models walt-l-ucf101]

Without `--tpu`: clips a second of one evaluation, of the gradients of the squared error of v, and
of a training step (these gradients and AdamW), of a class-conditional `walt_jax.models.Denoiser`
and of the same layers in PyTorch (`torch_denoiser.py`) with the same weights. Outputs, loss and
gradients are compared first, in float32; then both run in turn, and the medians and their ratio
are printed. PyTorch has its own attention and fused AdamW and runs eagerly, or with `--compile`
through torch.compile; in bfloat16 both keep float32 parameters. Neither recomputes activations.
On a CPU, set GLIBC_TUNABLES as the Makefile does: XLA's buffers then lie in huge pages, and stay
there from one step to the next. Where other programs use the cores too, compare core seconds on one
core (`taskset -c 0 python -m ...`).

With `--tpu`: cycles, share of peak and HBM of published sizes, one clip a chip, by the TPU
compiler, with no TPU attached: one evaluation, and one with its gradients.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.timing import Record
from walt_jax import cli
from walt_jax.diffusion import Diffusion
from walt_jax.errors import UserError
from walt_jax.models import Conditions, Denoiser, DenoiserConfig, Network, count
from walt_jax.models.named import DENOISERS
from walt_jax.training.flops import forward_flops, gradient_flops
from walt_jax.training.optimizers import OptimizerConfig, make_optimizer

TOLERANCE = 1e-4
TEXT_TOKENS = 64  # of a caption, where a size has text
ADAMW = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, schedule="constant", grad_clip=0.0)


def main() -> None:
    args = _arguments()
    records = []
    for record in price(args.models, args.chips) if args.tpu else compare(args):
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
    ours.add_argument("--width", type=int, default=256)
    ours.add_argument("--layers", type=int, default=8)
    ours.add_argument("--heads", type=int, default=4)
    ours.add_argument("--grid", type=grid, default=(3, 16, 16), metavar="TxHxW")
    ours.add_argument("--batch", type=int, default=2)
    ours.add_argument("--repeats", type=int, default=5)
    ours.add_argument("--compile", action="store_true", help="PyTorch through torch.compile")
    tpu = parser.add_argument_group("the TPU compiler's estimates")
    tpu.add_argument("--tpu", action="store_true")
    tpu.add_argument("--models", nargs="+", default=["walt-l-ucf101"], choices=DENOISERS)
    tpu.add_argument("--chips", nargs="+", default=["v5e", "v5p"], choices=("v5e", "v5p", "v6e"))
    return parser.parse_args()


def grid(text: str) -> tuple[int, int, int]:
    """Reads TxHxW."""
    frames, rows, columns = map(int, text.split("x"))
    return frames, rows, columns


def compare(args: argparse.Namespace) -> Iterator[Record]:
    """Checks that both frameworks compute the same, then times them in turn.

    Raises:
      UserError: PyTorch or the device is missing, or the outputs differ.
    """
    try:
        import torch

        from benchmarks import torch_denoiser as twin
    except ModuleNotFoundError as e:
        raise UserError("PyTorch is missing: pip install torch to compare with it.") from e
    timing.choose_device(args.device, torch.cuda.is_available())
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    config = DenoiserConfig(
        grid=args.grid,
        width=args.width,
        num_heads=args.heads,
        num_layers=args.layers,
        num_classes=101,
        remat=False,
        dtype="float32",
    )
    params, inputs = random_params(config), _inputs(config, args.batch)
    model = twin.TorchDenoiser(config).to(args.device)
    model.load_state_dict(twin.torch_state(params))
    tensors = [torch.tensor(np.asarray(x), device=args.device) for x in inputs]
    torch.backends.cuda.matmul.allow_tf32 = False
    jax.config.update("jax_default_matmul_precision", "float32")  # GPUs would take TF32
    print(_setting(args, dtype, count(params), torch))
    ours = Ours(config, params, inputs)
    errors = _differences(twin, model, tensors, ours)
    print("largest differences, float32: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    if not errors["outputs"] < TOLERANCE:
        raise UserError(f"The outputs differ by {errors['outputs']:.1e}: speeds mean nothing then.")

    if dtype != "float32":
        ours = Ours(dataclasses.replace(config, dtype=dtype), params, inputs)
    run = torch.compile(model) if args.compile else model
    # As in make_optimizer: no decay of weights.
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=ADAMW.learning_rate,
        betas=(ADAMW.b1, ADAMW.b2),
        weight_decay=ADAMW.weight_decay,
        fused=True,
    )
    low = torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16")
    rows = (
        ("one evaluation", ours.evaluate, low(lambda: twin.evaluate(run, *tensors[:-1]))),
        ("loss and gradients", ours.differentiate, low(lambda: twin.differentiate(run, *tensors))),
        ("training step with AdamW", ours.step, low(lambda: twin.step(adamw, run, *tensors))),
    )
    timing.print_header()
    for name, mine, theirs in rows:
        yield {
            **timing.race(name, mine, theirs, clips=args.batch, repeats=args.repeats),
            "device": args.device,
            "dtype": dtype,
            "compile": args.compile,
            "model": dataclasses.asdict(config),
            "batch": args.batch,
            "errors": errors,
        }
    print(f"load of this machine in the last minute: {os.getloadavg()[0]:.1f}")


class Ours:
    """What is timed of walt_jax; `inputs` are z, t, label and the target."""

    def __init__(self, config: DenoiserConfig, params: Any, inputs: tuple[jax.Array, ...]) -> None:
        network = Network.of(lambda rngs: Denoiser(config, rngs=rngs))
        optimizer = make_optimizer(ADAMW, num_steps=1)

        def evaluate(params: Any, z: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
            return network.bind(params)(z, t, Conditions(label=label))

        def loss(params: Any, *inputs: jax.Array) -> jax.Array:
            *known, target = inputs
            return jnp.mean(jnp.square(evaluate(params, *known) - target))

        def step(state: Any, *inputs: jax.Array) -> tuple[Any, jax.Array]:
            params, moments = state
            value, grads = jax.value_and_grad(loss)(params, *inputs)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        self._params, self._inputs = params, inputs
        own = jax.tree.map(jnp.copy, params)  # a step takes its state's memory
        self._state = own, optimizer.init(own)
        self._evaluate, self._differentiate = jax.jit(evaluate), jax.jit(jax.value_and_grad(loss))
        self._step = jax.jit(step, donate_argnums=0)

    def evaluate(self) -> jax.Array:
        """The network without gradients."""
        return self._evaluate(self._params, *self._inputs[:-1])

    def differentiate(self) -> tuple[jax.Array, Any]:
        """Loss and gradients."""
        return self._differentiate(self._params, *self._inputs)

    def step(self) -> jax.Array:
        """One update of the state kept here; the loss."""
        self._state, loss = self._step(self._state, *self._inputs)
        return loss


def _inputs(config: DenoiserConfig, batch: int) -> tuple[jax.Array, ...]:
    """Noisy latents, their times and classes, and v."""
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (batch, *config.grid, config.latent_channels)
    x0, eps = (jax.random.normal(key, shape) for key in keys[:2])
    diffusion = Diffusion()
    t = jnp.asarray(diffusion.process.even_times(batch))
    label = jax.random.randint(keys[2], (batch,), 0, config.num_classes)
    target = diffusion.target.of(x0, eps, *diffusion.process.levels(t, x0))
    return diffusion.add_noise(x0, eps, t), t, label, target


def random_params(config: DenoiserConfig) -> Any:
    """Kernels that keep the variance; all else near its usual size, so that all of it counts."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, noise = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            return jnp.asarray(noise / leaf.shape[-2] ** 0.5)
        return jnp.asarray(0.1 * noise + name.endswith("scale"))

    shapes = Network.of(lambda rngs: Denoiser(config, rngs=rngs)).shapes()
    return jax.tree_util.tree_map_with_path(draw, shapes)


def _differences(twin: ModuleType, model: Any, inputs: list[Any], ours: Ours) -> dict[str, float]:
    """How far PyTorch's outputs, loss and gradients are from ours."""
    theirs = twin.evaluate(model, *inputs[:-1]).cpu().numpy()
    loss, grads = ours.differentiate()
    errors = {
        "outputs": abs(ours.evaluate() - theirs).max(),
        "loss": abs(loss - twin.differentiate(model, *inputs)),
    }
    grads = twin.torch_state(grads)
    errors["gradients, of their largest"] = max(
        (p.grad.cpu() - grads[name]).abs().max() / grads[name].abs().max()
        for name, p in model.named_parameters()
    )
    return {name: float(error) for name, error in errors.items()}


def _setting(args: argparse.Namespace, dtype: str, params: int, torch: Any) -> str:
    grid = "x".join(map(str, args.grid))
    return (
        f"{args.batch} clips of {grid} latents, width {args.width}, {args.layers} layers "
        f"({params / 1e6:.1f}M parameters), {dtype}, {timing.where(args.device, torch)}, "
        f"{'compiled' if args.compile else 'eager'}"
    )


def price(models: list[str], chips: list[str]) -> Iterator[Record]:
    """Prints and gives the TPU compiler's estimates of one clip a chip.

    Raises:
      UserError: no TPU compiler.
    """
    jax.config.update("jax_platforms", "cpu")
    from walt_jax.rehearsal.chips import CHIPS
    from walt_jax.rehearsal.estimate import NOTE, estimate, peak_share

    print(f"{NOTE}; one clip a chip, {DenoiserConfig.dtype}")
    print(f"{'':<42}{'Mcycles':>10}{'ms':>9}{'MFU':>7}{'HBM, GiB: arguments, temporaries':>36}")
    for model in models:
        for name, function, arguments, flops in passes(DENOISERS[model]):
            for chip in chips:
                cost = estimate(function, *arguments, chip=chip)
                memory = cost.arguments / 2**30, cost.temporaries / 2**30
                seconds = cost.cycles / CHIPS[chip].hertz
                share = peak_share(flops, cost.cycles, chip)
                print(
                    f"{f'{model}, {name}, {chip}':<42}{cost.cycles / 1e6:>10.2f}"
                    f"{1e3 * seconds:>9.2f}{share:>7.1%}{memory[0]:>24.2f}{memory[1]:>12.2f}"
                    + (f"; {len(cost.unpriced)} kernels without a price" if cost.unpriced else ""),
                    flush=True,
                )
                yield {
                    "model": model,
                    "passes": name,
                    "chip": chip,
                    "flops": flops,
                    "seconds": seconds,
                    "share_of_peak": share,
                    **dataclasses.asdict(cost),
                }


def passes(
    config: DenoiserConfig, clips: int = 1
) -> Iterator[tuple[str, Callable, tuple[Any, ...], float]]:
    """What is priced of a size: (name, function, shapes, model FLOPs)."""
    network = Network.of(lambda rngs: Denoiser(config, rngs=rngs))
    plain = dataclasses.replace(
        config, remat=False, attention="xla"
    )  # recomputation is no work of the model's
    exact = Network.of(lambda rngs: Denoiser(plain, rngs=rngs))
    z = jax.ShapeDtypeStruct((clips, *config.grid, config.latent_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((clips,), jnp.int32)
    arguments = network.shapes(), z, t, _conditions(config, z, t)

    def loss(network: Network, *arguments: Any) -> tuple[jax.Array, None]:
        params, *inputs = arguments
        return jnp.mean(jnp.square(network.bind(params)(*inputs))), None

    def evaluate(params: Any, *inputs: Any) -> jax.Array:
        return network.bind(params)(*inputs)

    def gradients(*arguments: Any) -> Any:
        return jax.grad(lambda *a: loss(network, *a)[0])(*arguments)

    yield "forward", evaluate, arguments, forward_flops(evaluate, *arguments)
    flops = gradient_flops(lambda *a: loss(exact, *a), *arguments)
    yield "forward + backward", gradients, arguments, flops


def _conditions(config: DenoiserConfig, z: Any, t: Any) -> Conditions:
    """Shapes of all that the network may be told."""
    text = (z.shape[0], TEXT_TOKENS, config.text_features)
    mask = jax.ShapeDtypeStruct(z.shape[:-1], jnp.bool_)
    return Conditions(
        label=t if config.num_classes else None,
        text=jax.ShapeDtypeStruct(text, jnp.float32) if config.text_features else None,
        given=z if config.given != "none" else None,
        given_mask=mask if config.given != "none" else None,
        estimate=z if config.self_conditioning else None,
        low=z if config.upsampling else None,
        low_time=t if config.upsampling else None,
    )


if __name__ == "__main__":
    cli.run(main)
