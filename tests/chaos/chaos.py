"""Faults of many kinds, one after the other, in real runs of `launch.local_pod`.

A campaign trains a tiny task (`tests/training/tiny_task.py`) in the real loop. Whenever the job has
come forward, it is hurt; it starts again by itself or, where the fault destroyed an input, once
that is put right. In the end every loss that it ever logged is compared with an undisturbed run's.
"""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from walt_jax.data.latents import LATENT_FEATURES
from walt_jax.data.writer import DatasetWriter

CONFIG = Path(__file__).parents[1] / "training" / "tiny_task.py"
PRELOADED = "walt_jax.training.loop,walt_jax.training.writers"
WAIT = 300.0  # seconds for anything to happen
RECORDS = 61  # one is held out


def write_latents(folder, bad=None):
    """Records of three-channel latents in four shards; that of number `bad` has a NaN."""
    metadata = {"kind": "latents", "latent_channels": 3, "dtype": "float16", "label_names": []}
    with DatasetWriter(folder, LATENT_FEATURES, metadata=metadata) as writer:
        for i in range(RECORDS):
            latents = np.random.default_rng(i).normal(size=(1, 2, 2, 3)).astype(np.float16)
            if i == bad:
                latents[0, 1, 0, 2] = np.nan
            example = {"latents": latents, "num_frames": 1, "height": 2, "width": 2, "fps": 4.0}
            example |= {"caption": "", "label": i, "source": f"{i:02d}.mp4", "tokenizer_hash": "x"}
            writer.write(example, shard=i % 4)


def _session(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[3])
    except FileNotFoundError:
        return None


