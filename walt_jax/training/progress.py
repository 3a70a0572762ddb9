"""What a run has done so far, kept beside its state."""

import dataclasses


@dataclasses.dataclass
class Progress:
    """Data position, rng and accounting of a run, JSON-ready.

    Attributes:
      step: updates done.
      next_batch: index of the next batch; with the seed, the whole position in the data. It differs
        from `step` where batches were left out.
      left_out: indices of batches that are not trained on, after a roll-back.
      rollbacks: how often the run went back to a checkpoint because it diverged.
      losses: of the latest steps, by which a spike is told.
      seed: of the data's order and the noise; rng: the generator of JAX's keys.
      fingerprint: of the dataset.
      clips: clips trained on.
      seconds: wall time in the loop; core_seconds: that times the number of devices.
      flops: model FLOPs over all devices; with `core_seconds` and the chip's peak, the MFU.
      spent: wall seconds by what they went to (`goodput.KINDS`), over all attempts.
      saved_at: Unix time of this record.
    """

    step: int = 0
    next_batch: int = 0
    left_out: list[int] = dataclasses.field(default_factory=list)
    rollbacks: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seed: int = 0
    rng: str = ""
    fingerprint: str = ""
    clips: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    flops: float = 0.0
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    saved_at: float = 0.0
