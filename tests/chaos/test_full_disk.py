"""A disk that is really full: a small one of memory, mounted where nobody else sees it."""

import shlex
import subprocess
import sys

import chaos
import pytest

OWN = ("unshare", "--user", "--map-root-user", "--mount")  # a namespace that may mount
MOUNT = "mount -t tmpfs -o size=600k tmpfs"


def may_mount(folder):
    command = [*OWN, "bash", "-c", f"{MOUNT} {shlex.quote(str(folder))}"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_room_lets_the_run_go_on(tmp_path):
    disk, straight = tmp_path / "disk", tmp_path / "straight"
    disk.mkdir()
    if not may_mount(disk):
        pytest.skip("no namespace of one's own may mount here")
    chaos.write_latents(tmp_path / "latents")
    command = [sys.executable, "-m", "walt_jax.train", f"--config={chaos.CONFIG}"]
    command += [f"--config.data.path={tmp_path / 'latents'}", "--config.num_steps=12"]
    command += ["--config.keep_checkpoints=100", f"--compilation_cache={tmp_path / 'cache'}"]
    subprocess.run([*command, f"--workdir={straight}"], check=True)
    train = shlex.join([*command, f"--workdir={disk / 'run'}"])
    script = f"""
        {MOUNT} {shlex.quote(str(disk))} || exit 1
        {train} 2>&1; echo "status $?"
        mount -o remount,size=60m {shlex.quote(str(disk))} || exit 1
        {train} 2>&1; echo "status $?"
        cp -r {shlex.quote(str(disk / "run"))} {shlex.quote(str(tmp_path / "moved"))}
    """
    done = subprocess.run(
        [*OWN, "bash", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    full, _, later = done.stdout.partition("status 2\n")
    last = full.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last, done
    assert "goes on from step" in later and later.endswith("status 0\n"), later
    ours, theirs = (chaos.Campaign.rows(folder) for folder in (tmp_path / "moved", straight))
    assert {step for step, *_ in ours} == set(range(1, 13)) and set(ours) == set(theirs)