class Job:
    """One call of `local_pod`; its lines are read as they come."""

    def __init__(self, processes, workdir, records, cache, hang_seconds):
        self.processes = processes
        command = [sys.executable, "-m", "launch.local_pod", f"--processes={processes}"]
        command += ["--restarts=100000", f"--compilation_cache={cache}", f"--preload={PRELOADED}"]
        command += ["--", "python", "-m", "walt_jax.train", f"--config={CONFIG}"]
        command += [f"--workdir={workdir}", f"--config.data.path={records}"]
        command += ["--config.batch_size=4", "--config.num_steps=1000000"]
        command += ["--config.optimizer.schedule=constant", "--config.checkpoint_every=4"]
        command += ["--config.keep_checkpoints=3", f"--config.guard.hang_seconds={hang_seconds}"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines, self._new = [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            with self._new:
                self.lines.append(line)
                self._new.notify_all()
        with self._new:
            self.lines.append("")  # the end
            self._new.notify_all()

    def wait(self, *texts, since):
        """The number of the first line at or after `since` that begins with one of the texts."""
        deadline, first = time.monotonic() + WAIT, since
        with self._new:
            while True:
                for i in range(first, len(self.lines)):
                    if self.lines[i].startswith(texts) or not self.lines[i]:
                        return i
                first = max(since, len(self.lines))
                left = deadline - time.monotonic()
                assert left > 0 and self._new.wait(left), f"nothing came of {texts}: {self.tail()}"

    def tail(self):
        return "".join(self.lines[-30:])

    def children(self):
        """The processes of the present start, once all are there."""
        pid, deadline = self.process.pid, time.monotonic() + WAIT
        while True:
            found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            # Imports run programs too; these are no leaders of a session.
            leaders = [int(p) for p in found if _session(p) == int(p)]
            if len(leaders) == self.processes:
                return leaders
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.01)

    def end(self):
        """Tells it to leave, and waits."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT)


@dataclasses.dataclass
class Campaign:
    """Faults in runs of `processes` processes; `folder` holds data, workdir and cache."""

    folder: Path
    processes: int
    seed: int = 0

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.workdir, self.records = self.folder / "run", self.folder / "latents"
        self.cache = self.folder / "cache"
        write_latents(self.records)
        write_latents(self.folder / "bad", bad=17)
        self.counts, self.passed_over, self.jobs = {}, 0, []

    def run(self, kinds, minutes=float("inf")):
        """Injects the faults; returns the losses of all lives, and those of a straight run."""
        try:
            return self._run(kinds, time.monotonic() + 60 * minutes)
        finally:
            for job in self.jobs:
                if job.process.poll() is None:
                    job.end()

    def _run(self, kinds, deadline):
        job, mark = self.job(), 0
        for number, kind in enumerate(kinds):
            if (began := time.monotonic()) > deadline:
                break
            if kind != "kill -9 at any moment":
                mark = job.wait("[0] step ", since=mark)
                assert job.lines[mark], job.tail()
            job, mark = getattr(self, "_" + kind.split(" (")[0].replace(" ", "_").replace("-", ""))(
                job, mark
            )
            self.counts[kind] = self.counts.get(kind, 0) + 1
            seconds = time.monotonic() - began
            print(f"{number + 1}/{len(kinds)} {kind}: {seconds:.1f} s", flush=True)
        job.wait("[0] step ", since=mark)
        job.end()
        rows = self.rows(self.workdir)
        straight = self.straight(max(step for step, *_ in rows))
        return rows, straight

    def job(self, workdir=None, hang_seconds=20):
        workdir = workdir or self.workdir
        job = Job(self.processes, workdir, self.records, self.cache, hang_seconds)
        self.jobs.append(job)
        return job

    @staticmethod
    def rows(workdir):
        """(step, loss, rows of the batch) of every line ever logged."""
        text = (workdir / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        return [(r["step"], r["train/loss"], r["train/rows"]) for r in rows if "train/loss" in r]

    def straight(self, steps):
        """An undisturbed run of at least so many steps."""
        # Undisturbed, even where other work slows the machine down.
        job, mark = self.job(self.folder / "straight", hang_seconds=0), 0
        while True:
            mark = job.wait("[0] step ", since=mark) + 1
            assert job.lines[mark - 1], job.tail()
            done, slash, _ = job.lines[mark - 1].split()[2].partition("/")
            if slash and int(done) >= steps:
                break
        job.end()
        return {step: values for step, *values in self.rows(self.folder / "straight")}

    def again(self, job, mark, *statuses):
        """Waits until the pod has started again after one of the statuses."""
        mark = job.wait("pod: status ", since=mark)
        assert job.lines[mark], f"the pod has ended: {job.tail()}"
        status = int(job.lines[mark].split()[2].rstrip(","))
        assert status in statuses, f"status {status}: {job.tail()}"
        return job, mark + 1

    def crashed(self, job, mark):
        return self.again(job, mark, 137, 134, 1, 75, 76)

    def stopped(self, job):
        """All processes, stopped where they are."""
        children = job.children()
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        return children

    def killed(self, children):
        for pid in children:
            os.kill(pid, signal.SIGKILL)

    def moment(self, most):
        time.sleep(self.random.uniform(0, most))

    def steps(self):
        folder = self.workdir / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

    def one(self, job):
        return self.random.choice(job.children())

    def _kill_9_at_any_moment(self, job, mark):
        self.one(job)
        self.moment(8)  # a start takes most of it
        os.kill(self.one(job), signal.SIGKILL)
        return self.crashed(job, mark)

    def _kill_9_in_a_step(self, job, mark):
        self.moment(0.4)
        os.kill(self.one(job), signal.SIGKILL)
        return self.crashed(job, mark)

    def _kill_9_in_a_save(self, job, mark):
        deadline = time.monotonic() + WAIT
        while not any("tmp" in p.name for p in (self.workdir / "checkpoints").iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        self.moment(0.15)
        os.kill(self.one(job), signal.SIGKILL)
        return self.crashed(job, mark)

    def _SIGTERM(self, job, mark):
        self.moment(0.4)
        os.kill(self.one(job), signal.SIGTERM)
        return self.again(job, mark, 75)

    def _file_size_limit(self, job, mark):
        """No file may grow beyond a few bytes (EFBIG), until the next start.

        It stands for a full disk (ENOSPC): that one is in test_full_disk.py.
        """
        limit = self.random.choice([0, 100, 1000, 2000])
        for pid in job.children():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        mark = job.wait("pod: status ", since=mark)
        if job.lines[mark]:  # a file whose error nobody had expected
            return job, mark + 1
        assert job.process.wait(WAIT) == 2, job.tail()
        assert "could not be written" in "".join(job.lines), job.tail()
        return self.job(), 0

    def _truncated_checkpoint(self, job, mark):
        while len(self.steps()) < 2:  # the only one is not to be damaged
            time.sleep(0.01)
        children = self.stopped(job)
        steps = self.steps()
        newest = self.workdir / "checkpoints" / str(steps[-1])
        item = newest / self.random.choice(["params", "ema", "opt_state", "rest", "contents"])
        files = [p for p in sorted(item.rglob("*")) if p.is_file()]
        how = self.random.choice(["halved", "emptied", "flipped"])
        for file in files if self.random.random() < 0.5 else [self.random.choice(files)]:
            data = bytearray(file.read_bytes())
            if how == "flipped" and data:
                data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            else:
                data = data[: len(data) // 2 if how == "halved" else 0]
            file.write_bytes(data)
        self.killed(children)
        job, mark = self.crashed(job, mark)
        mark = job.wait("[0] step ", since=mark)
        assert job.lines[mark], job.tail()
        self.passed_over += any("is damaged (" in line for line in job.lines[-60:])
        return job, mark

    def _deleted_record_shard(self, job, mark):
        children = self.stopped(job)
        shard = self.random.choice(sorted(self.records.glob("*array_record*")))
        shard.rename(self.folder / "shard")
        self.killed(children)
        job.wait("\0", since=mark)  # its end
        assert job.process.wait(WAIT) == 2, job.tail()
        assert f"{shard.name} is missing" in "".join(job.lines), job.tail()
        (self.folder / "shard").rename(shard)
        return self.job(), 0

    def _NaN_in_a_batch(self, job, mark):
        children = self.stopped(job)
        self.records.rename(self.folder / "good")
        (self.folder / "bad").rename(self.records)
        self.killed(children)
        job.wait("\0", since=mark)
        text = "".join(job.lines)
        assert job.process.wait(WAIT) == 2, job.tail()
        assert "The loss is nan at step " in text, job.tail()
        assert "not finite: latents of 17.mp4" in text, job.tail()
        self.records.rename(self.folder / "bad")
        (self.folder / "good").rename(self.records)
        return self.job(), 0

    def _hung_process(self, job, mark):
        os.kill(self.one(job), signal.SIGSTOP)
        return self.crashed(job, mark)


WEIGHTS = {
    "kill -9 at any moment": 20,
    "kill -9 in a step": 20,
    "kill -9 in a save": 20,
    "SIGTERM": 14,
    "file size limit": 9,
    "truncated checkpoint": 9,
    "deleted record shard": 4,
    "NaN in a batch": 4,
    "hung process": 2,
}


def plan(faults, seed):
    """Kinds in a random order, in the proportion of WEIGHTS, each at least once."""
    total = sum(WEIGHTS.values())
    kinds = [k for k, w in WEIGHTS.items() for _ in range(max(1, round(faults * w / total)))]
    kinds += ["kill -9 in a save"] * (faults - len(kinds))
    # A checkpoint is damaged only where there is another one.
    random.Random(seed).shuffle(kinds)
    quiet = [k for k in kinds if k == "SIGTERM"][:2]
    for kind in quiet:
        kinds.remove(kind)
    return quiet + kinds


def main():
    """`python tests/chaos/chaos.py FOLDER PROCESSES FAULTS [MINUTES]`: a campaign's figures."""
    folder, processes, faults = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    minutes = float(sys.argv[4]) if len(sys.argv) > 4 else float("inf")
    campaign = Campaign(folder, processes)
    rows, straight = campaign.run(plan(faults, processes), minutes)
    wrong = [row for row in rows if straight[row[0]] != list(row[1:])]
    report = {
        "processes": processes,
        "faults": campaign.counts,
        "checkpoints_passed_over": campaign.passed_over,
        "steps": max(step for step, *_ in rows),
        "steps_logged": len(rows),
        "steps_that_differ": len(wrong),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
