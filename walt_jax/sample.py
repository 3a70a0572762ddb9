"""`python -m walt_jax.sample --workdir DIR --labels ... --out DIR`: generates videos."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from walt_jax import cli
from walt_jax.diffusion import Constant, Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.gallery import Section, write_gallery
from walt_jax.generation import Generator
from walt_jax.media import frame_grid, write_mp4, write_png


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, samples, and writes mp4 files, a frame grid and a gallery."""
    parser = cli.config_parser(
        "Samples videos from a trained denoiser.", config=False, overrides=False
    )
    parser.add_argument("--labels", default="", help="classes, names or numbers, by commas")
    parser.add_argument("--prompt", action="append", help="a text; may be given several times")
    parser.add_argument(
        "--num", type=int, default=16, help="videos, labels and prompts taking turns"
    )
    parser.add_argument(
        "--guidance", type=float, help="its strength, 1 is none (default: none, or the schedule's)"
    )
    parser.add_argument(
        "--guidance_schedule",
        choices=sorted(Scale.registry),
        default="constant",
        help="how its strength goes over time (default constant)",
    )
    parser.add_argument(
        "--sampler", choices=sorted(Sampler.registry), help="default: the config's kind"
    )
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=int, help="step of the checkpoint (default: newest)")
    parser.add_argument("--batch_size", type=int, default=16, help="videos at a time")
    parser.add_argument("--out", required=True, help="folder to write to")
    args, overrides = cli.parse(parser, argv)
    if overrides:
        raise UserError("sample takes the config of its --workdir: leave --config.* out.")
    for name in ("num", "batch_size", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    generator = Generator.load(args.workdir, args.checkpoint)
    task, model = generator.task, generator.task.model
    scale = Scale.registry[args.guidance_schedule]
    scale = scale() if args.guidance is None else scale(scale=args.guidance)
    if scale != Constant() and not (model.num_classes or model.text_features):
        raise UserError("This model has no classes and reads no text: leave --guidance out.")
    kind = args.sampler or task.sampler.name
    if kind == task.sampler.name:
        sampler = dataclasses.replace(task.sampler, num_steps=args.steps)
    else:
        sampler = Sampler.registry[kind](num_steps=args.steps)
    labels, prompts, captions = _wanted(generator, args)
    videos = generator.sample(
        labels,
        prompts=prompts,
        count=args.num,
        seed=args.seed,
        sampler=sampler,
        guidance=scale,
        batch_size=args.batch_size,
    )
    settings = (
        f"step {generator.step}, {args.steps} steps of {kind}, {args.guidance_schedule} guidance "
        f"{scale.scale:g}, seed {args.seed}"
    )
    write_samples(Path(args.out), videos, captions, generator.fps, settings)
    print(f"{args.num} videos in {args.out}; look at {args.out}/index.html")


def _wanted(
    generator: Generator, args: argparse.Namespace
) -> tuple[np.ndarray | None, list[str] | None, list[str]]:
    """Labels, prompts and what to write under each video."""
    names = [n.strip() for n in args.labels.split(",") if n.strip()]
    classes = generator.task.model.num_classes
    labels = prompts = None
    captions = [""] * args.num
    if classes or names:
        chosen = generator.labels(names) if names else np.arange(classes, dtype=np.int32)
        labels = np.resize(chosen, args.num)
        captions = [generator.name(i) for i in labels]
    if generator.task.text is not None or args.prompt:
        given = args.prompt or [""]
        prompts = [given[i % len(given)] for i in range(args.num)]
        captions = [", ".join(filter(None, pair)) for pair in zip(captions, prompts)]
    return labels, prompts, captions


def write_samples(
    folder: Path, videos: np.ndarray, captions: Sequence[str], fps: float, settings: str
) -> None:
    """Writes uint8 videos (N, T, H, W, 3) as mp4 with a frame grid and a gallery."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i, (video, caption) in enumerate(zip(videos, captions)):
        write_mp4(folder / f"{i:04d}.mp4", video, fps)
        items.append((f"{i:04d}.mp4", f"{caption} ({settings}, video {i})"))
    write_png(folder / "grid.png", frame_grid(videos[:32]))
    sections = [
        Section("Videos", settings, items),
        Section("Frames", items=[("grid.png", "one video a row")]),
    ]
    write_gallery(folder / "index.html", "Samples", sections)


if __name__ == "__main__":
    cli.run(main)
