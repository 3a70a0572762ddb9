"""Videos and images to records.

    python -m walt_jax.prepare --input PATH --output DIR [--short-side 128] [--label-from-folder]

Takes a folder (searched recursively), a file, a glob, a CSV or JSONL manifest (path, caption,
label, start, end; paths relative to the manifest) or tfds:NAME. An image becomes a video of one
frame. Files that cannot be decoded are skipped and named with their reason in DIR/report.json.
"""

import argparse
from collections.abc import Sequence

from walt_jax import cli
from walt_jax.data.preparation import MAX_SECONDS, prepare_dataset


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m walt_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="what to prepare, see above")
    add("--output", required=True, metavar="DIR", help="directory of the dataset, to be made")
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
        default=MAX_SECONDS,
        metavar="S",
        help="longer videos become several records of equal length (default: %(default)g)",
    )
    add("--shards", type=int, metavar="N", help="number of files (default: one for 8 videos)")
    add("--workers", type=int, metavar="N", help="threads (default: one a core)")
    add("--overwrite", action="store_true", help="replace the dataset in DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; raises UserError for what the user can put right."""
    args = _parser().parse_args(argv)
    report = prepare_dataset(
        args.input,
        args.output,
        label_from_folder=args.label_from_folder,
        label_from_name=args.label_from_name,
        label_regex=args.label_regex,
        short_side=args.short_side,
        max_seconds=args.max_seconds,
        shards=args.shards,
        workers=args.workers,
        overwrite=args.overwrite,
        progress=True,
    )
    print(f"{args.output}: {report.records} records, {report.frames} frames.")
    if report.skipped:
        print(
            f"{len(report.skipped)} of {report.sources} videos were skipped; the reasons are in "
            f"{args.output}/report.json."
        )


if __name__ == "__main__":
    cli.run(main)
