"""`python -m walt_jax.evaluate fvd|checkpoint|follow|tokenizer|report ...`: scores that repeat.

    fvd --real DIR --fake DIR                     two folders of videos
    checkpoint --workdir W --protocol P           samples from a checkpoint, and their scores
    follow --workdir W --protocol P               the same for every checkpoint, as they come
    tokenizer --workdir W                         reconstruction
    report --workdir W --out DIR                  curves, samples, a table beside the papers'

`--protocol.key=value` changes a key of the protocol, `--evaluator` asks for other scores than the
Frechet distance; see docs/scores.md.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.diffusion import Constant, Sampler
from walt_jax.errors import UserError
from walt_jax.evaluation import features, partial, protocols, reference, report, scores, scoring
from walt_jax.evaluation.clips import Clips, check_pair
from walt_jax.evaluation.evaluators import Evaluator, Fvd, Reconstruction, Sampling
from walt_jax.evaluation.follow import follow, steps_of
from walt_jax.evaluation.measures import Frechet
from walt_jax.evaluation.reconstruct import Reconstructor
from walt_jax.evaluation.scores import Score
from walt_jax.generation import Generator
from walt_jax.parallel import MeshConfig, distributed, make_mesh

_BATCH = 8  # clips given to a feature network at once; no feature depends on it
# Arguments that are an evaluator's own keys.
_OPTIONS = ("features", "weights", "resize", "allow", "kernel_videos", "metrics", "lpips")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and scores."""
    parser = _parser()
    args, changes = cli.parse(parser, argv, "protocol")
    args.run(args, tuple(changes))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__.strip("_"), help=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command(_fvd, "compare two folders of videos")
    sub.add_argument("--real", required=True, help="folder of videos, prepared dataset, or .npz")
    sub.add_argument("--fake", required=True, help="folder of generated videos")
    sub.add_argument("--out", default="out/scores", help="for scores.jsonl (default out/scores)")
    _add_common(sub)
    for run, text in (
        (_checkpoint, "sample from checkpoints of a denoiser and score the samples"),
        (_follow, "the same for every checkpoint as it comes"),
        (_tokenizer, "reconstruct real clips by a tokenizer"),
    ):
        sub = command(run, text)
        sub.add_argument("--workdir", required=True, help="of the run (local or gs://)")
        sub.add_argument("--real", default="", help="instead of the run's own data; see fvd")
        sub.add_argument("--real_part", choices=("all", "train", "eval"), default="")
        sub.add_argument(
            "--evaluator", action="append", choices=sorted(Evaluator.registry), default=[]
        )
        _add_common(sub)
        if run is not _follow:
            sub.add_argument("--step", default="latest", help="a step, latest or all")
        if run is not _tokenizer:
            _add_sampling(sub)
        if run is not _checkpoint:
            known = ("psnr", "ssim", "ms_ssim", "lpips")
            sub.add_argument("--metrics", nargs="+", choices=known, help="of reconstructions")
            sub.add_argument("--lpips", default="", help="file of weights for the metric lpips")
        if run is _follow:
            sub.add_argument("--poll", type=float, default=30.0, help="seconds between looks (30)")
            sub.add_argument("--patience", type=float, help="seconds without a checkpoint to end")
            sub.add_argument("--newest", action="store_true", help="leave out overtaken ones")
    sub = command(_report, "draw scores over steps, samples, and a table beside the papers'")
    sub.add_argument("--workdir", required=True, action="append", help="may be given several times")
    sub.add_argument("--out", required=True, help="folder to write to")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--protocol", default=protocols.CUSTOM, help="see docs/scores.md")
    parser.add_argument("--features", default="", help="a network (i3d), or module:function")
    parser.add_argument("--weights", default="", help="file, or URL#sha256=..., of its weights")
    parser.add_argument("--resize", default="", help="instead of the network's own")
    parser.add_argument("--allow", action="append", default=[], help="a kind of weights to take")
    parser.add_argument(
        "--kernel_videos", type=int, default=0, help="also the kernel distance, of so many a side"
    )
    parser.add_argument("--cache", default="", help="for statistics of real clips")
    parser.add_argument("--seed", type=int, default=0, help="of noise and random clips (default 0)")
    distributed.add_flags(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--raw", action="store_true", help="raw weights, not the moving average")
    parser.add_argument("--sampler", choices=sorted(Sampler.registry), help="default: the task's")
    parser.add_argument("--steps", type=int, default=0, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is none (default)")
    parser.add_argument("--prompts", default="", help="file with a prompt a line")
    parser.add_argument("--per_device", type=int, default=1, help="samples at a time (default 1)")


def _fvd(args: argparse.Namespace, changes: tuple[str, ...]) -> None:
    distributed.start(args)
    protocol = protocols.choose(args.protocol, changes)
    net = features.load(
        args.features or Fvd.features,
        args.weights or None,
        resize=args.resize or None,
        mesh=make_mesh(MeshConfig(), jax.local_devices()),
        allow=tuple(args.allow),
    )
    features.check_clips(net, protocol.num_frames)
    cut = functools.partial(Clips, seed=args.seed)
    fake = cut(args.fake, protocol, samples=True)
    if args.real.endswith(".npz"):
        statistics = reference.load(args.real, protocol, net, kept=args.kernel_videos)
    else:
        real = cut(args.real, protocol)
        check_pair(real, fake)
        cache, kept = args.cache or default_cache(), args.kernel_videos
        statistics, path = reference.statistics(real, net, cache, kept=kept)
        _say(f"statistics of the real clips: {path}")
    counted = dataclasses.replace(protocol, num_samples=len(fake) // protocol.folds)
    rows = statistics.rows[: args.kernel_videos] if args.kernel_videos else None
    measure = Frechet(net, counted, statistics.moments, rows, cut=True)
    record = {
        "protocol": config_lib.to_dict(protocol),
        "covariance": "unbiased" if protocol.unbiased else "biased",
        "real": statistics.source,
        "samples": fake.record,
        **measure.record,
        "code": scores.code(),
    }
    folder = epath.Path(args.out) / f"sums-{scores.identity({'score': record})}"
    partial.gather(
        folder,
        len(fake),
        {"features": measure},
        lambda numbers: fake.batches(numbers, _BATCH, raw=True),
        what="generated clips",
    )
    made = [Score(name, folds, record) for name, folds in measure.results().items()]
    if jax.process_index() == 0:
        if not scores.find(args.out, record):
            scores.append(args.out, made)
        counts = f"{statistics.source['clips']} real clips, {len(fake)} generated"
        print(f"{', '.join(map(str, made))} ({counts}; {args.out})")
    partial.remove(folder)


def _checkpoint(args: argparse.Namespace, changes: tuple[str, ...]) -> None:
    distributed.start(args)
    score = _scorer(args, _evaluators(args, changes, (Fvd,)), Generator.load)
    for step in _steps(args):
        _tell(args, score(step))


def _tokenizer(args: argparse.Namespace, changes: tuple[str, ...]) -> None:
    distributed.start(args)
    evaluators = _evaluators(args, changes, (Reconstruction, Fvd))
    score = _scorer(args, evaluators, Reconstructor.load)
    for step in _steps(args):
        _tell(args, score(step))


def _follow(args: argparse.Namespace, changes: tuple[str, ...]) -> None:
    distributed.start(args)

    # What the config says is read when there is one.
    @functools.cache
    def scorer() -> Callable[[int], list[Score]]:
        task = config_lib.read_resolved(args.workdir)["task"]["name"]
        if task == "tokenizer":
            defaults, load = (Reconstruction, Fvd), Reconstructor.load
        else:
            defaults, load = (Fvd,), Generator.load
        evaluators = _evaluators(args, changes, defaults)
        left = [e for e in evaluators if not e.inline]  # by training
        return _scorer(args, left or evaluators, load)

    options = {"poll": args.poll, "patience": args.patience, "newest": args.newest}
    made = follow(args.workdir, lambda step: scorer()(step), **options)
    _say(f"{len(made)} scores in {args.workdir}/{scores.SCORES}")


def _report(args: argparse.Namespace, changes: tuple[str, ...]) -> None:
    if changes:
        raise UserError("report shows scores as they are: leave --protocol.* out.")
    page = report.write(args.workdir, args.out)
    print(f"look at {page}")


def _evaluators(
    args: argparse.Namespace, changes: tuple[str, ...], defaults: tuple[type[Evaluator], ...]
) -> list[Evaluator]:
    """Those named on the command line, or else the config's, or else the usual ones."""
    options: dict[str, Any] = {"real": args.real, "real_part": args.real_part, "seed": args.seed}
    if "guidance" in args:
        options |= {
            "sampler": Sampler.registry[args.sampler]() if args.sampler else None,
            "num_steps": args.steps,
            "guidance": Constant(args.guidance),
            "prompts": args.prompts,
            "per_device": args.per_device,
        }
    sampling = Sampling(args.protocol, changes, **options)
    found = {key: getattr(args, key, None) for key in _OPTIONS}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if v}
    nothing_said = sampling == Sampling() and not given and not args.evaluator
    if nothing_said and (values := config_lib.read_resolved(args.workdir).get("evaluators")):
        return [config_lib.build(Evaluator, v, "config.evaluators") for v in values]
    kinds = [Evaluator.registry[name] for name in args.evaluator] or defaults
    keys = {kind: {field.name for field in dataclasses.fields(kind)} for kind in kinds}
    for key in given:
        readers = sum(key in known for known in keys.values())
        if not readers:
            raise UserError(f"No evaluator that is asked for reads --{key}: leave it out.")
        if readers > 1 and key in ("features", "weights"):
            raise UserError(
                f"--{key} is of one network, but several evaluators have one each: ask for one "
                "evaluator at a time, or name them in config.evaluators."
            )
    return [
        kind(sampling=sampling, **{k: v for k, v in given.items() if k in keys[kind]})
        for kind in kinds
    ]


def _scorer(
    args: argparse.Namespace, evaluators: Sequence[Evaluator], load: Callable[..., Any]
) -> Callable[[int], list[Score]]:
    """Scores a step; what checkpoints have in common is made ready at the first."""
    values = config_lib.read_resolved(args.workdir)
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    options: dict[str, Any] = {"mesh": mesh}
    if getattr(args, "raw", False):
        options["weights"] = "raw"
    ready: list[scoring.Scoring] = []

    def score(step: int) -> list[Score]:
        subject = error = None
        try:
            subject = load(args.workdir, step, **options)
        except UserError as e:
            error = e
        if partial.anywhere(error is not None):  # or else the others would wait for ever
            raise error or UserError(f"Another process could not read step {step}: look there.")
        if not ready:
            cache = args.cache or None
            ready.extend(
                scoring.make(evaluators, subject, values, args.workdir, cache=cache, mesh=mesh)
            )
        return [made for group in ready for made in group(subject)]

    return score


def _steps(args: argparse.Namespace) -> list[int]:
    """The steps that `--step` means."""
    config_lib.read_resolved(args.workdir)
    steps = steps_of(args.workdir)
    if not steps:
        raise UserError(f"{args.workdir} has no checkpoint: train it first, or use follow.")
    if args.step == "all":
        return steps
    if args.step == "latest":
        return steps[-1:]
    if not args.step.isdecimal() or int(args.step) not in steps:
        raise UserError(
            f"{args.workdir} has no checkpoint of step {args.step}: it has "
            f"{', '.join(map(str, steps))}; or say latest or all."
        )
    return [int(args.step)]


def default_cache() -> Path:
    """Where statistics of real clips are kept that belong to no run."""
    home = os.environ.get("WALT_CACHE") or Path.home() / ".cache" / "walt_jax"
    return Path(home) / "statistics"


def _tell(args: argparse.Namespace, made: Sequence[Score]) -> None:
    if jax.process_index() == 0:
        scores.to_tensorboard(args.workdir, made)
        for score in made:
            print(f"step {score.step}: {score}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text)


if __name__ == "__main__":
    cli.run(main)
