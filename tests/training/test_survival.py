"""What a run survives: losses that are not finite or jump, being told to leave, hangs."""

import http.server
import json
import logging
import os
import re
import signal
import threading
import time

import jax
import numpy as np
import pytest
import tiny_task

from walt_jax import config as config_lib
from walt_jax.data.pipeline import Pipeline
from walt_jax.data.records import open_dataset
from walt_jax.errors import EXIT_HUNG, Preempted, UserError
from walt_jax.evaluation.inline import Inline
from walt_jax.training import goodput as goodput_module
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.experiment import Experiment
from walt_jax.training.goodput import Goodput
from walt_jax.training.guard import Diverged, Guard, GuardConfig, describe_batch
from walt_jax.training.log import Log
from walt_jax.training.loop import train
from walt_jax.training.preemption import Preemption, notice
from walt_jax.training.progress import Progress
from walt_jax.training.watchdog import Watchdog


def experiment(records, *overrides):
    values = tiny_task.get_config().to_dict()
    values["data"]["path"] = str(records)
    values["mesh"] = {"data": 1, "context": -1}  # two clips do not divide over eight devices
    return config_lib.build(Experiment, config_lib.override(values, overrides))


def outcome(workdir):
    """The arrays and the progress of the newest checkpoint, and the losses by step."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        arrays = checkpoints.restore_part(("step", "params", "ema", "opt_state"))
        file = checkpoints.directory / str(checkpoints.restored) / "progress" / "metadata"
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    return arrays, Progress(**json.loads(file.read_text())), losses


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, sprite_records):
    folder = tmp_path_factory.mktemp("straight")
    train(experiment(sprite_records), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def rare(sprite_records):
    """A label that one batch of the first nine has, batch 4 to 7, and that batch."""
    config = experiment(sprite_records)
    pipeline = Pipeline(open_dataset(sprite_records), config.data, batch_size=2, seed=0)
    labels = [set(pipeline.dataset.index["label"][pipeline.plan(k)[1]]) for k in range(9)]
    return next(
        (int(label), k)
        for k in range(4, 8)
        for label in labels[k]
        if sum(label in others for others in labels) == 1
    )


def test_a_bad_batch_stops_the_run_and_is_named(tmp_path, sprite_records, rare):
    label, number = rare
    config = experiment(sprite_records, f"task.bad_labels=({label},)")
    with pytest.raises(UserError) as error:
        train(config, tmp_path, quiet=True)
    pipeline = Pipeline(open_dataset(sprite_records), config.data, batch_size=2, seed=0)
    first, second = pipeline.keys(number)
    assert re.match(
        rf"The loss is nan at step {number + 1} \(gradients not finite: first, last\), of batch "
        rf"{number}: keys {re.escape(first)}, {re.escape(second)}: lower ",
        str(error.value),
    )
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest == number // 2 * 2


def test_a_skipped_update_changes_nothing_but_the_step(tmp_path, sprite_records, straight, caplog):
    config = experiment(
        sprite_records, "guard.nonfinite=skip", "task.bad_steps=(7,)", "checkpoint_every=1"
    )
    with caplog.at_level(logging.WARNING, "walt_jax"):
        train(config, tmp_path)
    assert "The loss is nan at step 8" in caplog.text and "update was left out" in caplog.text
    arrays, progress, losses = outcome(tmp_path)
    assert progress.step == progress.next_batch == 8 and arrays["step"] == 8
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        same(
            checkpoints.restore_part(("params", "ema"), 7),
            {k: arrays[k] for k in ("params", "ema")},
        )
    expected = outcome(straight)[2]
    assert losses == pytest.approx({step: expected[step] for step in range(1, 8)}, rel=1e-6)


def test_a_roll_back_leaves_the_batch_out_wherever_it_goes_back_to(tmp_path, sprite_records, rare):
    label, number = rare
    ends = []
    for every in (1, 3):
        config = experiment(
            sprite_records,
            "guard.nonfinite=rollback",
            f"task.bad_labels=({label},)",
            f"checkpoint_every={every}",
        )
        train(config, tmp_path / str(every), quiet=True)
        ends.append(outcome(tmp_path / str(every)))
    (arrays, progress, losses), (others, other_progress, other_losses) = ends
    assert progress.left_out == other_progress.left_out == [number]
    assert (progress.step, progress.next_batch, progress.rollbacks) == (8, 9, 1)
    same(arrays, others)
    assert losses == other_losses and len(losses) == 8
    assert other_progress.spent["lost"] > 0


def test_too_many_roll_backs_stop(tmp_path, sprite_records):
    config = experiment(
        sprite_records,
        "guard={'nonfinite': 'rollback', 'max_rollbacks': 2}",
        "task.bad_steps=(1,)",  # whatever the batch
    )
    with pytest.raises(UserError, match=r"The loss is nan at step 2 .* of batch 3: keys"):
        train(config, tmp_path, quiet=True)


def test_told_to_leave_it_saves_and_goes_on_bit_for_bit(
    tmp_path, sprite_records, straight, monkeypatch
):
    config = experiment(sprite_records, "checkpoint_every=100")
    add = Log.add

    def add_and_tell(log, *args):
        add(log, *args)
        if log.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="step 3 is saved"):
        patch.setattr(Log, "add", add_and_tell)
        train(config, tmp_path, quiet=True)
    assert signal.getsignal(signal.SIGTERM) == before
    train(config, tmp_path, quiet=True)
    arrays, progress, losses = outcome(tmp_path)
    expected, _, expected_losses = outcome(straight)
    same(arrays, expected)
    assert losses == expected_losses
    assert {"step", "down", "lost", "checkpoint", "compile"} <= progress.spent.keys()


def test_it_goes_on_on_another_mesh(tmp_path, sprite_records, straight, monkeypatch):
    """Four steps on two devices, four on eight: float sums differ, not what is summed."""
    config = experiment(sprite_records, "mesh.data=2", "mesh.context=4")
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="step 4 is saved"):
        patch.setattr(Preemption, "reached", lambda self, step: step == 4)
        train(config, tmp_path, quiet=True)
    config = experiment(sprite_records, "mesh.context=1", "mesh.tensor=8")
    train(config, tmp_path, quiet=True)
    arrays, progress, losses = outcome(tmp_path)
    expected, _, expected_losses = outcome(straight)
    assert progress.step == 8 and losses == pytest.approx(expected_losses, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), arrays["ema"], expected["ema"]
    )


class _Batches:
    """Stands for a pipeline in sentences."""

    def keys(self, number):
        return ["a.mp4@0", "b.mp4@1.5"]

    def batches(self, number):
        latents = np.zeros((2, 3), np.float16)
        latents[1, 2] = np.inf
        return iter([{"latents": latents, "label": np.zeros(2, np.int32)}])


def test_the_row_that_is_not_finite_is_named():
    assert describe_batch(_Batches(), 6) == (
        "batch 6: keys a.mp4@0, b.mp4@1.5; not finite: latents of b.mp4@1.5"
    )


def test_a_spike_is_told_from_noise():
    losses = []
    guard = Guard(GuardConfig(spikes="rollback", spike_window=20), _Batches(), losses)
    rng = np.random.default_rng(0)
    for step in range(50):
        guard.check(step, step, {"loss": float(rng.normal(1.0, 0.1))})
    assert len(losses) == 20
    with pytest.raises(Diverged, match=r"jumped to 3 at step 51 .*stages 7.*batch 52") as error:
        guard.check(51, 52, {"loss": 3.0, "grad_norm/stages": 7.0})
    assert error.value.rolls_back and error.value.batch == 52 and len(losses) == 20
    Guard(GuardConfig(), _Batches(), losses).check(51, 52, {"loss": 3.0})


def test_other_metrics_need_not_be_finite():
    guard = Guard(GuardConfig(), _Batches(), [])
    assert guard.check(1, 1, {"loss": 1.0, "grad_norm": 2.0, "psnr": float("inf")}) == ""
    with pytest.raises(Diverged, match=r"loss is 1.0 at step 2 \(gradients not finite: last\)"):
        guard.check(2, 2, {"loss": 1.0, "grad_norm/last": float("nan")})


def test_a_hang_ends_the_job_and_names_the_place(caplog):
    left = threading.Event()
    codes = []

    def leave(code):
        codes.append(code)
        left.set()

    with caplog.at_level(logging.ERROR, "walt_jax"), Watchdog(0.3, leave) as watchdog:
        for step in range(8):  # longer than the limit, all in all
            watchdog.beat(step, "step")
            time.sleep(0.06)
        watchdog.rest("compile")
        time.sleep(0.5)
        assert not codes
        watchdog.beat(9, "data")
        assert left.wait(10)
    assert codes == [EXIT_HUNG]
    assert "nothing done for 0.3 s" in caplog.text and "'data' after step 9" in caplog.text


def test_sums_over_real_clips_and_compiling_may_take_any_time(
    tmp_path, sprite_records, monkeypatch
):
    told = []
    monkeypatch.setattr(Watchdog, "rest", lambda self, doing: told.append(doing))
    monkeypatch.setattr(Watchdog, "beat", lambda self, step, doing: told.append(doing))
    monkeypatch.setattr(Inline, "prepare", lambda self, state: told.append("prepare"))
    train(experiment(sprite_records, "num_steps=1"), tmp_path, quiet=True)
    start = told.index("restore")
    assert told[start + 1 : start + 5] == ["sums over real clips", "prepare", "compile", "start"]


def test_clouds_notice_becomes_a_signal(monkeypatch):
    about = {"maintenanceEvent": "NONE", "preempted": "FALSE"}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(about).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    assert notice(host) == ""
    about["maintenanceEvent"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert notice(host) == "maintenanceEvent=TERMINATE_ON_HOST_MAINTENANCE"
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    with Preemption(period=0.05) as preemption:
        deadline = time.monotonic() + 10
        while not preemption.reached(1):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    server.shutdown()


def test_goodput_counts_what_attempts_lost(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(goodput_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(goodput_module.time, "time", lambda: now[0] + 5000.0)

    def passes(seconds):
        now[0] += seconds

    first = Goodput(tmp_path, writes=True)
    passes(10)
    first.to("step")
    passes(50)
    first.to("checkpoint")
    saved, saved_at = dict(first.spent), now[0] + 5000
    assert saved == {"start": 10, "step": 50}
    passes(5)
    first.to("step")
    passes(25)
    first.alive(7)
    passes(15)  # and then it was killed
    passes(100)
    second = Goodput(tmp_path, writes=True)
    passes(20)
    second.resume(saved, saved_at)
    second.to("step")
    passes(30)
    text = second.describe()
    assert second.spent == {"start": 30, "step": 80, "lost": 30, "down": 115}
    assert text.startswith("goodput 31% of 4m15s: down 1m55s (45%), step 1m20s (31%)")
    assert sum(second.spent.values()) == now[0] - 1000


def test_goodput_counts_attempts_without_a_checkpoint(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(goodput_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(goodput_module.time, "time", lambda: now[0])
    for _ in range(2):  # each is killed after 30 s
        attempt = Goodput(tmp_path, writes=True)
        attempt.resume({})
        now[0] += 30
        attempt.alive(1)
        now[0] += 5
    last = Goodput(tmp_path, writes=True)
    now[0] += 10
    last.resume({})
    assert last.spent == {"start": 10, "lost": 65, "down": 5}
