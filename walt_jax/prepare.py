"""Videos and images to records.

    python -m walt_jax.prepare --input PATH --output DIR [--short-side 128] [--label-from-folder]
    python -m walt_jax.prepare --input PATH --output DIR --config preparations/videos.py

PATH is a folder (searched recursively), a file, a glob, WebDataset tars, a CSV or JSONL manifest
(path, caption, label, start, end; paths relative to the manifest), tfds:NAME, ucf101:DIR,
kinetics:DIR or imagenet:DIR with --split, a URL of a store (gs://...), or a prepared dataset, which
is filtered. An image becomes a video of one frame. A config says how clips are cut, scored,
captioned and filtered; see docs/curation.md. What is left out is named with its reason in
DIR/report.html and DIR/report.json. Killed and started again, it goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data.curation.config import MAX_SECONDS, PrepareConfig
from walt_jax.data.preparation import prepare_dataset
from walt_jax.errors import UserError

_BEAM = """Beam's own options are passed through: --runner DataflowRunner --project ... --region ...
--temp_location gs://... --setup_file ./setup.py, or --runner FlinkRunner --flink_master ..."""


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m walt_jax.prepare",
        description=__doc__,
        epilog=_BEAM,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="what to prepare, see above")
    add("--output", required=True, metavar="DIR", help="directory of the dataset, to be made")
    add(
        "--config",
        metavar="PATH[:ARG]",
        help="cuts, scores, captions, filter; --config.key=value sets a key",
    )
    add("--split", metavar="NAME", help="of ucf101:, kinetics: and imagenet:")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--label-from-folder", action="store_true", help="a video's class is its folder's name"
    )
    labels.add_argument(
        "--label-from-name", action="store_true", help="a video's class is its file's name"
    )
    labels.add_argument(
        "--label-regex", metavar="PATTERN", help="a video's class is group 1, searched in its path"
    )
    add("--short-side", type=int, metavar="N", help="shrink to N pixels; never enlarges")
    add(
        "--max-seconds",
        type=float,
        metavar="S",
        help=f"longer videos become several records of equal length (default: {MAX_SECONDS:g})",
    )
    add("--shards", type=int, metavar="N", help="number of files (default: one for 8 videos)")
    add("--workers", type=int, metavar="N", help="threads or processes (default: one a core)")
    add(
        "--runner",
        metavar="NAME",
        help="threads, or a Beam runner (default: threads for up to 1024 videos without scores and "
        "captions, else DirectRunner, with a process for each worker)",
    )
    add(
        "--staging",
        metavar="URL",
        help="where workers leave their parts if --output is no file system that they share",
    )
    add("--overwrite", action="store_true", help="replace the dataset in DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; raises UserError for what the user can put right."""
    args, rest = _parser().parse_known_args(argv)
    flags = _beam_flags([a for a in rest if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
    if flags and args.runner in (None, "threads"):
        raise UserError(f"Nothing reads the argument {flags[0]!r}: see --help.")
    values = config_lib.load(args.config) if args.config else {}
    config = config_lib.build(PrepareConfig, config_lib.override(values, overrides))
    report = prepare_dataset(
        args.input,
        args.output,
        config=config,
        split=args.split,
        label_from_folder=args.label_from_folder,
        label_from_name=args.label_from_name,
        label_regex=args.label_regex,
        short_side=args.short_side,
        max_seconds=args.max_seconds,
        shards=args.shards,
        workers=args.workers,
        runner=args.runner,
        beam_flags=flags,
        staging=args.staging,
        overwrite=args.overwrite,
        progress=True,
    )
    print(f"{args.output}: {report.records} records, {report.frames} frames.")
    where = Path(args.output) / "report.json"
    if report.skipped:
        print(
            f"{len(report.skipped)} of {report.sources} videos were skipped; the reasons are in "
            f"{where}."
        )
    if report.rejected:
        print(f"{len(report.rejected)} clips are left out; the reasons are in {where}.")
    print(f"Look at {where.with_suffix('.html')}.")


def _beam_flags(rest: Sequence[str]) -> list[str]:
    """`--name value` as `--name=value`; a word that belongs to no flag is an error."""
    flags: list[str] = []
    for item in rest:
        if item.startswith("--"):
            flags.append(item)
        elif flags and "=" not in flags[-1]:
            flags[-1] += f"={item}"
        else:
            raise UserError(f"Nothing reads the argument {item!r}: see --help.")
    return flags


if __name__ == "__main__":
    cli.run(main)
