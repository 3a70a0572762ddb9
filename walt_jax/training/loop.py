"""The one training loop."""

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from walt_jax import config as config_lib
from walt_jax.data.pipeline import Joint, Pipeline
from walt_jax.data.records import Dataset, open_dataset
from walt_jax.errors import UserError
from walt_jax.evaluation.inline import Inline
from walt_jax.parallel import describe, make_mesh
from walt_jax.parallel.sharding import batch_sharding, place, replicated
from walt_jax.tasks import to_uint8
from walt_jax.training import metrics as metrics_lib
from walt_jax.training.checkpoints import Checkpoints, Progress
from walt_jax.training.experiment import Experiment
from walt_jax.training.program import Program
from walt_jax.training.state import TrainState

logger = logging.getLogger(__name__)
PyTree = Any
SHARDINGS = "shardings.txt"
Shape = tuple[tuple[str, tuple[int, ...]], ...]


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    replace_config: bool = False,
    quiet: bool = False,
) -> dict[str, float]:
    """Trains, or goes on with, the run in `workdir`; returns the last evaluation's metrics.

    The decisions, in their order:
    1. Another config in the workdir is an error; it is claimed once all the rest is checked.
    2. The mesh, the data and the task's fixed parts (a tokenizer) are built and checked.
    3. Every bucket's step is compiled before the first; a shape that comes later is an error.
    4. The state is restored from the newest checkpoint, or drawn from the seed.
    5. Steps. Metrics are read one step late, so that the devices never wait for the host.
       Checkpoints are taken between two steps, before the next batch is asked for.

    Raises:
      UserError: bad input, or a loss that is not finite (the sentence names the step).
    """
    first = jax.process_index() == 0
    claim = functools.partial(config_lib.claim_workdir, workdir, experiment, replace=replace_config)
    claim(write=False)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        run = _Run(experiment, workdir, mesh, quiet=quiet or not first)
        with Checkpoints(workdir, keep=experiment.keep_checkpoints) as checkpoints:
            return run.steps(checkpoints, functools.partial(claim, write=first))


