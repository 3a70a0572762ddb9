"""Several processes as one program."""

import argparse
import contextlib
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from walt_jax.errors import UserError

_ANSWER = 5.0  # seconds
_MESSAGE = 512  # bytes; what is gathered has one shape on all processes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how processes find each other."""
    group = parser.add_argument_group("several processes (on TPU pods: --distributed alone)")
    group.add_argument("--distributed", action="store_true", help="join the other processes")
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int)
    group.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="the job ends when a process is not heard of for so long (default 100)",
    )


def start(args: argparse.Namespace) -> None:
    """Joins the other processes, if the flags say that there are any.

    Raises:
      UserError: flags that do not go together, or `--distributed` where there is no pod.
    """
    if args.heartbeat_timeout < 1:
        raise UserError(f"--heartbeat_timeout must be at least 1, got {args.heartbeat_timeout}.")
    given = [args.coordinator, args.num_processes, args.process_id]
    options = {"heartbeat_timeout_seconds": args.heartbeat_timeout}
    if any(x is not None for x in given):
        if any(x is None for x in given):
            raise UserError("--coordinator, --num_processes and --process_id go together.")
        _check(*given)
        jax.distributed.initialize(*given, cluster_detection_method="deactivate", **options)
    elif args.distributed:
        try:
            jax.distributed.initialize(**options)
        except ValueError as e:
            raise UserError(
                f"--distributed finds no pod here ({str(e).rstrip('.')}): give --coordinator, "
                "--num_processes and --process_id."
            ) from e


def _check(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator must be HOST:PORT of process 0, got {coordinator!r}.")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id must be at least 0 and less than --num_processes={count}, got {index}."
        )


def agree(problem: str) -> str:
    """The first problem that any process has, the same on all; empty where none has one.

    Every process must call it; none returns before all have.
    """
    if jax.process_count() == 1:
        return problem
    text = problem.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(rows)]
    return next((text for text in texts if text), "")


class Board:
    """Words that every process puts up for the others, through the coordination service.

    Without other processes it holds this one's word only. It works while a collective hangs.
    """

    def __init__(self, name: str) -> None:
        # The one way to the service that process 0 runs; multihost_utils has collectives only.
        from jax._src import distributed

        self._client, self._name = distributed.global_state.client, name
        self._word = ""

    def put(self, word: str) -> None:
        """Replaces this process's word; waits for a service that does not answer."""
        self._word = word
        if self._client is not None:
            key = f"{self._name}/{jax.process_index()}"
            with contextlib.suppress(Exception):  # the others find out that the job is dead
                self._client.key_value_set(key, word, allow_overwrite=True)

    def read(self) -> dict[int, str]:
        """Process -> its latest word; empty where the service does not answer in a few seconds."""
        if self._client is None:
            return {0: self._word}
        rows: list[tuple[str, str]] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # as above
                rows.extend(self._client.key_value_dir_get(f"{self._name}/"))

        # The process that runs the service may be the one that hangs.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER)
        return {int(key.rsplit("/", 1)[1]): word for key, word in rows}
