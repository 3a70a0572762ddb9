"""`python -m walt_jax.train --config configs/NAME.py[:variant] --workdir DIR`: trains a model."""

import signal
from collections.abc import Sequence

import jax

from walt_jax import cli
from walt_jax import config as config_lib
from walt_jax.parallel import distributed
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, builds the experiment and trains."""
    parser = cli.config_parser("Trains a tokenizer or a denoiser; goes on where it stopped.")
    parser.add_argument(
        "--replace_config",
        action="store_true",
        help="go on in a workdir that was started with another config",
    )
    parser.add_argument(
        "--compilation_cache",
        metavar="DIR",
        help="keeps compiled steps (local or gs://): a restarted run compiles nothing again",
    )
    distributed.add_flags(parser)
    args, overrides = cli.parse(parser, argv)
    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
    distributed.start(args)
    experiment = config_lib.build(Experiment, config_lib.load(args.config, overrides))
    train(experiment, args.workdir, replace_config=args.replace_config)


if __name__ == "__main__":
    # A profile is asked for by it, perhaps too early; it must not end the run.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    cli.run(main)
