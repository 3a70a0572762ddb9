"""Training the tokenizer: reconstruction, perceptual and adversarial losses in one step."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from walt_jax.data.records import Dataset
from walt_jax.errors import UserError
from walt_jax.models import Network, Tokenizer, TokenizerConfig
from walt_jax.models.discriminator import Discriminator
from walt_jax.models.perceptual import Perceptual
from walt_jax.models.tokenizer.frozen import network
from walt_jax.models.tokenizer.inflation import How, inflate
from walt_jax.models.tokenizer.quantizers import code_counts, perplexity, share_used
from walt_jax.parallel import Layout
from walt_jax.tasks.adversarial import AdversarialConfig, adversarial_losses, init_lecam
from walt_jax.tasks.base import Batch, Metrics, PyTree, Task, images_of, sample_keys, to_unit
from walt_jax.training.tokenizers import load_tokenizer

DISCRIMINATOR = "discriminator"


@dataclasses.dataclass(frozen=True)
class TokenizerTask(Task, name="tokenizer"):
    """MAGVIT-v2's losses (2310.05737, appendix A); the parameters are those of all sub-networks.

    A batch may hold images beside its videos: they share all losses but the adversarial one, whose
    discriminator is built for the videos' size.

    Attributes:
      model: sizes.
      l2_weight: weight of the mean squared error over pixels in [-1, 1].
      perceptual: distance of frames by a published network; None turns it off.
      adversarial: the GAN, for clips of one size; None turns it off.
      init_from: workdir of a tokenizer to start from; a 2D one is inflated.
      inflation: where the taps of an inflated 2D kernel lie in time.
      counts_decay: decay of the running counts of codes.
    """

    keeps_statistics: ClassVar[bool] = True

    model: TokenizerConfig = TokenizerConfig()
    l2_weight: float = 5.0
    perceptual: Perceptual | None = None
    adversarial: AdversarialConfig | None = None
    init_from: str = ""
    inflation: How = "last"
    counts_decay: float = 0.98

    @property
    def network(self) -> Network:
        return network(self.model)

    @functools.cached_property
    def discriminator(self) -> Network[Discriminator]:
        """Structure of the discriminator; only where `adversarial` is set."""
        sizes = self.adversarial.discriminator
        return Network.of(lambda rngs: Discriminator(sizes, rngs=rngs))

    def init(self, key: jax.Array) -> PyTree:
        params = self.network.init(key)
        if self.adversarial is not None:
            params[DISCRIMINATOR] = self.discriminator.init(jax.random.fold_in(key, 1))
        return params

    def given_params(self) -> PyTree:
        if not self.init_from:
            return {}
        params = load_tokenizer(self.init_from).params
        return jax.device_get(inflate(params, self.network.shapes(), self.inflation))

    @property
    def starts(self) -> dict[str, int]:
        late = self.adversarial is not None and self.adversarial.start_step > 0
        return {DISCRIMINATOR: self.adversarial.start_step} if late else {}

    def prepare(self, workdir: str, *datasets: Dataset) -> PyTree:
        for dataset in datasets:
            if dataset.metadata.get("kind") == "latents":
                raise UserError(
                    f"{dataset.directory} holds latents: a tokenizer trains on prepared videos."
                )
        return {"perceptual": self.perceptual.load()} if self.perceptual is not None else {}

    def stand_in(self) -> PyTree:
        return {"perceptual": self.perceptual.shapes()} if self.perceptual is not None else {}

    def init_extra(self) -> PyTree:
        zeros = jnp.zeros((self.model.latent_channels,), jnp.float32)
        extra = {"latent_mean": zeros, "latent_square": zeros}
        if (codes := self._num_codes) is not None:
            extra["code_counts"] = jnp.zeros((codes,), jnp.float32)
        return extra | (init_lecam() if self.adversarial is not None else {})

    def plain(self) -> "TokenizerTask":
        gan = self.adversarial
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, remat=False),
            adversarial=gan and dataclasses.replace(gan, r1_weight=0.0),
        )

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
        x = to_unit(batch["video"])
        loss, metrics, z, y = self._reconstruction(params, frozen, x, key, step, layout)
        if images := images_of(batch):
            image = to_unit(images["video"])
            image_key = jax.random.fold_in(key, 1)
            image_loss, of_images, _, _ = self._reconstruction(
                params, frozen, image, image_key, step, layout
            )
            share = image.shape[0] / (image.shape[0] + x.shape[0])
            loss = (1.0 - share) * loss + share * image_loss
            metrics |= {f"image/{k}": v for k, v in of_images.items()}
        if "code_counts" in extra:
            extra = extra | {"code_counts": self._counts(extra["code_counts"], z, step)}
            # A use weighs 1 - decay and fades; counted are those of the last 1 / (1 - decay) steps.
            least = (1.0 - self.counts_decay) / math.e
            metrics["code_use"] = share_used(jax.nn.relu(extra["code_counts"] - least))
            metrics["code_perplexity"] = perplexity(extra["code_counts"])
        if self.adversarial is not None:
            stats = {k: extra[k] for k in init_lecam()}
            added, of_gan, stats = adversarial_losses(
                self.adversarial, self.discriminator, params[DISCRIMINATOR], x, y, stats, step,
                layout,
            )  # fmt: skip
            loss, metrics, extra = loss + added, metrics | of_gan, extra | stats
        return loss, (metrics, extra)

    def evaluate(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> Metrics:
        x = to_unit(batch["video"])
        y = jnp.clip(self._reconstruct(params, x, layout), -1, 1)
        of_frames = jnp.square(y - x).mean((2, 3, 4))
        frames = {f"psnr_db/frame_{t:02d}": psnr(e) for t, e in enumerate(of_frames.T)}
        mse = of_frames.mean(1)
        return {"mse": mse, "psnr_db": psnr(mse), **frames}

    def statistics(self, params: PyTree, batch: Batch, layout: Layout) -> PyTree:
        """The first two moments of the latents, from which encoding takes mean and std."""
        z = self._bind(params, layout).encode(to_unit(batch["video"]), layout)
        return {"latent_mean": z.mean((0, 1, 2, 3)), "latent_square": (z * z).mean((0, 1, 2, 3))}

    def preview(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        layout: Layout,
    ) -> jax.Array:
        x = to_unit(batch["video"])
        y = self._reconstruct(params, x, layout)
        return jnp.concatenate([x, jnp.clip(y, -1, 1)], axis=3)  # side by side

    @property
    def _num_codes(self) -> int | None:
        """Codes that are counted, at most 2^20; None where there are none or more."""
        codes = self.model.quantizer.num_codes(self.model.latent_channels)
        return codes if codes is not None and codes <= 2**20 else None

    def _bind(self, params: PyTree, layout: Layout) -> Tokenizer:
        tokenizer = {k: v for k, v in params.items() if k != DISCRIMINATOR}
        return self.network.bind(layout.gather(tokenizer, jnp.dtype(self.model.dtype)))

    def _reconstruct(self, params: PyTree, x: jax.Array, layout: Layout) -> jax.Array:
        model = self._bind(params, layout)
        return model.decode(model.encode(x, layout), layout)

    def _reconstruction(
        self,
        params: PyTree,
        frozen: PyTree,
        x: jax.Array,
        key: jax.Array,
        step: jax.Array,
        layout: Layout,
    ) -> tuple[jax.Array, Metrics, jax.Array, jax.Array]:
        """Loss and metrics of all but the GAN, the latents encoded, and the reconstruction."""
        model, quantizer = self._bind(params, layout), self.model.quantizer
        h = model.features(x, layout)
        z = quantizer(h, sample_keys(key, x.shape[0]))
        y = model.decode(z, layout)
        mse = jnp.mean(jnp.square(y - x))
        of_codes, metrics = quantizer.losses(h, step)
        loss = self.l2_weight * mse + of_codes
        metrics |= {"mse": mse, "psnr_db": psnr(mse)}
        if self.perceptual is not None:
            frames = (v.reshape(-1, *v.shape[2:]) for v in (x, y))
            with jax.named_scope("perceptual"):
                distance = self.perceptual.distance(frozen["perceptual"], *frames, layout).mean()
            loss, metrics["perceptual"] = loss + self.perceptual.weight * distance, distance
        return loss, metrics, quantizer(h), y  # as encoding gives them: without noise

    def _counts(self, counts: jax.Array, z: jax.Array, step: jax.Array) -> jax.Array:
        """Running counts of the codes; plain means at first."""
        step = step.astype(jnp.float32)
        decay = jnp.minimum(self.counts_decay, step / (step + 1.0))
        now = code_counts(self.model.quantizer.codes(z), self._num_codes)
        return decay * counts + (1.0 - decay) * now


def psnr(mse: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))
