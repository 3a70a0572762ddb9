"""Training the denoiser: v-prediction on latents, of a frozen tokenizer or cached."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from walt_jax.data.records import Dataset
from walt_jax.diffusion import Constant, Ddim, Diffusion, Linear, guide, standard_normal
from walt_jax.errors import UserError
from walt_jax.models import Conditions, Denoiser, DenoiserConfig, Network
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import Layout
from walt_jax.tasks.base import Batch, Metrics, PyTree, Task, sample_keys, to_unit
from walt_jax.training.tokenizers import find_tokenizer, keep_tokenizer


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """The noise schedule (2312.06662, table 8): `num_timesteps` linear betas, zero terminal SNR."""

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = True


@dataclasses.dataclass(frozen=True)
class DenoiserTask(Task, name="denoiser"):
    """v-prediction with class conditioning.

    Attributes:
      tokenizer: workdir of the tokenizer's run.
      model: sizes; its grid must be that of the clips' latents.
      noise: the noise schedule.
      class_dropout: share of clips trained without their class, for classifier-free guidance.
      preview_steps: DDIM steps of the samples shown in TensorBoard.
    """

    tokenizer: str
    model: DenoiserConfig = DenoiserConfig()
    noise: NoiseConfig = NoiseConfig()
    class_dropout: float = 0.1
    preview_steps: int = 25

    @functools.cached_property
    def network(self) -> Network:
        return Network.of(lambda rngs: Denoiser(self.model, rngs=rngs))

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        """What is trained: v on the noise schedule."""
        return Diffusion(process=Linear(**dataclasses.asdict(self.noise)))

    def prepare(self, workdir: str, dataset: Dataset) -> FrozenTokenizer:
        tokenizer = find_tokenizer(self.tokenizer, workdir)
        cached = dataset.metadata.get("tokenizer_hash")
        if cached not in (None, tokenizer.hash):
            raise UserError(
                f"The latents in {dataset.directory} were made by tokenizer {cached}, but "
                f"{self.tokenizer} is {tokenizer.hash}: encode the videos again with it."
            )
        if self.model.latent_channels != tokenizer.config.latent_channels:
            raise UserError(
                f"config.task.model.latent_channels={self.model.latent_channels}, but the "
                f"tokenizer in {self.tokenizer} has {tokenizer.config.latent_channels}."
            )
        labels, classes = dataset.index["label"], self.model.num_classes
        if classes and not 0 <= labels.min() <= labels.max() < classes:
            raise UserError(
                f"{dataset.directory} has labels {labels.min()} to {labels.max()}, but "
                f"config.task.model.num_classes={classes} takes 0 to {classes - 1}: prepare it "
                "with --label-from-folder or --label-from-name, or change num_classes."
            )
        keep_tokenizer(tokenizer, workdir)
        return tokenizer

    def plain(self) -> "DenoiserTask":
        return dataclasses.replace(self, model=dataclasses.replace(self.model, remat=False))

    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: FrozenTokenizer,
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
        layout: Layout,
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        keys = sample_keys(key, batch["label"].shape[0])
        t = self.diffusion.process.draw_times(_fold(keys, 0))
        drop = jax.vmap(jax.random.uniform)(_fold(keys, 1)) < self.class_dropout
        label = jnp.where(drop, self.model.num_classes, batch["label"])
        loss_B = self._errors(params, frozen, batch, label, t, _fold(keys, 2), layout)
        return loss_B.mean(), ({}, extra)

    def evaluate(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: FrozenTokenizer,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> Metrics:
        """The loss at times spread evenly over the clips; every call draws the same noise."""
        rows = batch["label"].shape[0]
        t = jnp.asarray(self.diffusion.process.even_times(rows))
        keys = sample_keys(key, rows)
        return {
            "loss": self._errors(params, frozen, batch, batch["label"], t, keys, layout),
        }

    def preview(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: FrozenTokenizer,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> jax.Array:
        label = batch["label"][:8]
        keys = sample_keys(key, label.shape[0])
        return self.sample(params, frozen, label, keys, self.preview_steps, 1.0, layout)

    def sample(
        self,
        params: PyTree,
        frozen: FrozenTokenizer,
        label: jax.Array,
        keys: jax.Array,
        num_steps: int,
        guidance: float,
        layout: Layout = Layout(),  # noqa: B008
    ) -> jax.Array:
        """Videos of the given classes by DDIM.

        Args:
          params: the denoiser's weights.
          frozen: the tokenizer that decodes.
          label: int32 (B,), `num_classes` for no class.
          keys: (B,) keys, one a video: a video depends on its key and label only.
          num_steps: DDIM steps.
          guidance: scale of classifier-free guidance; 1 is none.
          layout: where activations lie on the mesh.

        Returns:
          float32 (B, T, H, W, 3) in [-1, 1].
        """
        shape = (*self.model.grid, self.model.latent_channels)
        guided = guide(
            lambda x, t, _, label: self._predict(params, x, t, label, layout),
            (jnp.full_like(label, self.model.num_classes), label),
            (Constant(guidance),),
            self.noise.num_timesteps,
        )
        noise = standard_normal(keys, shape)
        z = Ddim(num_steps=num_steps)(guided, noise, keys, self.diffusion)
        return frozen.decode(z, layout)

    def _predict(
        self, params: PyTree, x: jax.Array, t: jax.Array, label: jax.Array, layout: Layout
    ) -> jax.Array:
        conditions = Conditions(label=label if self.model.num_classes else None)
        return self.network.bind(params)(x, t, conditions, layout)

    def _errors(
        self,
        params: PyTree,
        frozen: FrozenTokenizer,
        batch: Batch,
        label: jax.Array,
        t: jax.Array,
        keys: jax.Array,
        layout: Layout,
    ) -> jax.Array:
        """Mean squared error of v for each clip, float32 (B,)."""
        if "latents" in batch:
            x0 = batch["latents"].astype(jnp.float32)
        else:
            x0 = jax.lax.stop_gradient(frozen.encode(to_unit(batch["video"]), layout))
        eps = standard_normal(keys, x0.shape[1:])
        x_t = self.diffusion.add_noise(x0, eps, t)
        v = self._predict(params, x_t, t, label, layout)
        return self.diffusion.losses(v, x0, eps, t)


def _fold(keys: jax.Array, data: int) -> jax.Array:
    return jax.vmap(lambda k: jax.random.fold_in(k, data))(keys)
