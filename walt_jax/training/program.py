"""The compiled part of a run: shapes of its state, where they lie, the step; no data or weights.

What the loop runs is what a benchmark prices for a pod that is not there.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from walt_jax.errors import UserError
from walt_jax.parallel import Layout, state_shardings
from walt_jax.parallel.compiler import compiler_options
from walt_jax.parallel.sharding import (
    batch_sharding,
    frozen_shardings,
    lying,
    on_host,
    place,
    replicated,
)
from walt_jax.training.experiment import Experiment
from walt_jax.training.flops import gradient_flops
from walt_jax.training.optimizers import make_optimizer, make_schedule
from walt_jax.training.state import TrainState, train_step

PyTree = Any


class Program:
    """An experiment on a mesh.

    Attributes:
      task, layout: of the experiment, of the mesh.
      shardings: of the state.
      abstract: the state as ShapeDtypeStructs with shardings.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh) -> None:
        """Traces the state; nothing is allocated.

        Raises:
          UserError: the mesh does not divide a batch.
        """
        shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], experiment.optimizer.accumulate
        per_step = f"the {shards} devices of the data and fsdp axes"
        per_step += f", times config.optimizer.accumulate={parts}" if parts > 1 else ""
        for name in ("batch_size", "image_batch_size"):
            if (size := getattr(experiment, name)) % (shards * parts):
                raise UserError(f"config.{name}={size} must be a multiple of {per_step}.")
        buckets = experiment.data.buckets
        for bucket in buckets.table if buckets else ():
            budget = buckets.batch_multiple if buckets.token_budget else experiment.batch_size
            if (bucket.batch_size or budget) % (shards * parts):
                raise UserError(
                    f"config.data.buckets: the batch_size of {bucket} (or batch_multiple, where a "
                    f"token_budget makes it) must be a multiple of {per_step}."
                )
        self.task, self.layout, self._mesh = experiment.task, Layout(mesh), mesh
        self._config = experiment.optimizer
        self._skips = experiment.guard.nonfinite == "skip"
        self._schedule = make_schedule(experiment.optimizer, experiment.num_steps)
        self._optimizer = make_optimizer(
            experiment.optimizer, experiment.num_steps, self.task.starts
        )
        self._create = functools.partial(TrainState.create, self.task, self._optimizer)
        shapes = jax.eval_shape(self._create, jax.random.key(0))
        self.shardings = self._on_devices = state_shardings(shapes, mesh)
        if self._config.offload:
            resting = on_host(self.shardings.opt_state, shapes.opt_state)
            self.shardings = dataclasses.replace(self.shardings, opt_state=resting)
        self.abstract = jax.tree.map(lying, shapes, self.shardings)

    def create(self, seed: jax.Array) -> TrainState:
        """A fresh state on the devices, with the sub-networks that the task is given."""
        create = jax.jit(
            lambda seed, given: self._create(jax.random.key(seed), given),
            out_shardings=self.shardings,
        )
        given = self.task.given_params()
        given = place(given, {name: self.shardings.params[name] for name in given})
        return create(seed, given)

    def lower(self, frozen: PyTree, shapes: dict[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """The training step (state, frozen, batch, seed) -> (state, metrics); the state is donated.

        Args:
          frozen: what the task needs beside its weights, arrays or ShapeDtypeStructs.
          shapes: of a batch.
        """
        step = functools.partial(
            train_step,
            task=self.task,
            optimizer=self._optimizer,
            config=self._config,
            schedule=self._schedule,
            layout=self.layout,
            skips_nonfinite=self._skips,
        )
        jitted = jax.jit(
            lambda state, frozen, batch, seed: step(
                self._fetch(state), frozen, batch, jax.random.key(seed)
            ),
            donate_argnums=0,
            out_shardings=(self.shardings, replicated(self._mesh)),
            compiler_options=compiler_options(self._mesh),
        )
        batch = {name: lying(x, batch_sharding(self._mesh)) for name, x in shapes.items()}
        seed = lying(np.zeros((), np.uint32), replicated(self._mesh))
        frozen = jax.tree.map(lying, frozen, frozen_shardings(frozen, self._mesh))
        return jitted.lower(self.abstract, frozen, batch, seed)

    def _fetch(self, state: TrainState) -> TrainState:
        """The state on the devices; each array comes when the update needs it."""
        if not self._config.offload:
            return state
        fetched = jax.device_put(state.opt_state, self._on_devices.opt_state)
        return dataclasses.replace(state, opt_state=fetched)

    def flops(self, frozen: PyTree, shapes: dict[str, jax.ShapeDtypeStruct]) -> float:
        """Model FLOPs of a step, forward and backward, recomputation left out."""
        task, state = self.task.plain(), self.abstract

        def loss(params: PyTree, extra: PyTree, frozen: PyTree, batch: PyTree) -> PyTree:
            key, step = jax.random.key(0), np.zeros((), np.int32)
            return task.loss(params, extra, frozen, batch, key, step, Layout())

        return gradient_flops(loss, state.params, state.extra, frozen, shapes)
