"""Training and sampling the denoiser on latents, of a frozen tokenizer or cached."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from walt_jax.data.records import Dataset
from walt_jax.diffusion import Constant, Ddim, Diffusion, Sampler, Scale, guide, standard_normal
from walt_jax.errors import UserError
from walt_jax.models import Conditions, Denoiser, DenoiserConfig, Network
from walt_jax.models.named import tokenizer_like
from walt_jax.models.text import ByteEncoder, FrozenText, FrozenTextConfig, TextConfig
from walt_jax.models.tokenizer.frozen import FrozenTokenizer
from walt_jax.parallel import Layout
from walt_jax.tasks import captions, packed
from walt_jax.tasks.base import (
    Batch,
    Metrics,
    PyTree,
    Task,
    fold,
    images_of,
    sample_keys,
    shrink,
    to_unit,
    uniform,
)
from walt_jax.tasks.consistent import check
from walt_jax.tasks.frames import FramesConfig, pick_frames
from walt_jax.tasks.frozen import Frozen, check_dataset
from walt_jax.tasks.given import GivenConfig, Grid, draw_masks
from walt_jax.tasks.wanted import Wanted
from walt_jax.training.denoisers import TEXT, start_from, without_text
from walt_jax.training.texts import find_text, keep_text
from walt_jax.training.tokenizers import find_tokenizer, keep_tokenizer

NONE = Constant(1.0)
_APART = 2**30  # a tag of random draws beyond all rows and steps


@dataclasses.dataclass(frozen=True)
class DenoiserTask(Task, name="denoiser"):
    """Denoising diffusion on latents (2312.06662, section 3).

    A batch may hold images beside its videos, as pixels or latents. They are clips of one frame, of
    which nothing is given, in a call of their own; the loss is the mean over videos and images.

    Attributes:
      tokenizer: workdir of the tokenizer's run.
      model: sizes; its grid must be that of the clips' latents.
      diffusion: process, target and weight.
      self_conditioning: p_sc, the share of clips that are told an estimate of x_0, made by the
        network itself in a first call; where the model takes one.
      class_dropout: share of clips trained without their class, for classifier-free guidance.
      text: the text encoder, where the model reads text: over bytes, trained jointly, or a
        published one.
      text_dropout: share of clips trained without their caption, likewise.
      given: which latents training gives, where the model takes given ones. They count in no loss.
      frames: which of a long clip's latent frames, and which of them given, where the model is told
        their times; `given` is then left alone.
      low_noise: largest time of the noise on low-resolution latents, as a share of the process's;
        W.A.L.T's t_max_noise is not published.
      init_from: workdir of a denoiser's run to start from, on another grid, or of images.
      sampler, guidance: of the samples shown in TensorBoard.
    """

    tokenizer: str
    model: DenoiserConfig = DenoiserConfig()
    diffusion: Diffusion = Diffusion()
    self_conditioning: float = 0.9
    class_dropout: float = 0.1
    text: TextConfig | None = None
    text_dropout: float = 0.1
    given: GivenConfig = GivenConfig()
    frames: FramesConfig = FramesConfig()
    low_noise: float = 0.25
    init_from: str = ""
    sampler: Sampler = Ddim(num_steps=25)
    guidance: Scale = NONE

    def __post_init__(self) -> None:
        check(self)

    @functools.cached_property
    def network(self) -> Network[Denoiser]:
        return Network.of(lambda rngs: Denoiser(self.model, rngs=rngs))

    @functools.cached_property
    def text_network(self) -> Network[ByteEncoder]:
        """Structure of the text encoder; only where one is trained."""
        return Network.of(lambda rngs: ByteEncoder(self.text, rngs=rngs))

    @property
    def text_encoder(self) -> FrozenTextConfig | None:
        return None if self.text is None or self.text.trained else self.text

    def init(self, key: jax.Array) -> PyTree:
        params = self.network.init(key)
        if self.text is not None and self.text.trained:
            params[TEXT] = self.text_network.init(jax.random.fold_in(key, 1))
        return params

    def given_params(self) -> PyTree:
        if not self.init_from:
            return {}
        return start_from(self.init_from, self.model, self.network, self.text)

    def prepare(self, workdir: str, *datasets: Dataset) -> Frozen:
        tokenizer = find_tokenizer(self.tokenizer, workdir)
        if self.model.latent_channels != tokenizer.config.latent_channels:
            raise UserError(
                f"config.task.model.latent_channels={self.model.latent_channels}, but the "
                f"tokenizer in {self.tokenizer} has {tokenizer.config.latent_channels}."
            )
        for dataset in datasets:
            check_dataset(dataset, tokenizer, self.tokenizer, self.model)
        if self.text_encoder is None:
            return Frozen(tokenizer)
        return Frozen(tokenizer, *find_text(self.text, workdir, datasets))

    def stand_in(self) -> Frozen:
        """Of W.A.L.T's tokenizer: which one a run has is known where its folder is.

        A run on cached latents has its text cached too.
        """
        like = tokenizer_like(self.model.latent_channels, images=self.model.grid[0] == 1)
        tokenizer = FrozenTokenizer.abstract(like)
        runs = self.text_encoder is not None and self.model.upsampling is not None
        return Frozen(tokenizer, FrozenText.abstract(self.text) if runs else None)

    def keep(self, frozen: Frozen, workdir: str) -> None:
        keep_tokenizer(frozen.tokenizer, workdir)
        if self.text_encoder is not None:
            keep_text(self.text, frozen.text_hash, workdir)

    def plain(self) -> "DenoiserTask":
        plain = {"remat": False, "kept": (), "offloaded": (), "attention": "xla"}
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **plain))

    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: Frozen,
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
        layout: Layout,
    ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        if packed.is_packed(batch):
            loss, metrics = packed.loss(self, params, frozen, batch, key, layout)
            return loss, (metrics, extra)
        loss, metrics = self._losses(params, frozen, batch, key, layout).mean(), {}
        if images := images_of(batch):
            key = jax.random.fold_in(key, _APART)
            of_images = self._losses(params, frozen, images, key, layout).mean()
            metrics = {"loss/videos": loss, "loss/images": of_images}
            share = images["label"].shape[0] / (images["label"].shape[0] + batch["label"].shape[0])
            loss = (1.0 - share) * loss + share * of_images
        return loss, (metrics, extra)

    def _losses(
        self, params: PyTree, frozen: Frozen, batch: Batch, key: jax.Array, layout: Layout
    ) -> jax.Array:
        """The loss of each clip, float32 (B,), at random times and with conditions left out."""
        keys = sample_keys(key, batch["label"].shape[0])
        t = self.diffusion.process.draw_times(fold(keys, 0))
        x0, wanted = self._data(frozen, batch, keys, layout)
        if wanted.label is not None:
            drop = uniform(keys, 1) < self.class_dropout
            label = jnp.where(drop, self.model.num_classes, wanted.label)
            wanted = dataclasses.replace(wanted, label=label)
        if wanted.text is not None:
            drop = uniform(keys, 3) < self.text_dropout
            wanted = dataclasses.replace(wanted, text=captions.without(wanted.text, drop))
        told = uniform(keys, 5) < self.self_conditioning
        low = self.low_noise * uniform(keys, 6)
        return self._errors(params, x0, wanted, t, fold(keys, 2), told, low, layout)

    def evaluate(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: Frozen,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> Metrics:
        """The loss at times spread evenly over the clips, told all; every call draws the same."""
        if packed.is_packed(batch):
            return packed.evaluate(self, params, frozen, batch, key, layout)
        rows = batch["label"].shape[0]
        t = jnp.asarray(self.diffusion.process.even_times(rows))
        keys = sample_keys(key, rows)
        x0, wanted = self._data(frozen, batch, keys, layout)
        told, low = jnp.ones(rows, bool), jnp.full(rows, 0.5 * self.low_noise)
        errors = self._errors(params, x0, wanted, t, fold(keys, 2), told, low, layout)
        return {"loss": errors}

    def preview(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: Frozen,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> jax.Array:
        batch = {name: array[:8] for name, array in batch.items()}
        keys = sample_keys(key, batch["label"].shape[0])
        if packed.is_packed(batch):
            batch = packed.first_videos(batch)
        _, wanted = self._data(frozen, batch, keys, layout)
        return self.sample(
            params, frozen.tokenizer, wanted, keys, self.sampler, self.guidance, layout=layout
        )

    def sample(
        self,
        params: PyTree,
        tokenizer: FrozenTokenizer,
        wanted: Wanted,
        keys: jax.Array,
        sampler: Sampler,
        guidance: Scale = NONE,
        *,
        given_guidance: Scale = NONE,
        low_noise: float | None = None,
        grid: Grid | None = None,
        strength: float = 1.0,
        decode: bool = True,
        layout: Layout = Layout(),  # noqa: B008
    ) -> jax.Array:
        """Videos of what is wanted.

        Args:
          params: the denoiser's weights.
          tokenizer: decodes.
          wanted: of each video.
          keys: (B,) keys, one a video: a video depends on its key and what is wanted only.
          sampler: of `diffusion`.
          guidance: strength of classifier-free guidance by class and text; 1 is none.
          given_guidance: by the given latents, likewise.
          low_noise: time of the noise on the low-resolution latents, a share of the process's;
            by default 0.05, or what training had at most.
          grid: (T, H, W) of the latents, by default the model's; one frame makes an image.
          strength: with `wanted.start`, the share of the process's time to start from.
          decode: give pixels, not latents.
          layout: where activations lie on the mesh.

        Returns:
          float32 (B, T, H, W, 3) in [-1, 1]; without `decode` latents (B, t, h, w, C).

        Raises:
          UserError: `wanted` or the grid is not what the model was built for.
        """
        grid = grid or self.model.grid
        wanted.check(self.model, grid)
        noise = standard_normal(keys, (*grid, self.model.latent_channels))
        share = jnp.full(
            keys.shape[0], min(0.05, self.low_noise) if low_noise is None else low_noise
        )
        said, scales = wanted.steps(self.model.num_classes, guidance, given_guidance)
        told = [self._conditions(params, w, keys, share) for w in said]

        def predict(
            x: jax.Array, t: jax.Array, estimate: jax.Array, conditions: Conditions
        ) -> jax.Array:
            if self.model.self_conditioning:
                conditions = dataclasses.replace(conditions, estimate=estimate)
            return self._predict(params, x, t, conditions, layout)

        guided = guide(
            predict,
            told,
            scales,
            self.diffusion.process.num_timesteps,
            channels=self.model.latent_channels if self.model.learned_sigma else None,
        )

        def placed(x: jax.Array, t: jax.Array, estimate: jax.Array) -> jax.Array:
            """With the given latents where they are given, as noisy as in training."""
            if wanted.given is not None:
                mask = wanted.given_mask[..., None]
                x = jnp.where(mask, self.diffusion.add_noise(wanted.given, noise, t), x)
                estimate = jnp.where(mask, wanted.given, estimate)
            return guided(x, t, estimate)

        z = sampler(placed, noise, keys, self.diffusion, wanted.start, strength)
        if wanted.given is not None:
            z = jnp.where(wanted.given_mask[..., None], wanted.given, z)
        return tokenizer.decode(z, layout) if decode else z

    def _data(
        self, frozen: Frozen, batch: Batch, keys: jax.Array, layout: Layout
    ) -> tuple[jax.Array, Wanted]:
        """Latents of a batch, float32, and all that can be said of them."""
        model = self.model
        if "latents" in batch:
            x0 = batch["latents"].astype(jnp.float32)
        else:
            x0 = jax.lax.stop_gradient(frozen.tokenizer.encode(to_unit(batch["video"]), layout))
        given = mask = low = times = None
        if model.frame_times and x0.shape[1] > 1:
            x0, times, mask = pick_frames(self.frames, fold(keys, 7), x0, model.grid[0])
            given, mask = x0, jnp.broadcast_to(mask[..., None, None], x0.shape[:-1])
        elif model.given != "none" and (
            x0.shape[1] == model.grid[0] or (model.any_size and x0.shape[1] > 1)
        ):  # no image beside videos
            given, mask = x0, draw_masks(self.given, fold(keys, 4), x0.shape[1:4])
        if model.upsampling is not None:
            small = shrink(to_unit(batch["video"]), model.upsampling)
            low = jax.lax.stop_gradient(frozen.tokenizer.encode(small, layout))
        return x0, Wanted(
            label=batch["label"] if model.num_classes else None,
            text=captions.of_batch(self, frozen, batch, layout) if model.text_features else None,
            given=given,
            given_mask=mask,
            low=low,
            times=times,
        )

    def _conditions(
        self, params: PyTree, wanted: Wanted, keys: jax.Array, low_noise: jax.Array
    ) -> Conditions:
        """What the network is told; `low_noise` (B,) is the share of time of the noise on `low`."""
        text = mask = low = low_time = None
        if wanted.text is not None:
            text, mask = captions.read(self, params, wanted.text)
        if wanted.low is not None:
            process = self.diffusion.process
            low_time = low_noise * (process.num_timesteps - 1)
            low_time = low_time.astype(jnp.int32) if process.discrete else low_time
            low = self.network.bind(without_text(params)).upsample(wanted.low)
            eps = standard_normal(fold(keys, _APART), low.shape[1:])
            low = self.diffusion.add_noise(low, eps, low_time)
        return Conditions(
            label=wanted.label,
            text=text,
            text_mask=mask,
            given=wanted.given,
            given_mask=wanted.given_mask,
            low=low,
            low_time=low_time,
            times=wanted.times,
        )

    def _predict(
        self, params: PyTree, x: jax.Array, t: jax.Array, conditions: Conditions, layout: Layout
    ) -> jax.Array:
        return self.network.bind(without_text(params))(x, t, conditions, layout)

    def _errors(
        self,
        params: PyTree,
        x0: jax.Array,
        wanted: Wanted,
        t: jax.Array,
        keys: jax.Array,
        told: jax.Array,
        low_noise: jax.Array,
        layout: Layout,
    ) -> jax.Array:
        """The loss of each clip; `told` bool (B,), which are told the network's own estimate."""
        eps = standard_normal(keys, x0.shape[1:])
        x_t = self.diffusion.add_noise(x0, eps, t)
        conditions = self._conditions(params, wanted, keys, low_noise)
        if self.model.self_conditioning and self.self_conditioning > 0:
            fixed = jax.lax.stop_gradient((params, conditions))
            guess = self._predict(fixed[0], x_t, t, fixed[1], layout)
            estimate = self.diffusion.read(guess, x_t, t).x0
            if wanted.given is not None:
                estimate = jnp.where(wanted.given_mask[..., None], wanted.given, estimate)
            estimate = jnp.where(told[:, None, None, None, None], estimate, 0.0)
            conditions = dataclasses.replace(conditions, estimate=estimate)
        out = self._predict(params, x_t, t, conditions, layout)
        counts = None if wanted.given_mask is None else ~wanted.given_mask[..., None]
        return self.diffusion.losses(out, x0, eps, t, counts)
