"""What the launchers share: running commands, printing them for --dry_run, and when to restart."""

import dataclasses
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from walt_jax.errors import EXIT_PREEMPTED, EXIT_USER, UserError


def restarts_after(status: int, crashes: int, allowed: int) -> tuple[bool, int]:
    """Whether a job that ended with `status` starts again, and how often it has crashed now.

    Args:
      status: of the process that ended it, as the shell has it.
      crashes: before.
      allowed: `--restarts`.
    """
    if status in (0, EXIT_USER, 128 + 2):  # done, a mistake, or Ctrl-C
        return False, crashes
    if status == EXIT_PREEMPTED:
        return True, crashes
    # A crash, or SIGTERM (143) before there was anything to save: it might come so for ever.
    return crashes < allowed, crashes + 1


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs commands, or prints them.

    Attributes:
      dry_run: print only.
      tries: of a command that fails for a reason that passes, such as a full zone or a lost
        connection; pause: seconds before the second, doubled each time.
    """

    dry_run: bool = False
    tries: int = 4
    pause: float = 5.0

    def run(self, *command: str, tries: int | None = None) -> None:
        """Runs a command; its output goes where ours goes.

        Raises:
          UserError: it failed each time, or is not installed.
        """
        if (status := self.status(*command, tries=tries)) != 0:
            raise UserError(f"`{shlex.join(command)}` failed with status {status}: see above.")

    def status(self, *command: str, tries: int | None = None) -> int:
        """As `run`; returns the status instead of raising."""
        print(f"$ {shlex.join(command)}", flush=True)
        if self.dry_run:
            return 0
        pause, tries = self.pause, self.tries if tries is None else tries
        for last in [False] * (tries - 1) + [True]:
            try:
                status = subprocess.run(command, check=False).returncode
            except FileNotFoundError:
                raise UserError(_missing(command[0])) from None
            if status == 0 or last:
                return status
            print(f"status {status}, again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def output(self, *command: str) -> str | None:
        """What a command writes to stdout, stripped; None where it failed; "" in a dry run.

        Raises:
          UserError: it is not installed.
        """
        print(f"$ {shlex.join(command)}", flush=True)
        if self.dry_run:
            return ""
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(_missing(command[0])) from None
        if done.returncode:
            sys.stderr.write(done.stderr)
            return None
        return done.stdout.strip()


def _missing(program: str) -> str:
    where = {
        "gcloud": "install it from https://cloud.google.com/sdk/docs/install",
        "xpk": "install it by `pip install xpk`",
    }
    return f"{program} is not on the PATH: {where.get(program, 'install it')}."


def divided(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A command line's own arguments and, after the first `--`, the job's command."""
    words = sys.argv[1:] if argv is None else list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def job(words: Sequence[str]) -> str:
    """The command that is to run, as one line of shell.

    Raises:
      UserError: there is none.
    """
    if not words:
        raise UserError("Give the command to run after --, such as -- python -m walt_jax.train ...")
    return shlex.join(words)
