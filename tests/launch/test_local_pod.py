"""The pod of processes on this machine, with real processes that are quick to start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local_pod
from launch.commands import restarts_after
from walt_jax.errors import UserError

HEAD = "import os, sys, time; me = int(sys.argv[-1].split('=')[1]); "


def pod(code, *flags, processes=3):
    """Runs `HEAD + code` in every process; the pod as a finished process and its seconds."""
    began = time.monotonic()
    command = [sys.executable, "-m", "launch.local_pod", f"--processes={processes}", *flags]
    done = subprocess.run(
        [*command, "--", sys.executable, "-u", "-c", HEAD + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, time.monotonic() - began


def lives(process):
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_line_has_its_process_and_flags_are_given():
    done, _ = pod("print(*sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES'])", "--devices=4")
    assert done.returncode == 0, done
    lines = sorted(done.stdout.splitlines())
    ports = {line.split("127.0.0.1:")[1].split()[0] for line in lines}
    assert len(lines) == 3 and len(ports) == 1
    for i, line in enumerate(lines):
        assert line.startswith(f"[{i}] --coordinator=127.0.0.1:")
        assert line.endswith(f"--num_processes=3 --process_id={i} 4")


def test_all_end_when_one_fails():
    done, seconds = pod("time.sleep(0.2 if me == 1 else 50); sys.exit(7)", "--grace=0.5")
    assert done.returncode == 7 and "pod: process 1 ended with status 7" in done.stdout
    assert "pod: ending process 0" in done.stdout and seconds < 20


def test_a_killed_one_ends_all_at_once_with_what_they_started():
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '50']); print('child', child.pid); "
        "time.sleep(0.5); os.kill(os.getpid(), 9) if me == 2 else time.sleep(50)"
    )
    done, seconds = pod(code)
    assert done.returncode == 128 + signal.SIGKILL and seconds < 15
    children = [int(line.split()[-1]) for line in done.stdout.splitlines() if " child " in line]
    assert len(children) == 3
    deadline = time.monotonic() + 5
    while any(map(lives, children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_preempted_job_starts_again_and_a_crashed_one_so_often(tmp_path):
    marks = f"n = len(os.listdir({str(tmp_path)!r})); time.sleep(0.3); "
    marks += f"open({str(tmp_path)!r} + '/%d-%d' % (n, me), 'w'); time.sleep(0.3); "
    code = marks + "sys.exit([75, 75, 1, 0][n // 2])"
    done, _ = pod(code, "--restarts=1", processes=2)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("starting again") == 3 and len(os.listdir(tmp_path)) == 8
    for i in os.listdir(tmp_path):
        os.unlink(tmp_path / i)
    done, _ = pod(code, processes=2)
    assert done.returncode == 1


def test_sigterm_to_a_process_restarts_and_to_the_pod_ends(tmp_path):
    mark = str(tmp_path / "mark")
    code = f"first = not os.path.exists({mark!r}); open({mark!r}, 'w'); import signal; "
    code += "print('began', flush=True); os.kill(os.getpid(), 15) if first else time.sleep(9)"
    command = [sys.executable, "-m", "launch.local_pod", "--processes=1", "--restarts=5"]
    command += ["--", sys.executable, "-c", HEAD + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines == [
            "[0] began\n",
            "pod: status 143, starting again\n",
            "[0] began\n",
        ]
        process.send_signal(signal.SIGTERM)
        assert "starting again" not in process.stdout.read()
    assert process.returncode == 143


def test_what_cannot_be_run_is_one_sentence():
    with pytest.raises(UserError, match="/nosuch/prog cannot be run: No such file or directory"):
        local_pod.main(["--", "/nosuch/prog"])
    with pytest.raises(UserError, match="Give the command to run after --"):
        local_pod.main([])
    command = [sys.executable, "-m", "launch.local_pod", "--preload=os,nosuchmod", "--"]
    done = subprocess.run(
        [*command, "python", "-m", "x"], capture_output=True, text=True, check=False
    )
    sentence = "error: --preload nosuchmod cannot be imported: No module named 'nosuchmod'.\n"
    assert (done.returncode, done.stderr) == (2, sentence)


def test_the_launchers_start_without_jax():
    code = "import launch.local_pod, launch.tpu_vm, launch.xpk, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_when_a_job_starts_again():
    assert restarts_after(75, 3, 0) == (True, 3)
    assert restarts_after(137, 0, 1) == (True, 1) and restarts_after(137, 1, 1) == (False, 2)
    assert restarts_after(76, 0, 1)[0]
    assert restarts_after(143, 0, 1) == (True, 1) and not restarts_after(143, 1, 1)[0]
    for status in (0, 2, 130):
        assert not restarts_after(status, 0, 9)[0]


def test_a_dry_run_prints_every_command(capsys):
    assert local_pod.main(["--processes=2", "--devices=3", "--dry_run", "--", "train", "a b"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=3 train 'a b' --coordinator=")
    assert second.endswith("--num_processes=2 --process_id=1")
