"""The launchers of Google Cloud against programs that stand for its own."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from launch import tpu_vm, xpk
from walt_jax.errors import UserError

TRAIN = ["--", "python", "-m", "walt_jax.train", "--workdir", "gs://b/a b", "--distributed"]
VM = ["--name=walt", "--zone=us-east5-b", "--poll=0.01"]


class Cloud:
    """The stand-in's folder."""

    def __init__(self, folder):
        self.folder = folder

    def answers(self, scenario):
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def calls(self, word=""):
        rows = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [row for row in rows if word in " ".join(row)]

    def verbs(self):
        """What was done, in short."""
        names = (
            "create",
            "list",
            "scp",
            "delete",
            "rm -f status",
            "kill",
            "tail",
            "cat",
            "uv venv",
        )
        texts = [" ".join(call[4:]) for call in self.calls("gcloud")]
        return [next(name for name in names if name in text) for text in texts]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    source = Path(__file__).with_name("stand_in.py").read_text().split("\n", 1)[1]
    for name in ("gcloud", "xpk", "docker", "kubectl"):
        (programs / name).write_text(f"#!{sys.executable}\n{source}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    (tmp_path / "calls").touch()
    cloud = Cloud(tmp_path)
    cloud.answers({})
    return cloud


def test_up_does_all_of_it_in_order(cloud):
    cloud.answers({
        "queued-resources list": [[0, ""], [0, "WAITING_FOR_RESOURCES"], [0, "ACTIVE"]],
        "echo state=": [[0, "state=running\nstate=running"], [0, "state=0\nstate=0"]],
    })  # fmt: skip
    tpu_vm.main(["up", *VM, "--type=v5litepod-16", "--spot", "--project=p", *TRAIN])
    assert cloud.verbs() == [
        *("list", "create", "list", "list", "scp", "uv venv", "rm -f status", "cat", "cat"),
        *("list", "delete"),
    ]  # fmt: skip
    (create,) = cloud.calls("queued-resources create")
    assert create[5:] == [
        "walt", "--zone=us-east5-b", "--project=p", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=walt", "--spot",
    ]  # fmt: skip
    (run,) = cloud.calls("rm -f status")
    assert "--worker=all" in run and "gs://b/a b" in run[-1] and "--distributed" in run[-1]
    assert all(f"--{what}" in " ".join(run) for what in ("zone=us-east5-b", "project=p", "quiet"))


def test_a_preempted_pod_is_asked_for_again(cloud, capsys):
    cloud.answers({
        "queued-resources list": [
            [0, ""], [0, "ACTIVE"], [0, "SUSPENDED"], [0, ""], [0, "PROVISIONING"], [0, "ACTIVE"]
        ],
        "echo state=": [[0, "state=running"], [255, "no route"], [0, "state=0"]],
    })  # fmt: skip
    tpu_vm.main(["up", *VM, "--type=v5litepod-16", "--keep", *TRAIN])
    assert cloud.verbs() == [
        *("list", "create", "list", "scp", "uv venv", "rm -f status", "cat", "cat", "list"),
        *("delete", "list", "create", "list", "list", "scp", "uv venv", "rm -f status", "cat"),
        "list",
    ]
    assert "walt is paid for until it is deleted: `gcloud" in capsys.readouterr().out


def test_chips_that_go_while_a_job_starts_again_are_asked_for_again(cloud):
    cloud.answers({
        "queued-resources list": [
            *[[0, "ACTIVE"]] * 2, *[[0, "SUSPENDED"]] * 2, [0, ""], [0, "ACTIVE"]
        ],
        "echo state=": [[0, "state=75"], [255, ""], [0, "state=0"]],
        "rm -f status": [[0, ""], *[[255, ""]] * 4, [0, ""]],
    })  # fmt: skip
    tpu_vm.main(["up", *VM, "--type=v5litepod-16", *TRAIN])
    assert cloud.verbs().count("delete") == 2 and len(cloud.calls("queued-resources create")) == 1


@pytest.mark.parametrize("gives, flags", [(True, []), (False, []), (False, ["--keep"])])
def test_up_gives_the_chips_back_when_it_fails(cloud, capsys, gives, flags):
    cloud.answers({
        "queued-resources list": [[0, "ACTIVE"], [0, "FAILED"]],
        "delete": [[0 if gives else 1, ""]],
    })  # fmt: skip
    with pytest.raises(UserError, match="walt is FAILED"):  # and not what its deletion says
        tpu_vm.main(["up", *VM, "--type=v5litepod-16", *flags, *TRAIN])
    told = "walt is paid for until it is deleted: `gcloud" in capsys.readouterr().out
    assert told != gives and ("delete" in cloud.verbs()) != bool(flags)


def test_up_says_that_chips_stay_when_it_is_interrupted(cloud, capsys, monkeypatch):
    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(tpu_vm.Job, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tpu_vm.main(["up", *VM, "--type=v5litepod-16", *TRAIN])
    assert "walt is paid for until it is deleted: `gcloud" in capsys.readouterr().out
    assert cloud.verbs() == ["list", "create"]


def test_what_a_failed_job_logged_last_is_shown_before_its_log_goes(cloud):
    cloud.answers({"queued-resources list": [[0, "ACTIVE"]], "echo state=": [[0, "state=2"]]})
    with pytest.raises(SystemExit) as end:
        tpu_vm.main(["up", *VM, "--type=v5litepod-16", *TRAIN])
    assert end.value.code == 2
    assert "tail -n 40" in cloud.calls()[-3][-1] and cloud.verbs()[-1] == "delete"


def test_a_job_starts_again_after_preemption_and_crash_but_not_after_a_mistake(cloud):
    cloud.answers({
        "queued-resources list": [[0, "ACTIVE"]],
        "echo state=": [
            [0, "state=75\nstate="], [0, "state=running\nstate=143"], [0, "state="], [0, "state=2"]
        ],
    })  # fmt: skip
    with pytest.raises(SystemExit) as end:
        tpu_vm.main(["watch", *VM, "--type=v6e-16", "--restarts=1", *TRAIN])
    assert end.value.code == 2
    assert cloud.verbs() == [*("cat", "kill", "rm -f status") * 2, "cat", "cat"]
    (cloud.folder / "calls").write_text("")
    cloud.answers({"echo state=": [[0, "state=1"]]})
    with pytest.raises(SystemExit) as end:
        tpu_vm.main(["watch", *VM, "--type=v6e-16", "--restarts=1", *TRAIN])
    assert end.value.code == 1 and cloud.verbs() == ["cat", "kill", "rm -f status", "cat"]


def test_the_lines_for_the_hosts_do_what_they_should(cloud, monkeypatch):
    """The stand-in's ssh runs them here."""
    host = cloud.folder / "host"
    (host / "walt_jax_job" / "code").mkdir(parents=True)
    monkeypatch.setenv("STAND_IN_HOST", str(host))
    cloud.answers({"queued-resources list": [[0, "ACTIVE"]]})
    command = ["--", "bash", "-c", "echo hello world; pwd; exit 3"]
    tpu_vm.main(["run", *VM, *command])
    with pytest.raises(SystemExit) as end:
        tpu_vm.main(["watch", *VM, "--type=v6e-16", "--restarts=1", *command])
    assert end.value.code == 3
    log = (host / "walt_jax_job" / "log").read_text().splitlines()
    assert log[1:3] == log[4:] == ["hello world", f"{host}/walt_jax_job/code"]
    assert log[0].startswith("=== attempt 1, 20") and log[3].startswith("=== attempt 2, 20")
    saves = "trap 'echo saved; exit 75' TERM; echo began; while true; do sleep 0.05; done"
    tpu_vm.main(["run", *VM, "--", "bash", "-c", saves])
    while "began" not in (host / "walt_jax_job" / "log").read_text():
        time.sleep(0.01)
    assert not (host / "walt_jax_job" / "status").exists()
    tpu_vm.main(["stop", *VM])
    assert (host / "walt_jax_job" / "log").read_text().splitlines()[-1] == "saved"


def test_what_fails_for_a_moment_is_tried_again(cloud):
    cloud.answers({"scp": [[1, "lost"], [1, "lost"], [0, ""]], "uv venv": [[1, ""]] * 4})
    with pytest.raises(UserError, match="failed with status 1: see above"):
        tpu_vm.main(["setup", *VM, *TRAIN])
    assert cloud.verbs() == [*["scp"] * 3, *["uv venv"] * 4]


def test_hosts_that_do_not_answer_end_the_watch(cloud):
    cloud.answers({"queued-resources list": [[0, "ACTIVE"]], "echo state=": [[255, ""]]})
    with pytest.raises(UserError, match="do not answer though it is ACTIVE"):
        tpu_vm.main(["watch", *VM, "--type=v6e-16", *TRAIN])


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", ""])
def test_chips_that_will_not_come_are_one_sentence(cloud, state):
    cloud.answers({"queued-resources list": [[0, "ACCEPTED"], [0, state]]})
    with pytest.raises(UserError, match=f"walt is {state or 'not there'}: look at"):
        tpu_vm.main(["wait", *VM])


def test_slices_are_nodes_of_one_request(cloud):
    cloud.answers({
        "queued-resources list": [[0, ""], [0, "ACTIVE"]],
        "ssh walt-1 uv venv": [[1, ""], [0, ""]],
        "echo state=": [[0, "state=0"]],
    })  # fmt: skip
    tpu_vm.main(["up", *VM, "--type=v5p-128", "--slices=2", *TRAIN])
    (create,) = cloud.calls("queued-resources create")
    assert {"--node-count=2", "--node-prefix=walt"} < set(create)
    assert len(cloud.calls("ssh walt-0")) == 3 and len(cloud.calls("ssh walt-1")) == 4


def test_a_dry_run_calls_nothing_and_prints_all(cloud, capsys):
    tpu_vm.main(["up", *VM, "--type=v6e-256", "--dry_run", *TRAIN])
    assert not cloud.calls()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("$ ") for line in lines)
    words = ["list", "create", "list", "archive", "scp", "ssh", "ssh", "ssh", "list", "delete"]
    assert [next(w for w in words if f" {w} " in line) for line in lines] == words


def test_bad_flags_are_one_sentence(cloud):
    with pytest.raises(UserError, match="create needs --type"):
        tpu_vm.main(["create", *VM])
    with pytest.raises(UserError, match="watch needs --type"):
        tpu_vm.main(["watch", *VM, *TRAIN])
    with pytest.raises(UserError, match="Give the command to run after --"):
        tpu_vm.main(["up", *VM, "--type=v6e-16"])
    with pytest.raises(UserError, match="of no known kind: give its --runtime"):
        tpu_vm.main(["create", *VM, "--type=v99-16"])
    with pytest.raises(UserError, match="of no known kind: give its --runtime"):
        tpu_vm.main(["watch", *VM, "--type=v99-16", *TRAIN])
    assert not cloud.calls()
    with pytest.raises(UserError, match="run needs --cluster"):
        xpk.main(["run", "--name=walt", *TRAIN])


def test_a_missing_program_is_one_sentence(cloud, monkeypatch):
    monkeypatch.setenv("PATH", str(cloud.folder))
    with pytest.raises(UserError, match="gcloud is not on the PATH: install it from"):
        tpu_vm.main(["delete", *VM])


def test_xpk_builds_runs_and_deletes(cloud, capsys):
    flags = ["--name=walt", "--cluster=c", "--zone=us-east5-b", "--project=p"]
    xpk.main(["image", "--image=r/walt:1"])
    xpk.main(["run", *flags, "--type=v5litepod-256", "--slices=2", "--image=r/walt:1", *TRAIN])
    xpk.main(["status", *flags])
    xpk.main(["logs", *flags])
    xpk.main(["delete", *flags])
    programs = [call[0] for call in cloud.calls()]
    assert programs == ["docker", "docker", "xpk", "xpk", "gcloud", "kubectl", "xpk"]
    build, push, run = cloud.calls()[:3]
    assert Path(build[build.index("-f") + 1]).name == "Dockerfile" and push[1:] == [
        "push",
        "r/walt:1",
    ]
    assert run[1:] == [
        "workload", "create", "--workload=walt", "--cluster=c", "--zone=us-east5-b", "--project=p",
        "--tpu-type=v5litepod-256", "--num-slices=2", "--docker-image=r/walt:1",
        "--max-restarts=100", "--priority=medium",
        "--command=python -m walt_jax.train --workdir 'gs://b/a b' --distributed",
    ]  # fmt: skip
    count = len(cloud.calls())
    xpk.main(["run", *flags, "--type=v6e-16", "--image=i", "--dry_run", *TRAIN])
    assert "$ xpk workload create" in capsys.readouterr().out and len(cloud.calls()) == count
    cloud.answers({"workload create": [[1, "no quota"]]})
    with pytest.raises(UserError, match=r"xpk workload create .* failed with status 1"):
        xpk.main(["run", *flags, "--type=v6e-16", "--image=i", *TRAIN])


def test_the_dockerfile_copies_what_there_is():
    root = Path(__file__).parents[2]
    lines = (root / "launch" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((root / name).exists() for name in copied)
    assert shutil.which("sh")
