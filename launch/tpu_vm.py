"""`python -m launch.tpu_vm up --name NAME --type v5litepod-256 --zone ZONE -- COMMAND ...`

A job on TPU VMs by queued resources: asks for the chips, waits, installs this checkout on all
hosts, runs the command on all of them, restarts it after preemptions, and tells how it ended.

    python -m launch.tpu_vm up --name walt --type v5litepod-256 --zone us-east5-b --spot -- \
        python -m walt_jax.train --config configs/walt_ucf101.py:l --workdir gs://BUCKET/run \
        --distributed

`create`, `wait`, `setup`, `run`, `watch`, `logs`, `status`, `stop` and `delete` are its parts.
`--dry_run` prints every command of gcloud instead of running it. gcloud must be logged in.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.commands import Runner, divided, job, restarts_after
from walt_jax import cli
from walt_jax.errors import UserError

_RUNTIMES = {
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
    "v4": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v2": "tpu-ubuntu2204-base",
}
_COMING = ("ACCEPTED", "PROVISIONING", "CREATING", "WAITING_FOR_RESOURCES")
_READY = "ACTIVE"
_FOLDER = "walt_jax_job"  # on the hosts
_RUNNING = "running"
_ATTEMPT = "=== attempt "  # begins a line of the log
_VERBS = ("up", "create", "wait", "setup", "run", "watch", "logs", "status", "stop", "delete")
# uv brings the Python that the images lack.
_SETUP = (
    f"set -e; mkdir -p {_FOLDER}/code; tar -xzf {_FOLDER}.tar.gz -C {_FOLDER}/code; cd {_FOLDER}; "
    "command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh; "
    "~/.local/bin/uv venv --quiet --allow-existing --python 3.12 venv; "
    "~/.local/bin/uv pip install --quiet --python venv/bin/python "
    "-c code/constraints/3.12.txt -e 'code[tpu]'"
)


class Job:
    """One job on one queued resource."""

    def __init__(self, args: argparse.Namespace, runner: Runner) -> None:
        self._args, self._runner = args, runner
        self._where = [f"--zone={args.zone}"] + (
            [f"--project={args.project}"] if args.project else []
        )
        one = args.slices == 1
        self._nodes = [args.name] if one else [f"{args.name}-{i}" for i in range(args.slices)]

    def create(self) -> None:
        """Asks for the chips, unless that was done before."""
        args = self._args
        if self._state() not in ("", None):
            print(f"{args.name} is there already")
            return
        flags = [f"--accelerator-type={args.type}"]
        flags += [f"--runtime-version={args.runtime or _RUNTIMES[_kind(args.type)]}"]
        if args.slices > 1:
            flags += [f"--node-count={args.slices}", f"--node-prefix={args.name}"]
        else:
            flags += [f"--node-id={args.name}"]
        flags += ["--spot"] if args.spot else []
        self._runner.run(*self._queued("create"), *flags)

    def wait(self) -> None:
        """Until the chips are there.

        Raises:
          UserError: they will not come, or did not within `--wait_hours`.
        """
        deadline, before = time.monotonic() + 3600 * self._args.wait_hours, None
        while (state := self._state()) != _READY:
            if self._runner.dry_run:
                return
            if state is not None and state not in _COMING:
                raise UserError(
                    f"The queued resource {self._args.name} is {state or 'not there'}: look at "
                    "`status`, delete it, and create it again."
                )
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self._args.name} is still {state} after {self._args.wait_hours:g} hours: "
                    "ask again with more --wait_hours, or choose another --zone or --type."
                )
            if state != before:
                print(f"{self._args.name} is {state}", flush=True)
                before = state
            time.sleep(self._args.poll)

    def setup(self) -> None:
        """Copies the last commit of this checkout to all hosts and installs it there."""
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / f"{_FOLDER}.tar.gz"
            root = Path(__file__).parents[1]
            self._runner.run(
                "git", "-C", str(root), "archive", "--format=tar.gz", f"--output={archive}", "HEAD",
                tries=1,
            )  # fmt: skip
            for node in self._nodes:
                self._runner.run(
                    *("gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive)),
                    *(f"{node}:{archive.name}", "--worker=all", *self._where, "--quiet"),
                )
        self._everywhere(_SETUP)

    def run(self) -> None:
        """Starts the command on all hosts, in the background, with a log and a status file.

        The log goes on from one attempt to the next: the crash that ended one is told in it.
        """
        line = job(self._args.command)
        inner = f"cd code; PATH=$PWD/../venv/bin:$PATH {line}; echo $? > ../status"
        self._everywhere(
            f"cd {_FOLDER}; rm -f status; touch log; "
            f"echo {_ATTEMPT}$(($(grep -c '^{_ATTEMPT}' log) + 1)), $(date -u +%FT%TZ) >> log; "
            f"setsid nohup bash -c {shlex.quote(inner)} >> log 2>&1 < /dev/null & "
            "echo $! > pid"
        )

    def watch(self) -> int:
        """Waits for the job's end and returns its status; restarts it as `--restarts` allows."""
        crashes = 0
        while True:
            status = self._wait_for_job()
            if self._runner.dry_run:
                return 0
            if status is None:
                print(f"{self._args.name} was preempted: asking for chips again", flush=True)
                self.delete()
                self.create()
                self._start()
                continue
            again, crashes = restarts_after(status, crashes, self._args.restarts)
            if not again:
                return status
            print(f"the job ended with status {status}: starting it again", flush=True)
            try:
                self.stop()
                self.run()
            except UserError:
                if self._state() == _READY:
                    raise  # else the job was told to leave because the chips were about to go

    def up(self) -> int:
        """All of it; the chips are given back at the end, an error's too, unless `--keep`."""
        self.create()
        try:
            self._start()
            status = self.watch()
            if status:
                self._show_ends()
        except UserError:
            self._give_back()
            raise
        except KeyboardInterrupt:
            self._say_up()
            raise
        self._give_back()
        return status

    def logs(self) -> None:
        """The log of the first host, followed."""
        self._runner.run(*self._ssh(self._nodes[0], f"tail -n 100 -F {_FOLDER}/log", "0"), tries=1)

    def status(self) -> None:
        """Of the queued resource, and of the job on each host."""
        print(f"{self._args.name}: {self._state() or 'not there'}")
        print("job: " + (", ".join(self._job_states() or []) or "no word from the hosts"))

    def stop(self) -> None:
        """Ends the job on all hosts; SIGTERM lets it save."""
        self._everywhere(
            f"test -f {_FOLDER}/pid || exit 0; kill -TERM -- -$(cat {_FOLDER}/pid) 2>/dev/null; "
            f"for i in $(seq 60); do kill -0 -- -$(cat {_FOLDER}/pid) 2>/dev/null || exit 0; "
            f"sleep 1; done; kill -KILL -- -$(cat {_FOLDER}/pid) 2>/dev/null; exit 0"
        )

    def delete(self) -> None:
        """Gives the chips back."""
        self._runner.run(*self._deletion())

    def _start(self) -> None:
        self.wait()
        self.setup()
        self.run()

    def _show_ends(self) -> None:
        """What the hosts logged last: the logs go with the chips."""
        for node in self._nodes:
            line = f'test "$(cat {_FOLDER}/status)" = 0 || tail -n 40 {_FOLDER}/log'
            self._runner.status(*self._ssh(node, line, "all"), tries=1)

    def _give_back(self) -> None:
        """The end of `up`; raises nothing, for an error may be under way."""
        if not self._runner.dry_run and self._state() == "":
            return  # taken away, and not to be had again
        if self._args.keep or self._runner.status(*self._deletion()):
            self._say_up()

    def _say_up(self) -> None:
        line = shlex.join(self._deletion())
        print(f"{self._args.name} is paid for until it is deleted: `{line}`", flush=True)

    def _wait_for_job(self) -> int | None:
        """The status of the first host that failed, or 0 of all; None when the chips are gone."""
        silent = 0
        while True:
            states = self._job_states()
            if self._runner.dry_run:
                self._state()
                return 0
            if states is None:
                silent += 1
                state = self._state()
                if state is not None and state != _READY:
                    return None
                if silent >= self._runner.tries:
                    raise UserError(
                        f"The hosts of {self._args.name} do not answer though it is {state}: look "
                        "at `status`, or delete it."
                    )
            else:
                silent = 0
                ended = [int(s) for s in states if s != _RUNNING]
                if failed := [s for s in ended if s]:
                    return failed[0]
                if len(ended) == len(states):
                    return 0
            time.sleep(self._args.poll)

    def _job_states(self) -> list[str] | None:
        """`running` or a status for each host; None where hosts do not answer."""
        states = []
        for node in self._nodes:
            question = f"echo state=$(cat {_FOLDER}/status 2>/dev/null || echo {_RUNNING})"
            answer = self._runner.output(*self._ssh(node, question, "all"))
            if answer is None:
                return None
            # Empty: the file is there, and its status is just being written.
            found = [
                line[6:] or _RUNNING for line in answer.splitlines() if line.startswith("state=")
            ]
            if not found and not self._runner.dry_run:
                return None
            states += found
        return states

    def _state(self) -> str | None:
        """Of the queued resource; empty where there is none, None where nobody answers."""
        return self._runner.output(
            *("gcloud", "compute", "tpus", "queued-resources", "list", *self._where),
            *(f"--filter=name~/{self._args.name}$", "--format=value(state.state)"),
        )

    def _deletion(self) -> list[str]:
        return [*self._queued("delete"), "--force", "--quiet"]

    def _queued(self, verb: str) -> list[str]:
        return [
            *("gcloud", "compute", "tpus", "queued-resources", verb, self._args.name),
            *self._where,
        ]

    def _ssh(self, node: str, line: str, worker: str) -> list[str]:
        return [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, f"--worker={worker}"),
            *(*self._where, "--quiet", f"--command={line}"),
        ]

    def _everywhere(self, line: str) -> None:
        """Runs a line on all hosts of all slices, slice by slice at the same time."""
        commands = [self._ssh(node, line, "all") for node in self._nodes]
        if len(commands) == 1 or self._runner.dry_run:
            for command in commands:
                self._runner.run(*command)
            return
        for command in commands:
            print(f"$ {shlex.join(command)}", flush=True)
        running = [subprocess.Popen(command) for command in commands]
        failed = [node for node, process in zip(self._nodes, running) if process.wait()]
        for node in failed:
            self._runner.run(*self._ssh(node, line, "all"))


