"""Training the tokenizer, here by reconstruction alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from walt_jax.data.records import Dataset
from walt_jax.errors import UserError
from walt_jax.models import Network, Tokenizer, TokenizerConfig
from walt_jax.parallel import Layout
from walt_jax.tasks.base import Batch, Metrics, PyTree, Task, to_unit


@dataclasses.dataclass(frozen=True)
class TokenizerTask(Task, name="tokenizer"):
    """Reconstruction by L2.

    Attributes:
      model: sizes.
      l2_weight: weight of the mean squared error over pixels in [-1, 1] (MAGVIT-v2: 5).
      moments_decay: decay of the running moments of the latents, from which encoding takes the
        mean and std of each channel.
    """

    model: TokenizerConfig = TokenizerConfig()
    l2_weight: float = 5.0
    moments_decay: float = 0.98

    @functools.cached_property
    def network(self) -> Network:
        return Network.of(lambda rngs: Tokenizer(self.model, rngs=rngs))

    def prepare(self, workdir: str, dataset: Dataset) -> PyTree:
        if dataset.metadata.get("kind") == "latents":
            raise UserError(
                f"{dataset.directory} holds latents: a tokenizer trains on prepared videos."
            )
        return {}

    def init_extra(self) -> PyTree:
        zeros = jnp.zeros((self.model.latent_channels,), jnp.float32)
        return {"latent_mean": zeros, "latent_square": zeros}

    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
        layout: Layout,
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        x, z, y = self._reconstruct(params, batch, layout)
        mse = jnp.mean(jnp.square(y - x))
        step = step.astype(jnp.float32)
        decay = jnp.minimum(self.moments_decay, step / (step + 1.0))  # a plain mean at first
        z = jax.lax.stop_gradient(z)
        now = {"latent_mean": z.mean((0, 1, 2, 3)), "latent_square": (z * z).mean((0, 1, 2, 3))}
        extra = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, extra, now)
        return self.l2_weight * mse, ({"mse": mse, "psnr_db": psnr(mse)}, extra)

    def evaluate(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> Metrics:
        x, _, y = self._reconstruct(params, batch, layout)
        error = jnp.square(jnp.clip(y, -1, 1) - x)
        return {"mse": error.mean((1, 2, 3, 4)), "psnr_db": psnr(error.mean((1, 2, 3, 4)))}

    def preview(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> jax.Array:
        x, _, y = self._reconstruct(params, batch, layout)
        return jnp.concatenate([x, jnp.clip(y, -1, 1)], axis=3)  # side by side

    def _reconstruct(
        self, params: PyTree, batch: Batch, layout: Layout
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = self.network.bind(layout.gather(params, jnp.dtype(self.model.dtype)))
        x = to_unit(batch["video"])
        z = model.encode(x, layout)
        return x, z, model.decode(z, layout)


def psnr(mse: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))
