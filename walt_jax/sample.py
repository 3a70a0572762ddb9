"""`python -m walt_jax.sample --workdir DIR --prompt ... --out DIR`: generates videos."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import walt_jax
from walt_jax import cli
from walt_jax.diffusion import Sampler, Scale
from walt_jax.errors import UserError
from walt_jax.generation import TASKS
from walt_jax.generation.cascade import enlarged
from walt_jax.generation.output import PAGE, settings_of, write_long, write_samples
from walt_jax.generation.sources import read_prompts
from walt_jax.generation.tasks import long_pieces
from walt_jax.generation.walt import packaged
from walt_jax.parallel.mesh import make_mesh, parse_mesh
from walt_jax.tasks.plans import SCHEMES

_NOTHING_SAID = 16  # videos, where neither text nor a picture says how many


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, samples, and writes videos, a frame grid and a gallery."""
    args, overrides = cli.parse(_parser(), argv)
    if overrides:
        raise UserError("sample takes the config of its --workdir: leave --config.* out.")
    _check_folder(args.out)
    mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
    walt = walt_jax.load(args.workdir, step=args.checkpoint, mesh=mesh)
    every = walt.generator.sizes.every(args.fps)
    request = walt.request(**_wishes(args))
    fps = walt.fps / every
    settings = settings_of(request, fps, args.workdir)
    if request.task == "long" and args.format in (None, "mp4") and not args.cascade:
        write_long(args.out, long_pieces(request), settings, fps, every)
    else:
        if args.cascade:
            stages = args.cascade.split(",")
            videos = enlarged(request, stages)
            settings = [{**row, "cascade": stages} for row in settings]
        else:
            videos = TASKS[request.task].make(request)
        write_samples(args.out, videos[:, ::every], settings, fps, args.format)
    print(f"{request.count} videos in {args.out}; look at {args.out}/{PAGE}")


def _check_folder(out: str) -> None:
    """Before anything is sampled, as samples would be lost."""
    if "://" in out:
        raise UserError(f"--out {out} is no local folder: name one, and copy the videos then.")
    path = Path(out).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--out {out} cannot be made, {there} is in the way: name another folder.")


def _wishes(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as the arguments of `Walt.request`."""
    labels = [name.strip() for name in args.labels.split(",") if name.strip()]
    prompts = [*args.prompt, *(read_prompts(args.prompts_file) if args.prompts_file else [])]
    num = args.num
    if num is None and not (labels or prompts or args.image or args.video):
        num = _NOTHING_SAID
    guidance = None
    if args.guidance is not None or args.guidance_schedule != "constant":
        scale = Scale.registry[args.guidance_schedule]
        guidance = scale() if args.guidance is None else scale(scale=args.guidance)
    same = (
        "task",
        "image",
        "video",
        "mask",
        "size",
        "seconds",
        "direction",
        "strength",
        "scheme",
        "seed",
    )
    same = (*same, "negative_prompt", "given_guidance", "sampler", "steps", "batch_size")
    return {
        "prompt": prompts or None,
        "label": labels or None,
        "num": num,
        "guidance": guidance,
        **{name: getattr(args, name) for name in same},
    }


def _parser() -> argparse.ArgumentParser:
    tasks = "\n".join(f"  {task.name:15} {task.summary}" for task in TASKS.values())
    parser = cli.config_parser(
        "Samples videos from a trained denoiser: the workdir of its run, a folder of\n"
        f"walt_jax.export, or the name of a model that comes with walt_jax. Tasks:\n{tasks}",
        config=False,
        overrides=False,
        workdir="a run, an export (local or gs://), or a model that comes along: "
        + ", ".join(packaged()),
    )
    add = parser.add_argument
    add("--out", required=True, help="folder to write to")
    add("--task", default="text_to_video", metavar="TASK", help="(default text_to_video)")
    add("--prompt", action="append", default=[], help="a text; may be given several times")
    add("--prompts_file", help="a file with a prompt a line")
    add("--negative_prompt", action="append", help="what not to show; one, or one a prompt")
    add("--labels", default="", help="classes, names or numbers, by commas")
    add("--num", type=int, help="videos, prompts, labels and pictures taking turns")
    add("--image", action="append", help="a picture; may be given several times")
    add("--video", action="append", help="a video; may be given several times")
    add("--mask", help="of inpaint and outpaint: a picture, white where to paint, or a box,\n"
        "top,left,bottom,right as shares of the frame, such as 0,0,0.5,1")  # fmt: skip
    add("--size", help="width:height@resolution such as 9:16@256, or HEIGHTxWIDTH")
    add("--seconds", type=float, help="length of a clip; of extend, what is added")
    add("--fps", type=float, help="frames a second: the model's, or a part of it")
    add("--direction", choices=("forward", "backward"), help="of extend (default forward)")
    add("--strength", type=float, help="of edit: from 0, the video, to 1, noise (default 0.6)")
    add("--scheme", choices=sorted(SCHEMES), help="of long: the order in which frames come about\n"
        "(default frame_prediction)")  # fmt: skip
    add("--cascade", metavar="DIR,DIR", help="models of super-resolution that make clips larger")
    add("--seed", type=int, default=0)
    add("--guidance", type=float, help="its strength; 1 is none (default: none, or the schedule's)")
    add("--guidance_schedule", choices=sorted(Scale.registry), default="constant",
        help="how its strength goes over time (default constant)")  # fmt: skip
    add("--given_guidance", type=float, help="strength of guidance by what is given")
    add("--sampler", choices=sorted(Sampler.registry), help="default: the config's kind")
    add("--steps", type=int, default=50, help="steps of the sampler (default 50)")
    add("--mesh", help="devices by axis, such as data=4,fsdp=2 (default: data, all)")
    add("--batch_size", type=int, default=16, help="videos at a time (default 16)")
    add("--checkpoint", type=int, help="step of the checkpoint (default: newest)")
    add("--format", choices=("mp4", "gif", "png"), help="of the files (default mp4; images png)")
    return parser


if __name__ == "__main__":
    cli.run(main)
