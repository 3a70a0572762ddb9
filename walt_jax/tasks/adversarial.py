"""The adversarial half of tokenizer training (MAGVIT-v2, 2310.05737).

A non-saturating GAN with R1 and LeCAM. Generator and discriminator step together: one scalar holds
the losses of both, each cut off from the other's parameters, so that one gradient serves both.
Everything here is float32.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from walt_jax.errors import UserError
from walt_jax.models.build import Network, Params
from walt_jax.models.discriminator import Discriminator, DiscriminatorConfig
from walt_jax.parallel import Layout

Stats = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """Weights of the adversarial losses; the defaults are MAGVIT-v2's.

    Attributes:
      generator_weight: weight of the generator's loss; the discriminator's own has weight 1.
      r1_weight: cost of the discriminator's squared gradients at real clips; 0 turns it off.
      r1_every: R1 is taken every so many steps, with as many times the weight; other steps do not
        pay for it.
      lecam_weight: weight of LeCAM.
      lecam_decay: decay of LeCAM's running means of the logits.
      start_step: steps before it leave both networks without adversarial gradients, at no cost
        (though the log's MFU counts what they will cost).
      discriminator: sizes.
    """

    generator_weight: float = 0.1
    r1_weight: float = 10.0
    r1_every: int = 1
    lecam_weight: float = 0.001
    lecam_decay: float = 0.999
    start_step: int = 0
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self) -> None:
        if self.r1_every < 1:
            raise UserError(
                f"The adversarial r1_every={self.r1_every} must be at least 1; r1_weight=0 turns "
                "R1 off."
            )


def generator_loss(fake: jax.Array) -> jax.Array:
    """The non-saturating loss -log(sigmoid(fake)) of logits (B,), a mean."""
    return jax.nn.softplus(-fake).mean()


def discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Cross entropy of logits (B,) of real and of generated clips, the two means added."""
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()


def r1_penalty(discriminate: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The mean over clips of |d logit / d clip|^2, summed over the clip and not halved.

    Args:
      discriminate: (B, ...) to logits (B,), each of its own clip alone.
      x: real clips.
    """
    return _r1(*jax.vjp(discriminate, x.astype(jnp.float32)))


def _r1(logits: jax.Array, pullback: Callable[[jax.Array], tuple[jax.Array]]) -> jax.Array:
    (gradient,) = pullback(jnp.ones_like(logits))
    return jnp.square(gradient).sum() / logits.shape[0]


def lecam_penalty(
    real: jax.Array, fake: jax.Array, ema_real: jax.Array, ema_fake: jax.Array
) -> jax.Array:
    """LeCAM (2104.03310): logits (B,) may not lie beyond the running mean of the other side's.

    Clip by clip, as in the public code of MAGVIT-v2; MAGVIT's compares the means of the batch.
    """
    real = jnp.square(jax.nn.relu(real - ema_fake)).mean()
    return real + jnp.square(jax.nn.relu(ema_real - fake)).mean()


def init_lecam() -> Stats:
    """The running means at the start of training: 0, where a fresh discriminator's logits lie."""
    return {"lecam_real": jnp.zeros((), jnp.float32), "lecam_fake": jnp.zeros((), jnp.float32)}


def update_lecam(ema: Stats, real: jax.Array, fake: jax.Array, decay: float) -> Stats:
    """The running means of the logits, this batch's (B,) included."""
    now = jax.lax.stop_gradient({"lecam_real": real.mean(), "lecam_fake": fake.mean()})
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, now)


def adversarial_losses(
    config: AdversarialConfig,
    network: Network[Discriminator],
    params: Params,
    x_real: jax.Array,
    x_fake: jax.Array,
    stats: Stats,
    step: jax.Array,
    layout: Layout = Layout(),  # noqa: B008
) -> tuple[jax.Array, dict[str, jax.Array], Stats]:
    """The adversarial losses of one joint step of generator and discriminator.

    The gradient of the loss is, at `params`, that of the discriminator's losses, and at `x_fake`
    that of the generator's. All terms share one pass over the real clips and one over the others.

    Args:
      config: weights.
      network: of `config.discriminator`.
      params: the discriminator's parameters.
      x_real: clips (B, T, H, W, 3) in [-1, 1].
      x_fake: their reconstructions, float32, not clipped.
      stats: as `init_lecam` gives.
      step: int32 ().
      layout: where activations lie on the mesh.

    Returns:
      The loss; scalars, unweighted, of which `r1` is 0 on steps without it, and all are 0 before
      the start; the next stats. LeCAM compares with the means of the steps before.
    """

    def losses() -> tuple[jax.Array, dict[str, jax.Array], Stats]:
        gathered = layout.gather(params, jnp.dtype(config.discriminator.dtype))

        def discriminate(params: Params, x: jax.Array) -> jax.Array:
            return network.bind(params)(x, layout)

        real, pullback = jax.vjp(lambda x: discriminate(gathered, x), x_real)
        fake, fake_of_clips = _part(discriminate)(gathered, x_fake)
        metrics = {
            "generator_adversarial": generator_loss(fake_of_clips),
            "discriminator": discriminator_loss(real, fake),
            "r1": _if_due(config, step, lambda: _r1(real, pullback)),
            "lecam": lecam_penalty(real, fake, stats["lecam_real"], stats["lecam_fake"]),
            "discriminator_accuracy_real": (real > 0).mean(dtype=jnp.float32),
            "discriminator_accuracy_fake": (fake < 0).mean(dtype=jnp.float32),
            "logit_real": real.mean(),
            "logit_fake": fake.mean(),
        }
        loss = (
            config.generator_weight * metrics["generator_adversarial"]
            + metrics["discriminator"]
            + config.r1_weight * config.r1_every * metrics["r1"]
            + config.lecam_weight * metrics["lecam"]
        )
        return loss, metrics, update_lecam(stats, real, fake, config.lecam_decay)

    def nothing() -> tuple[jax.Array, dict[str, jax.Array], Stats]:
        loss, metrics, _ = jax.eval_shape(losses)
        return *jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, metrics)), stats

    if not config.start_step:
        return losses()
    return jax.lax.cond(step >= config.start_step, losses, nothing)


def _part(
    discriminate: Callable[[Params, jax.Array], jax.Array],
) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]:
    """The same logits twice: the first passes gradients to the parameters only, the second to the
    clips only.

    As two passes with stop_gradient they would be computed twice where pixels lie on several
    devices: XLA does not merge equal halo exchanges.
    """

    @jax.custom_vjp
    def both(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = discriminate(params, x)
        return logits, logits

    def forward(params: Params, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Callable]:
        logits, pullback = jax.vjp(discriminate, params, x)
        return (logits, logits), pullback

    def backward(
        pullback: Callable, cotangents: tuple[jax.Array, jax.Array]
    ) -> tuple[Params, jax.Array]:
        to_params, to_clips = cotangents
        return pullback(to_params)[0], pullback(to_clips)[1]

    both.defvjp(forward, backward)
    return both


def _if_due(
    config: AdversarialConfig, step: jax.Array, penalty: Callable[[], jax.Array]
) -> jax.Array:
    """R1 on the steps that take it, else 0."""
    zero = jnp.zeros((), jnp.float32)
    if not config.r1_weight:
        return zero
    if config.r1_every == 1:
        return penalty()
    return jax.lax.cond(step % config.r1_every == 0, penalty, lambda: zero)
