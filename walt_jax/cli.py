"""What the command lines share: arguments, and errors as one sentence."""

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from walt_jax.errors import EXIT_PREEMPTED, EXIT_USER, Preempted, UserError

_LAST_WORDS = 2.0  # seconds in which others say the same: they end when process 0 does


def run(main: Callable[[], None]) -> None:
    """Runs a command; a UserError is printed as one sentence and exits with status 2.

    A run that was preempted exits with `EXIT_PREEMPTED`, when all of its processes have saved.
    """
    logger, handler = logging.getLogger("walt_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False  # absl's handler would print everything twice
    logger.setLevel(logging.INFO)
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        _leave(EXIT_USER)
    except Preempted as e:
        print(f"preempted: {e}", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except Exception:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        _leave(1)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")  # commands that need none of it start without it
    return jax is not None and jax.distributed.is_initialized()


def _leave(status: int) -> None:
    """Exits; one of several processes without the end that waits for the others."""
    if _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_LAST_WORDS)
        os._exit(status)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all others, and not the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message[:1].upper()}{message[1:]}: see --help.")


def config_parser(
    description: str,
    *,
    config: bool = True,
    overrides: bool = True,
    workdir: str = "where the run lives (local or gs://)",
) -> Parser:
    """A parser with `--workdir` and, if asked for, `--config path[:arg]` and overrides.

    A command without `--config` reads the config that the workdir was started with. See `parse`.
    """
    if overrides:
        description += "\n\nAny key of the config is overridden by --config.key=value."
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    if config:
        text = "experiment, such as configs/sprites_walt.py:debug"
        parser.add_argument("--config", required=True, metavar="PATH[:ARG]", help=text)
    parser.add_argument("--workdir", required=True, help=workdir)
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, group: str = "config"
) -> tuple[argparse.Namespace, list[str]]:
    """Parses arguments; returns them and the `--config.a.b=value` overrides as `a.b=value`.

    Args:
      parser: of the other arguments.
      argv: by default the command line's.
      group: what overrides are of, `config` or another word.

    Raises:
      UserError: an argument that nothing reads, or an override without a value.
    """
    args, rest = parser.parse_known_args(argv)
    overrides = []
    rest = list(rest)
    while rest:
        item = rest.pop(0)
        if not item.startswith(f"--{group}."):
            raise UserError(f"Nothing reads the argument {item!r}: see --help.")
        if "=" not in item:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"The override {item} has no value: write {item}=VALUE.")
            item = f"{item}={rest.pop(0)}"
        overrides.append(item.removeprefix(f"--{group}."))
    return args, overrides
