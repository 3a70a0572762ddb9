"""An experiment: everything that `configs/*.py` can say."""

import dataclasses

from walt_jax.data.pipeline import DataConfig
from walt_jax.errors import UserError
from walt_jax.parallel import MeshConfig
from walt_jax.tasks import Task
from walt_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of `walt_jax.train`.

    Attributes:
      task: what is trained; `task.name` chooses among the registered tasks.
      data: the dataset and how clips are cut from it.
      num_steps: updates.
      batch_size: clips an update, over all devices.
      seed: of the parameters, the noise and the order of the data.
      optimizer: AdamW and its schedule, the moving average.
      mesh: devices along each axis.
      log_every: updates between two lines of the log.
      eval_every: updates between two evaluations on held-out clips; also at the first and last.
      eval_batches: batches of an evaluation.
      preview_every: updates between two sets of videos in TensorBoard; 0 turns them off.
      checkpoint_every: updates between two checkpoints; also at the last.
      keep_checkpoints: the newest ones kept.
    """

    task: Task
    data: DataConfig
    num_steps: int
    batch_size: int
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 100
    eval_every: int = 1000
    eval_batches: int = 4
    preview_every: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "preview_every" else 1
            if isinstance(value, int) and field.name != "seed" and value < least:
                raise UserError(f"config.{field.name} must be at least {least}, got {value}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"config.seed must lie in [0, 2**32), got {self.seed}.")