def _kind(accelerator: str) -> str:
    """The family of a type such as `v5p-128`."""
    return accelerator.partition("-")[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and does what it says; exits with the job's status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=_VERBS)
    parser.add_argument("--name", required=True, help="of the queued resource and its nodes")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's")
    parser.add_argument("--type", default="", help="such as v5litepod-16, v5p-128, v6e-256")
    parser.add_argument("--slices", type=int, default=1, help="joined over DCN (default 1)")
    parser.add_argument("--runtime", help="version of the TPU VM's software (default: by --type)")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    parser.add_argument("--restarts", type=int, default=10, help="after crashes (default 10)")
    parser.add_argument("--wait_hours", type=float, default=24.0, help="for chips (default 24)")
    parser.add_argument("--poll", type=float, default=30.0, help="seconds (default 30)")
    parser.add_argument("--keep", action="store_true", help="`up` does not delete at the end")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    flags, command = divided(argv)
    args = parser.parse_args(flags, argparse.Namespace(command=command))
    if args.verb in ("up", "create", "watch"):  # `watch` asks again for chips that were taken
        if not args.type:
            raise UserError(f"{args.verb} needs --type, such as --type v5litepod-16.")
        if not args.runtime and _kind(args.type) not in _RUNTIMES:
            raise UserError(f"--type {args.type} is of no known kind: give its --runtime version.")
    if args.verb in ("up", "run", "watch"):
        job(args.command)
    done = getattr(Job(args, Runner(args.dry_run, pause=min(5.0, args.poll))), args.verb)()
    if done:
        sys.exit(done)


if __name__ == "__main__":
    cli.run(main)
