"""Several processes as one program."""

import argparse

import jax

from walt_jax.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how processes find each other."""
    group = parser.add_argument_group("several processes (on TPU pods: --distributed alone)")
    group.add_argument("--distributed", action="store_true", help="join the other processes")
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int)


def start(args: argparse.Namespace) -> None:
    """Joins the other processes, if the flags say that there are any.

    Raises:
      UserError: a coordinator without the number and index of this process.
    """
    given = [args.coordinator, args.num_processes, args.process_id]
    if any(x is not None for x in given):
        if any(x is None for x in given):
            raise UserError("--coordinator, --num_processes and --process_id go together.")
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif args.distributed:
        jax.distributed.initialize()
