"""`python -m launch.local_pod --processes N --devices K -- COMMAND ...`: a pod on this machine.

Runs N copies of the command as one JAX program with K CPU devices each. The command takes the flags
--coordinator, --num_processes and --process_id, as `python -m walt_jax.train` and
`python -m walt_jax.encode` do:

    python -m launch.local_pod --processes 2 --devices 4 -- \
        python -m walt_jax.train --config configs/sprites_walt.py:debug --workdir out/pod

Each line has its process before it. When one process fails, the others are ended. A preempted job
starts again, and so does one that crashed, up to --restarts times; a mistake of the user (status 2)
ends it.
"""

import argparse
import atexit
import functools
import importlib
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, NoReturn

from launch.commands import divided, job, restarts_after
from walt_jax import cli
from walt_jax.errors import EXIT_PREEMPTED, EXIT_USER, UserError

_PASSED_ON = (signal.SIGTERM, signal.SIGINT)
_PERIOD = 0.05  # seconds between two looks at the processes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pod; returns the status of the process that ended it.

    Raises:
      UserError: a wrong argument, or what cannot be run or imported.
    """
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="hosts (default 2)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each (default 1)")
    parser.add_argument("--restarts", type=int, default=0, help="after crashes (default 0)")
    parser.add_argument(
        "--grace",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="that the others have to end by themselves when one has (default 20)",
    )
    parser.add_argument(
        "--preload",
        metavar="MODULES",
        help="for `python -m ...`: import these once, by commas, and fork; starts are quicker",
    )
    parser.add_argument("--compilation_cache", metavar="DIR", help="kept between starts")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    flags, command = divided(argv)
    args = parser.parse_args(flags, argparse.Namespace(command=command))
    job(command)
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    if args.dry_run:
        for i in range(args.processes):
            env = _environment(args, {})
            words = [f"{k}={v}" for k, v in env.items()] + _command(args, "PORT", i)
            print(" ".join(map(shlex.quote, words)))
        return 0
    if args.preload:
        if args.command[1:2] != ["-m"]:
            parser.error("--preload takes a command python -m MODULE ...")
        os.environ.update(_environment(args, {}))  # jax reads it when it is imported
        for module in args.preload.split(","):
            _preload(module)
    crashes = 0
    while True:
        pod = _Pod(args)
        status = pod.run()
        again, crashes = restarts_after(status, crashes, args.restarts)
        if pod.told or not again:
            return status
        print(f"pod: status {status}, starting again", flush=True)


def _preload(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"--preload {module} cannot be imported: {e}.") from e


def _environment(args: argparse.Namespace, base: Mapping[str, str]) -> dict[str, str]:
    env = {**base, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
    if args.compilation_cache:
        env["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(args.compilation_cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return env


def _command(args: argparse.Namespace, port: int | str, index: int) -> list[str]:
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={args.processes}"]
    return [*args.command, *flags, f"--process_id={index}"]


def _popen(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # what it starts ends with it
        )
    except OSError as e:
        raise UserError(f"The command {command[0]} cannot be run: {e.strerror}.") from e


class _Forked:
    """`python -m MODULE ...` in a fork of this process; looks like a Popen."""

    def __init__(self, command: Sequence[str]) -> None:
        sys.stdout.flush()
        reading, writing = os.pipe()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _become(command, writing)
        os.close(writing)
        self.stdout = os.fdopen(reading, errors="replace")

    def poll(self) -> int | None:
        """The status, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int:
        """Waits for the end; returns the status."""
        while self.poll() is None:
            time.sleep(_PERIOD)
        return self._status

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _become(command: Sequence[str], writing: int) -> NoReturn:
    """Makes a fresh fork the process that the command would have been."""
    status = 1
    try:
        os.setsid()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        for number in _PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        sys.argv = [command[2], *command[3:]]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Pod:
    """One start of all processes.

    Attributes:
      told: the signal by which the pod itself was told to leave.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.told: int | None = None
        self._processes: list[subprocess.Popen | _Forked] = []
        self._readers: list[threading.Thread] = []

    def _start(self) -> None:
        args = self._args
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = _environment(args, os.environ)
        start = _Forked if args.preload else functools.partial(_popen, env=env)
        for i in range(args.processes):
            self._processes.append(start(_command(args, port, i)))
        self._readers = [
            threading.Thread(target=_prefix, args=(process.stdout, i), daemon=True)
            for i, process in enumerate(self._processes)
        ]
        for reader in self._readers:  # after the last fork: a child has no threads
            reader.start()

    def run(self) -> int:
        """Starts and waits; returns 0, or the status of the process that failed first."""
        before = {n: signal.signal(n, self._pass_on) for n in _PASSED_ON}
        try:
            self._start()
            status = self._wait()
        finally:
            for process in self._processes:
                _kill(process)
            for number, handler in before.items():
                signal.signal(number, handler)
        for reader in self._readers:
            reader.join(timeout=5)
        if self.told is not None and status:
            return 128 + self.told  # as the shell says it; the pod itself was told to leave
        return status

    def _wait(self) -> int:
        first, ended = 0, None
        while True:
            statuses = [process.poll() for process in self._processes]
            if all(status is not None for status in statuses):
                return first or next((_shell(s) for s in statuses if s), 0)
            failed = [(i, s) for i, s in enumerate(statuses) if s]
            if failed and ended is None:
                first, ended = _shell(failed[0][1]), time.monotonic()
                print(f"pod: process {failed[0][0]} ended with status {first}", flush=True)
            # Those that leave together, preempted or by a mistake that all find, are given time to;
            # a process that crashed or hung leaves the others in the middle of something.
            together = first in (EXIT_PREEMPTED, EXIT_USER)
            grace = self._args.grace if together else min(1.0, self._args.grace)
            if ended is not None and time.monotonic() - ended > grace:
                for i, process in enumerate(self._processes):
                    if process.poll() is None:
                        print(f"pod: ending process {i}", flush=True)
                        _kill(process)
            time.sleep(_PERIOD)

    def _pass_on(self, number: int, frame: object) -> None:
        """A signal to the pod is one to every process, as on a machine that is shut down."""
        del frame
        self.told = number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def _shell(status: int) -> int:
    """A status as the shell has it: 128 + the signal's number."""
    return 128 - status if status < 0 else status


def _kill(process: subprocess.Popen | _Forked) -> None:
    """Ends a process and all that it started (decoding workers, say)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _prefix(stream: IO[str], index: int) -> None:
    for line in stream:
        sys.stdout.write(f"[{index}] {line}")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_USER)
