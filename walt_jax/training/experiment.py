"""An experiment: everything that `configs/*.py` can say."""

import dataclasses

from walt_jax.data.pipeline import DataConfig
from walt_jax.errors import UserError
from walt_jax.evaluation.evaluators import Evaluator
from walt_jax.parallel import MeshConfig
from walt_jax.tasks import Task
from walt_jax.training.guard import GuardConfig
from walt_jax.training.optimizers import OptimizerConfig
from walt_jax.training.profiling import ProfileConfig

_MAY_BE_0 = ("preview_every", "image_batch_size", "keep_checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of `walt_jax.train`.

    Attributes:
      task: what is trained; `task.name` chooses among the registered tasks.
      data: the dataset and how clips are cut from it.
      num_steps: updates.
      batch_size: clips an update, over all devices.
      images: a dataset whose frames join every batch as images; None for videos alone.
      image_batch_size: images an update, beside the clips.
      seed: of the parameters, the noise and the order of the data.
      optimizer: AdamW and its schedule, the moving average.
      mesh: devices along each axis.
      log_every: updates between two lines of the log.
      eval_every: updates between two evaluations on held-out clips; also at the first and last.
      eval_batches: batches of an evaluation.
      evaluators: scores of samples or reconstructions, each every so many updates and at the last;
        see docs/scores.md.
      preview_every: updates between two sets of videos in TensorBoard; 0 turns them off.
      checkpoint_every: updates between two checkpoints; also at the last.
      keep_checkpoints: the newest ones kept.
      keep_checkpoint_every: those of steps that it divides are kept too; 0 is none.
      guard: what is done about losses that are not finite or jump, and about hangs.
      profile: a window of steps that is profiled.
    """

    task: Task
    data: DataConfig
    num_steps: int
    batch_size: int
    images: DataConfig | None = None
    image_batch_size: int = 0
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 100
    eval_every: int = 1000
    eval_batches: int = 4
    evaluators: tuple[Evaluator, ...] = ()
    preview_every: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_checkpoint_every: int = 0
    guard: GuardConfig = GuardConfig()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name in _MAY_BE_0 else 1
            value = getattr(self, field.name)
            if isinstance(value, int) and field.name != "seed" and value < least:
                raise UserError(f"config.{field.name} must be at least {least}, got {value}.")
        if (self.images is None) == (self.image_batch_size > 0):
            raise UserError(
                "config.images and config.image_batch_size come together: set both or neither."
            )
        if self.images is not None and self.images.num_frames != 1:
            raise UserError(
                f"config.images.num_frames must be 1, got {self.images.num_frames}: images are "
                "clips of one frame."
            )
        if self.images is not None and self.data.packing is not None:
            raise UserError(
                "config.data.packing packs images with the videos: put their latents into the same "
                "dataset and set config.images to None."
            )
        for name in ("data", "images"):
            data = getattr(self, name)
            if self.task.text_encoder is not None and data is not None and data.caption_bytes:
                raise UserError(
                    f"config.{name}.caption_bytes is read by config.task.text.name='bytes' alone: "
                    "set it to 0."
                )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"config.seed must lie in [0, 2**32), got {self.seed}.")
