"""`python -m walt_jax.encode --workdir TOKENIZER --output DIR`: caches the latents of a dataset."""

import time
from collections.abc import Sequence

import jax

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.data.latents import encode_dataset
from walt_jax.data.pipeline import DataConfig
from walt_jax.models.text import described
from walt_jax.parallel import distributed
from walt_jax.training.metrics import clock
from walt_jax.training.tokenizers import load_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and encodes."""
    parser = cli.config_parser(
        "Encodes a prepared dataset by a trained tokenizer; goes on where it stopped. The data\n"
        "are those that the tokenizer was trained on; --config.data.path=DIR and its like choose\n"
        "others.",
        config=False,
    )
    parser.add_argument("--output", required=True, help="folder to write the latents to")
    parser.add_argument(
        "--text_encoder",
        metavar="DIR",
        help="T5 or CLIP, a folder or hub id, whose embeddings of the captions go along",
    )
    parser.add_argument("--text_revision", default="", help="with a hub id: the commit")
    parser.add_argument(
        "--text_tokenizer", default="", metavar="DIR", help="tokenizer.json's, if another one"
    )
    parser.add_argument("--text_tokens", type=int, help="longest caption (default 128, CLIP's 77)")
    parser.add_argument("--epochs", type=int, default=1, help="clips of each video (default 1)")
    parser.add_argument("--batch_size", type=int, default=8, help="clips at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the clips' start times and buckets")
    parser.add_argument(
        "--batches_per_shard", type=int, default=32, help="batches of a file (default 32)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset in --output, or begin anew"
    )
    distributed.add_flags(parser)
    args, overrides = cli.parse(parser, argv)
    distributed.start(args)
    values = config_lib.override(config_lib.read_resolved(args.workdir), overrides)
    text = None
    if args.text_encoder:
        text = described(
            args.text_encoder,
            revision=args.text_revision,
            tokenizer=args.text_tokenizer,
            max_tokens=args.text_tokens,
        )
    began = time.monotonic()
    dataset = encode_dataset(
        load_tokenizer(args.workdir),
        config_lib.build(DataConfig, values["data"], "config.data"),
        args.output,
        text=text,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        batches_per_shard=args.batches_per_shard,
        overwrite=args.overwrite,
    )
    if jax.process_index() == 0:
        size = sum(shard["bytes"] for shard in dataset.metadata["shards"])
        print(
            f"{len(dataset)} clips in {clock(time.monotonic() - began)}, {size / 1e6:.1f} MB "
            f"({size / len(dataset):.0f} bytes a clip); train on them by "
            f"--config.data.path={args.output}."
        )


if __name__ == "__main__":
    cli.run(main)