class _Run:
    """What stays the same over the steps of a run."""

    def __init__(
        self, experiment: Experiment, workdir: str | Path, mesh: Mesh, *, quiet: bool
    ) -> None:
        self.experiment, self.workdir, self.mesh, self.quiet = experiment, workdir, mesh, quiet
        self.program = Program(experiment, mesh)
        self.task, self.layout = self.program.task, self.program.layout
        self.batch_sharding = batch_sharding(mesh)
        dataset = open_dataset(experiment.data.path)
        make = functools.partial(Pipeline, dataset, batch_size=experiment.batch_size)
        self.data = make(experiment.data, seed=experiment.seed, split="train")
        datasets = [dataset]
        if (images := experiment.images) is not None:
            datasets.append(open_dataset(images.path))
            size = experiment.image_batch_size
            pipeline = Pipeline(datasets[1], images, batch_size=size, seed=experiment.seed)
            self.data = Joint(self.data, pipeline)
        # Threads: an evaluation is over before worker processes would have started.
        few = dataclasses.replace(experiment.data, num_workers=0)
        split = "eval" if experiment.data.eval_fraction else "train"
        self.eval_data = make(few, seed=0, split=split, shuffle=False)
        self.say(f"data: {self.data.describe()}")
        self.prepared = self.task.prepare(str(workdir), *datasets)
        self.frozen = place(self.prepared, jax.tree.map(lambda _: replicated(mesh), self.prepared))
        self.key = place(np.asarray(experiment.seed, np.uint32), replicated(mesh))
        about = _about(dataset, experiment.data.fps)
        self.score = Inline(experiment, workdir, mesh, self.frozen, about, quiet=quiet)
        if jax.process_index() == 0:
            epath.Path(workdir).mkdir(parents=True, exist_ok=True)
            (epath.Path(workdir) / config_lib.DATASET).write_text(
                json.dumps(about, indent=2) + "\n"
            )
            lines = describe(self.program.shardings.params, self.program.abstract.params)
            (epath.Path(workdir) / SHARDINGS).write_text("\n".join(lines) + "\n")

    def say(self, text: str) -> None:
        """A line for the user, on the first process."""
        if not self.quiet:
            logger.info(text)

    def initial(self, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
        """Restores the newest checkpoint, or draws a fresh state."""
        if checkpoints.latest is not None:
            self.say(f"goes on from step {checkpoints.latest}")
            return checkpoints.restore(self.program.abstract)
        total = sum(x.size for x in jax.tree.leaves(self.program.abstract.params))
        shape = " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
        self.say(f"{total:,} parameters on {shape} (how they lie: {self.workdir}/{SHARDINGS})")
        return self.program.create(self.key), Progress()

    def compile_steps(self) -> dict[Shape, tuple[Any, float]]:
        """The training step of every bucket: shapes -> (executable, model FLOPs)."""
        compiled = {}
        for shapes in self.data.shapes():
            began = time.monotonic()
            executable = self.program.lower(self.frozen, shapes).compile()
            compiled[_shape(shapes)] = executable, self.program.flops(self.frozen, shapes)
            self.say(f"compiled {_shape(shapes)[-1]} in {time.monotonic() - began:.0f} s")
        return compiled

    def steps(self, checkpoints: Checkpoints, claim: Callable[[], None]) -> dict[str, float]:
        """All steps from the newest checkpoint to the last; the last evaluation's metrics.

        The workdir is claimed once the state is there and every step compiled.
        """
        experiment = self.experiment
        state, progress = self.initial(checkpoints)
        if progress.next_batch >= experiment.num_steps:
            claim()
            self.say(f"all {experiment.num_steps} steps are done; config.num_steps adds more")
            return self.evaluate(state, progress.next_batch, None)
        self.score.prepare(state)
        compiled = self.compile_steps()
        claim()
        self.task.keep(self.prepared, str(self.workdir))
        writer = metrics_lib.make_writer(self.workdir) if jax.process_index() == 0 else None
        log = _Log(self, progress, writer)
        first = progress.next_batch
        evaluation = self.evaluate(state, first, writer) if first == 0 else {}
        batches = self.data.on_devices(self.batch_sharding, first)
        with jax.transfer_guard("disallow"):
            for step in range(first, experiment.num_steps):
                batch = next(batches)
                executable, flops = compiled.get(_shape(batch), (None, 0.0))
                if executable is None:
                    raise UserError(
                        f"Batch {step} has the new shape {_shape(batch)}: every shape is compiled "
                        "before the first step, so this dataset changed under the run."
                    )
                state, metrics = executable(state, self.frozen, batch, self.key)
                log.add(step + 1, metrics, flops)
                done, last = step + 1, step + 1 == experiment.num_steps
                if last or done % experiment.eval_every == 0:
                    log.flush()
                    evaluation = self.evaluate(state, done, writer)
                evaluation = evaluation | self.score(state, done, writer)
                if experiment.preview_every and (last or done % experiment.preview_every == 0):
                    self.preview(state, done, writer)
                if last or done % experiment.checkpoint_every == 0:
                    log.flush()
                    state = self.described(state)
                    checkpoints.save(state, log.progress)
        if writer is not None:
            writer.flush()
            writer.close()
        return evaluation

    @functools.cached_property
    def _evaluate(self) -> Any:
        def evaluate(state: TrainState, frozen: PyTree, batch: PyTree) -> PyTree:
            return self.task.evaluate(
                state.ema, state.extra, frozen, batch, jax.random.key(0), self.layout
            )

        return jax.jit(evaluate, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def _preview(self) -> Any:
        def preview(state: TrainState, frozen: PyTree, batch: PyTree) -> PyTree:
            return self.task.preview(
                state.ema, state.extra, frozen, batch, jax.random.key(0), self.layout
            )

        return jax.jit(preview, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def _statistics(self) -> Any:
        def statistics(state: TrainState, batch: PyTree) -> PyTree:
            return self.task.statistics(state.ema, batch, self.layout)

        return jax.jit(statistics, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def _mean(self) -> Any:
        return jax.jit(lambda rows: jax.tree.map(lambda *x: sum(x) / len(x), *rows))

    def _held_out(self) -> Iterator[dict[str, jax.Array]]:
        """The same clips at every call; trained ones where none are held out."""
        return self.eval_data.on_devices(self.batch_sharding)

    def evaluate(self, state: TrainState, step: int, writer: Any) -> dict[str, float]:
        """Mean metrics of the moving average on the same held-out clips at every call."""
        if not self.experiment.data.eval_fraction:
            return {}
        batches = self._held_out()
        rows = [
            jax.device_get(self._evaluate(state, self.frozen, next(batches)))
            for _ in range(self.experiment.eval_batches)
        ]
        means = {f"eval/{k}": float(np.mean([r[k] for r in rows])) for k in rows[0]}
        if writer is not None:
            writer.write_scalars(step, means)
        self.say(f"step {step}: " + "  ".join(metrics_lib.shown(means)))
        return means

    def described(self, state: TrainState) -> TrainState:
        """The state with the task's statistics of the moving average, as a checkpoint holds it."""
        if not self.task.keeps_statistics:
            return state
        batches = self._held_out()
        rows = [self._statistics(state, next(batches)) for _ in range(self.experiment.eval_batches)]
        return dataclasses.replace(state, extra=state.extra | self._mean(rows))

    def preview(self, state: TrainState, step: int, writer: Any) -> None:
        """Writes videos of the moving average to TensorBoard."""
        videos = jax.device_get(self._preview(state, self.frozen, next(self._held_out())))
        if writer is not None:
            writer.write_videos(step, {"preview": to_uint8(videos[:8])})


class _Log:
    """Reads metrics one step late, checks them, averages them over a window, counts the work."""

    def __init__(self, run: _Run, progress: Progress, writer: Any) -> None:
        self.progress = dataclasses.replace(progress)
        self._run, self._writer = run, writer
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._window: list[dict[str, float]] = []
        self._clock = time.monotonic()
        self._mark = dataclasses.replace(progress)
        experiment = run.experiment
        self._line = metrics_lib.ProgressLine(
            "step", experiment.num_steps, progress.next_batch, enabled=not run.quiet
        )

    def add(self, step: int, metrics: dict[str, jax.Array], flops: float) -> None:
        """Takes step's metrics, still being computed, and handles those of the step before."""
        pending, self._pending = self._pending, (step, metrics)
        self._read(pending)
        progress = self.progress
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        progress.next_batch = step
        progress.clips += self._run.experiment.batch_size
        progress.seconds += seconds
        progress.core_seconds += seconds * jax.device_count()
        progress.flops += flops

    def flush(self) -> None:
        """Waits for the newest step and handles its metrics."""
        pending, self._pending = self._pending, None
        self._read(pending)

    def _read(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        if pending is None:
            return
        step, metrics = pending
        values = {k: float(v) for k, v in sorted(jax.device_get(metrics).items())}
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"The loss is {values['loss']} at step {step} (gradient norm "
                f"{values['grad_norm']:.3g}): lower config.optimizer.learning_rate, or look at "
                f"batch {step - 1}; checkpoints before it are kept."
            )
        self._window.append(values)
        every = self._run.experiment.log_every
        if step % every and step != self._run.experiment.num_steps:
            return
        means = {k: float(np.mean([w[k] for w in self._window])) for k in values}
        self._window = []
        rates = self._rates()
        if self._writer is not None:
            hours = self.progress.core_seconds / 3600
            scalars = {f"train/{k}": v for k, v in means.items()}
            scalars |= {f"speed/{k}": v for k, v in rates.items()}
            self._writer.write_scalars(step, {**scalars, "speed/core_hours": hours})
        del means["learning_rate"]
        self._line(step, rates, {"loss": means["loss"], **means})

    def _rates(self) -> dict[str, float]:
        now, before = self.progress, self._mark
        self._mark = dataclasses.replace(now)
        seconds = max(now.seconds - before.seconds, 1e-9)
        devices = jax.device_count()
        rates = {
            "steps/s": (now.next_batch - before.next_batch) / seconds,
            "clips/s": (now.clips - before.clips) / seconds,
            "clips/s/chip": (now.clips - before.clips) / seconds / devices,
        }
        if peak := metrics_lib.peak_flops(jax.devices()[0].device_kind):
            rates["MFU"] = (now.flops - before.flops) / seconds / devices / peak
        return rates


def _about(dataset: Dataset, fps: float) -> dict[str, Any]:
    """What sampling needs to know of the data, so that a workdir stands alone."""
    return {
        "label_names": dataset.label_names,
        "fps": fps or float(np.median(dataset.index["fps"])),
        "fingerprint": dataset.fingerprint,
    }


def _shape(batch: PyTree) -> Shape:
    return tuple(sorted((k, tuple(v.shape)) for k, v in batch.items()))
