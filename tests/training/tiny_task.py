"""A task of a few numbers, for tests of the loop around it: it compiles in no time."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from walt_jax.models import Network
from walt_jax.tasks import Task, to_unit


class Scale(nnx.Module):
    """What the task trains."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class TinyTask(Task, name="tiny"):
    """Predicts noisy colours: the loss depends on the params, the batch, the step and the seed.

    Attributes:
      width: of the one hidden layer.
      bad_steps: steps (of the state) at which the loss is NaN.
      bad_labels: labels of clips for which it is NaN.
    """

    width: int = 8
    bad_steps: tuple[int, ...] = ()
    bad_labels: tuple[int, ...] = ()

    @property
    def network(self):
        return Network.of(lambda rngs: Scale(self.width, rngs=rngs))

    def loss(self, params, extra, frozen, batch, key, step, layout):
        x = _colours(batch)
        noise = jax.random.normal(key, x.shape)
        model = self.network.bind(params)
        y = model.last(jnp.tanh(model.first(x + 0.1 * noise)))
        loss = jnp.square(y - 2 * x).mean()
        bad = jnp.isin(step, jnp.array(self.bad_steps, jnp.int32))
        bad |= jnp.isin(batch["label"], jnp.array(self.bad_labels, jnp.int32)).any()
        rows = (batch["label"] * (1 + jnp.arange(len(x)))).sum().astype(jnp.float32)
        return loss * jnp.where(bad, jnp.nan, 1.0), ({"rows": rows}, extra)

    def evaluate(self, params, extra, frozen, batch, key, layout):
        return {"mean": _colours(batch).mean(1)}

    def preview(self, params, extra, frozen, batch, key, layout):
        return to_unit(batch["video"])


def _colours(batch):
    """(B, 3) of videos or of latents of three channels."""
    x = batch["latents"].astype(jnp.float32) if "latents" in batch else to_unit(batch["video"])
    return x.mean((1, 2, 3))


def get_config(arg=""):
    """An experiment on prepared sprite videos, or on latents of three channels."""
    del arg
    config = ConfigDict()
    config.task = {"name": "tiny"}
    config.data = {"path": "", "sizes": ((8, 8),), "num_frames": 2, "fps": 4.0, "num_threads": 2}
    config.num_steps = 8
    config.batch_size = 2
    config.optimizer = {"learning_rate": 1e-2, "warmup_steps": 1, "ema_decay": 0.9}
    config.log_every = 1
    config.eval_every = 1000
    config.eval_batches = 1
    config.checkpoint_every = 2
    return config
