"""The one training loop."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from walt_jax import config as config_lib
from walt_jax.data.joint import Joint
from walt_jax.data.pipeline import Pipeline
from walt_jax.data.records import open_dataset
from walt_jax.errors import Preempted, UserError
from walt_jax.evaluation.inline import Inline
from walt_jax.parallel import make_mesh
from walt_jax.parallel.sharding import batch_sharding, frozen_shardings, place, replicated
from walt_jax.tasks import to_uint8
from walt_jax.training import metrics as metrics_lib
from walt_jax.training.about import SHARDINGS, about_data, write_about
from walt_jax.training.checkpoints import Checkpoints
from walt_jax.training.experiment import Experiment
from walt_jax.training.goodput import Goodput
from walt_jax.training.guard import Diverged, Guard
from walt_jax.training.log import Log
from walt_jax.training.preemption import Preemption
from walt_jax.training.profiling import Profiler
from walt_jax.training.program import Program
from walt_jax.training.progress import Progress
from walt_jax.training.state import TrainState
from walt_jax.training.watchdog import Watchdog

logger = logging.getLogger(__name__)
PyTree = Any
_MAY_CHANGE = ("mesh", "guard", "profile")  # of a config, from one start to the next
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
    6. A step that diverged ends the run or takes it back to a checkpoint, as `config.guard` says;
       told to leave, all processes save after the same step.

    Raises:
      UserError: bad input, or a loss that is not finite (the sentence names the step).
      Preempted: the run was told to leave, and has saved.
    """
    first = jax.process_index() == 0
    claim = functools.partial(
        config_lib.claim_workdir, workdir, experiment, replace=replace_config, free=_MAY_CHANGE
    )
    claim(write=False)
    mesh = make_mesh(experiment.mesh)
    with (
        jax.set_mesh(mesh),
        Watchdog(experiment.guard.hang_seconds) as watchdog,
        # Now, so that a profile that is asked for while steps compile is of the first ones.
        Profiler(experiment.profile, workdir) as profiler,
    ):
        run = _Run(experiment, workdir, mesh, watchdog, profiler, quiet=quiet or not first)
        keep = {"keep": experiment.keep_checkpoints, "keep_every": experiment.keep_checkpoint_every}
        with Checkpoints(workdir, **keep) as checkpoints:
            return run.steps(checkpoints, functools.partial(claim, write=first))


