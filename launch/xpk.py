"""`python -m launch.xpk run --name NAME --cluster C --type v5litepod-256 --image I -- COMMAND ...`

A job on a GKE cluster with TPU node pools, by xpk, which makes a JobSet of it and restarts it.

    python -m launch.xpk image --image REGION-docker.pkg.dev/PROJECT/REPO/walt_jax:1
    python -m launch.xpk run --name walt --cluster mine --type v5litepod-256 --slices 2 \
        --zone us-east5-b --image REGION-docker.pkg.dev/PROJECT/REPO/walt_jax:1 -- \
        python -m walt_jax.train --config configs/walt_ucf101.py:l --workdir gs://BUCKET/run \
        --distributed

`image` builds and pushes `launch/Dockerfile`; `run`, `status`, `logs` and `delete` are of the job.
`--dry_run` prints every command instead of running it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.commands import Runner, divided, job
from walt_jax import cli
from walt_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and does what it says."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("image", "run", "status", "logs", "delete"))
    parser.add_argument("--name", default="", help="of the workload")
    parser.add_argument("--cluster", default="")
    parser.add_argument("--zone", default="", help="of the cluster")
    parser.add_argument("--project", help="default: gcloud's")
    parser.add_argument("--type", default="", help="such as v5litepod-16, v5p-128, v6e-256")
    parser.add_argument("--slices", type=int, default=1, help="joined over DCN (default 1)")
    parser.add_argument("--image", default="", help="of docker, in a registry the cluster reads")
    parser.add_argument("--restarts", type=int, default=100, help="of the JobSet (default 100)")
    parser.add_argument("--priority", default="medium", help="(default medium)")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    flags, command = divided(argv)
    args = parser.parse_args(flags, argparse.Namespace(command=command))
    needed = {
        "image": ("image",),
        "run": ("name", "cluster", "zone", "type", "image"),
        "status": ("cluster", "zone"),
    }.get(args.verb, ("name", "cluster", "zone"))
    for flag in needed:
        if not getattr(args, flag):
            raise UserError(f"{args.verb} needs --{flag}: see --help.")
    _COMMANDS[args.verb](args, Runner(args.dry_run))


def _image(args: argparse.Namespace, runner: Runner) -> None:
    root = Path(__file__).parents[1]
    dockerfile = root / "launch" / "Dockerfile"
    runner.run("docker", "build", "-t", args.image, "-f", str(dockerfile), str(root), tries=1)
    runner.run("docker", "push", args.image)


def _run(args: argparse.Namespace, runner: Runner) -> None:
    line = job(args.command)
    runner.run(
        *("xpk", "workload", "create", f"--workload={args.name}", *_where(args)),
        *(f"--tpu-type={args.type}", f"--num-slices={args.slices}"),
        *(f"--docker-image={args.image}", f"--max-restarts={args.restarts}"),
        *(f"--priority={args.priority}", f"--command={line}"),
        tries=1,
    )


def _status(args: argparse.Namespace, runner: Runner) -> None:
    chosen = [f"--filter-by-job={args.name}"] if args.name else []
    runner.run("xpk", "workload", "list", *_where(args), *chosen)


def _logs(args: argparse.Namespace, runner: Runner) -> None:
    region = args.zone.rsplit("-", 1)[0]
    project = [f"--project={args.project}"] if args.project else []
    runner.run(
        *("gcloud", "container", "clusters", "get-credentials", args.cluster),
        *(f"--region={region}", *project),
    )
    selected = f"jobset.sigs.k8s.io/jobset-name={args.name}"
    runner.run(
        *("kubectl", "logs", "--follow", "--prefix", "--tail=100", "--max-log-requests=1000"),
        *(f"--selector={selected}", "--all-containers"),
        tries=1,
    )


def _delete(args: argparse.Namespace, runner: Runner) -> None:
    runner.run("xpk", "workload", "delete", f"--workload={args.name}", *_where(args), "--force")


def _where(args: argparse.Namespace) -> list[str]:
    project = [f"--project={args.project}"] if args.project else []
    return [f"--cluster={args.cluster}", f"--zone={args.zone}", *project]


_COMMANDS = {"image": _image, "run": _run, "status": _status, "logs": _logs, "delete": _delete}


if __name__ == "__main__":
    cli.run(main)
