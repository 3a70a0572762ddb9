"""`python -m walt_jax.encode --workdir TOKENIZER --output DIR`: caches the latents of a dataset."""

from collections.abc import Sequence

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data.latents import encode_dataset
from walt_jax.data.pipeline import DataConfig
from walt_jax.training.tokenizers import load_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and encodes."""
    parser = cli.config_parser(
        "Encodes a prepared dataset by a trained tokenizer. The data are those that the tokenizer\n"
        "was trained on; --config.data.path=DIR and its like choose others.",
        config=False,
    )
    parser.add_argument("--output", required=True, help="folder to write the latents to")
    parser.add_argument("--epochs", type=int, default=1, help="clips of each video (default 1)")
    parser.add_argument("--batch_size", type=int, default=8, help="clips at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the clips' start times")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset in --output")
    args, overrides = cli.parse(parser, argv)
    values = config_lib.override(config_lib.read_resolved(args.workdir), overrides)
    dataset = encode_dataset(
        load_tokenizer(args.workdir),
        config_lib.build(DataConfig, values["data"], "config.data"),
        args.output,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(f"{len(dataset)} latents in {args.output}; train on them by --config.data.path.")


if __name__ == "__main__":
    cli.run(main)