class _Run:
    """What stays the same over the steps of a run."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: str | Path,
        mesh: Mesh,
        watchdog: Watchdog,
        profiler: Profiler,
        *,
        quiet: bool,
    ) -> None:
        self.experiment, self.workdir, self.mesh, self.quiet = experiment, workdir, mesh, quiet
        self.goodput = Goodput(workdir, writes=jax.process_index() == 0)
        self.watchdog, self.profiler = watchdog, profiler
        self.program = Program(experiment, mesh)
        self.task, self.layout = self.program.task, self.program.layout
        self.batch_sharding = batch_sharding(mesh)
        dataset = open_dataset(experiment.data.path)
        encoder = self.task.text_encoder
        make = functools.partial(
            Pipeline, dataset, batch_size=experiment.batch_size, text_encoder=encoder
        )
        self.data = make(experiment.data, seed=experiment.seed, split="train")
        datasets = [dataset]
        if (images := experiment.images) is not None:
            datasets.append(open_dataset(images.path))
            size = experiment.image_batch_size
            seed = experiment.seed
            pipeline = Pipeline(
                datasets[1], images, batch_size=size, seed=seed, text_encoder=encoder
            )
            self.data = Joint(self.data, pipeline)
        # Threads: an evaluation is over before worker processes would have started.
        few = dataclasses.replace(experiment.data, num_workers=0)
        split = "eval" if experiment.data.eval_fraction else "train"
        self.eval_data = make(few, seed=0, split=split, shuffle=False)
        self.dataset = dataset
        self.say(f"data: {self.data.describe()}")
        self.watchdog.beat(0, "frozen weights")
        self.prepared = self.task.prepare(str(workdir), *datasets)
        self.frozen = place(self.prepared, frozen_shardings(self.prepared, mesh))
        self.key = place(np.asarray(experiment.seed, np.uint32), replicated(mesh))
        self.watchdog.beat(0, "start")
        about = about_data(dataset, experiment.data.fps)
        self.score = Inline(
            experiment, workdir, mesh, self.frozen, about, quiet=quiet, beat=self.watchdog.alive
        )
        if jax.process_index() == 0:
            write_about(workdir, about, self.program)

    def say(self, text: str) -> None:
        """A line for the user, on the first process."""
        if not self.quiet:
            logger.info(text)

    def initial(self, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
        """Restores the newest checkpoint that is whole, or draws a fresh state."""
        ours = {
            "seed": self.experiment.seed,
            "rng": jax.config.jax_default_prng_impl,
            "fingerprint": self.dataset.fingerprint,
        }
        self.watchdog.beat(0, "restore")
        if checkpoints.latest is None:
            return self.program.create(self.key), Progress(**ours)
        state, progress = checkpoints.restore(self.program.abstract)
        self.say(f"goes on from step {progress.step}")
        for name, value in ours.items():
            if (was := getattr(progress, name)) != value:
                self.say(f"{name} was {was}, now {value}: the run goes on, but not bit for bit")
                setattr(progress, name, value)
        return state, progress

    def compile_steps(self) -> dict[Shape, tuple[Any, float]]:
        """The training step of every bucket: shapes -> (executable, model FLOPs)."""
        self.goodput.to("compile")
        self.watchdog.rest("compile")
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
        self.goodput.resume(progress.spent, progress.saved_at or None)
        if not progress.step:
            total = sum(x.size for x in jax.tree.leaves(self.program.abstract.params))
            shape = " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
            self.say(f"{total:,} parameters on {shape} (how they lie: {self.workdir}/{SHARDINGS})")
        if progress.step >= experiment.num_steps:
            claim()
            self.say(f"all {experiment.num_steps} steps are done; config.num_steps adds more")
            return self.evaluate(state, progress.step, None)
        self.watchdog.rest("sums over real clips")
        self.score.prepare(state)
        self.compiled = self.compile_steps()
        self.watch("start", progress.step)
        claim()
        self.goodput.alive(progress.step)
        self.task.keep(self.prepared, str(self.workdir))
        self.writer = metrics_lib.make_writer(self.workdir) if jax.process_index() == 0 else None
        with Preemption() as self.preemption:
            try:
                while True:
                    try:
                        return self.stretch(state, progress, checkpoints)
                    except Diverged as fault:
                        del state
                        fault.__traceback__ = None  # its frames hold the state too
                        state, progress = self.roll_back(fault, progress, checkpoints)
            finally:
                self.say(self.goodput.describe())
                metrics_lib.close(self.writer)

    def stretch(
        self, state: TrainState, progress: Progress, checkpoints: Checkpoints
    ) -> dict[str, float]:
        """The steps that are left, all on one line of history; the last evaluation's metrics.

        Raises:
          Diverged: a step is not accepted; `progress` tells how far it came.
          Preempted: the run was told to leave, and has saved.
        """
        experiment, goodput = self.experiment, self.goodput
        guard = Guard(experiment.guard, self.data, list(progress.losses))
        log = Log(experiment, progress, guard, goodput, self.data, self.writer, quiet=self.quiet)
        evaluation = {} if progress.step else self.evaluate(state, 0, self.writer)
        first, left_out = progress.next_batch, frozenset(progress.left_out)
        batches = enumerate(self.data.on_devices(self.batch_sharding, first), first)
        batches = (pair for pair in batches if pair[0] not in left_out)
        with jax.transfer_guard("disallow"):
            while (done := progress.step) < experiment.num_steps:
                self.profiler.step(done, state)
                self.watch("data", done)
                number, batch = next(batches)
                self.watch("step", done)
                executable, flops = self.compiled.get(_shape(batch), (None, 0.0))
                if executable is None:
                    raise UserError(
                        f"Batch {number} has the new shape {_shape(batch)}: every shape is "
                        "compiled before the first step, so this dataset changed under the run."
                    )
                state, metrics = executable(state, self.frozen, batch, self.key)
                log.add(number, metrics, flops)
                done, last = progress.step, progress.step == experiment.num_steps
                if last or done % experiment.eval_every == 0:
                    log.flush()
                    evaluation = self.evaluate(state, done, self.writer)
                if self.score.due(done):
                    log.flush()
                    self.watch("evaluation", done)
                    evaluation = evaluation | self.score(state, done, self.writer)
                if experiment.preview_every and (last or done % experiment.preview_every == 0):
                    self.preview(state, done, self.writer)
                leaves = self.preemption.reached(done) and not last
                if last or leaves or done % experiment.checkpoint_every == 0:
                    log.flush()
                    self.watch("checkpoint", done)
                    state = self.described(state)
                    checkpoints.save(state, log.record())
                if leaves:
                    checkpoints.finish()
                    raise Preempted(
                        f"told to leave: step {done} is saved, the same command goes on"
                    )
            self.watch("checkpoint", done)
            checkpoints.finish()
        return evaluation

    def watch(self, kind: str, done: int) -> None:
        """What comes next is `kind` of goodput, and the watchdog's time starts again."""
        self.goodput.to(kind)
        self.watchdog.beat(done, kind)

    def roll_back(
        self, fault: Diverged, reached: Progress, checkpoints: Checkpoints
    ) -> tuple[TrainState, Progress]:
        """The newest checkpoint's state, without the batches that led away from it.

        Raises:
          Diverged: the policy is to stop, or it was done too often.
        """
        guard = self.experiment.guard
        if not fault.rolls_back or reached.rollbacks >= guard.max_rollbacks:
            raise fault
        checkpoints.finish()
        state, progress = self.initial(checkpoints)
        left_out = range(fault.batch, fault.batch + guard.left_out)
        progress.left_out = sorted({*progress.left_out, *reached.left_out, *left_out})
        progress.rollbacks = reached.rollbacks + 1
        self.goodput.roll_back(progress.spent)
        self.say(
            f"{fault}: back to step {progress.step}, on without batches {left_out.start} to "
            f"{left_out.stop - 1}"
        )
        return state, progress

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
        self.watch("evaluation", step)
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
        self.watch("evaluation", step)
        videos = jax.device_get(self._preview(state, self.frozen, next(self._held_out())))
        if writer is not None:
            writer.write_videos(step, {"preview": to_uint8(videos[:8])})


def _shape(batch: PyTree) -> Shape:
    return tuple(sorted((k, tuple(v.shape)) for k, v in batch.items()))
