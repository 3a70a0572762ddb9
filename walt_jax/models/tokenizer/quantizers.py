"""What stands between encoder and decoder: nothing, a Gaussian (KL) or signs (LFQ).

A quantizer has no parameters: it is a frozen dataclass of weights with pure functions of arrays,
chosen by `name` in a config. `h` is what the encoder emits, `z` what the decoder reads, both
float32 (B, t, h, w, channels).
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError

Metrics = dict[str, jax.Array]


class Quantizer(abc.ABC):
    """The interface of all quantizers."""

    registry: ClassVar[dict[str, type["Quantizer"]]] = {}

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Quantizer.registry[name] = cls

    def encoder_channels(self, latent_channels: int) -> int:
        """How many channels the encoder emits."""
        return latent_channels

    def num_codes(self, latent_channels: int) -> int | None:
        """The number of codes; None where latents are continuous."""
        del latent_channels

    @abc.abstractmethod
    def __call__(self, h: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """(..., encoder_channels) to (..., latent_channels), float32.

        Args:
          h: float32 (B, t, h, w, encoder_channels).
          key: (B,) keys, one a row, where noise is wanted; without them the result is the mode.
        """

    @abc.abstractmethod
    def losses(self, h: jax.Array, step: jax.Array | int) -> tuple[jax.Array, Metrics]:
        """The weighted loss and its parts before their weights, float32 scalars of the batch.

        `step` is the number of updates done, for weights that change.
        """


@dataclasses.dataclass(frozen=True)
class Identity(Quantizer, name="none"):
    """Continuous latents without a prior, as in W.A.L.T (2312.06662, section 3.1)."""

    def __call__(self, h: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return h

    def losses(self, h: jax.Array, step: jax.Array | int) -> tuple[jax.Array, Metrics]:
        return jnp.zeros((), jnp.float32), {}


@dataclasses.dataclass(frozen=True)
class Kl(Quantizer, name="kl"):
    """A diagonal Gaussian with a standard normal prior (latent diffusion, 2112.10752, appendix G).

    The encoder emits the means and then the log-variances, which are clamped to [-30, 20].

    The loss is `weight` times the KL divergence in nats, summed over a clip's latents (t, h, w, c)
    and averaged over the batch, the reduction of latent diffusion. There the reconstruction is
    summed over pixels too; beside a mean over P pixel values the same balance is `weight / P`.
    """

    weight: float = 1e-6

    def encoder_channels(self, latent_channels: int) -> int:
        return 2 * latent_channels

    def __call__(self, h: jax.Array, key: jax.Array | None = None) -> jax.Array:
        mean, log_variance = self._moments(h)
        if key is None:
            return mean
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:], jnp.float32))(key)
        return mean + jnp.exp(0.5 * log_variance) * noise

    def losses(self, h: jax.Array, step: jax.Array | int) -> tuple[jax.Array, Metrics]:
        mean, log_variance = self._moments(h)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        kl = kl.sum((1, 2, 3, 4)).mean()
        return self.weight * kl, {"kl": kl}

    @staticmethod
    def _moments(h: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_variance = jnp.split(h, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)


# Praxis adds this to the mean probability of a code before the logarithm.
_LOG_EPSILON = 1e-5
# Up to so many bits the codebook's entropy is that of all codes, beyond it is that of groups.
_MAX_JOINT_BITS, _GROUP_BITS = 18, 8


@dataclasses.dataclass(frozen=True)
class Lfq(Quantizer, name="lfq"):
    """Lookup-free quantization: each channel is a bit, its sign (2310.05737, section 3.1).

    z is +1 where h >= 0 and -1 elsewhere; the gradient of z by h is 1. The loss is

        commitment_weight * mean((sg(z) - h)^2) + w(step) * (E[H(p)] - H(E[p])),

    p the softmax of 2 <h, code> / temperature over all codes, E the mean over all tokens of the
    batch (of all devices). Definitions and scales are those of praxis'
    `layers/video/quantizer.py`.

    p is a product of independent bits, bit i being 1 with probability sigmoid(4 h_i / temperature).
    So E[H(p)] is the sum of the bits' entropies, exactly: the 1e-5 that praxis puts into its log
    softmax shifts every logit alike and cancels. And with the bits split in two halves of
    probabilities A and B, (N, 2^9) each, E[p] is A^T B / N: all 2^18 mean probabilities by one
    float32 matmul, never the (N, 2^18) softmax. The only error is float32's.

    H(E[p]) is -sum E[p] log(E[p] + 1e-5), as in praxis. That 1e-5 is no detail at 18 bits, where
    a code of a uniform codebook has a probability of 3.8e-6: the term then is 11.19 nats instead
    of 12.48. It bounds the pull towards unused codes.

    Above 18 bits H(E[p]) is estimated as in praxis' grouped form: the channels are cut into
    ceil(bits / 8) groups, once in runs and once in strides, and the entropies of the groups are
    averaged (not summed).

    w(step) = entropy_weight * (1 + anneal_factor * max(0, 1 - step / anneal_steps)) is the form of
    MAGVIT's trainer: from 0.4 down to 0.1. The paper's "annealing with factor 3" can also be read
    as from 0.3 down to 0.1: anneal_factor=2.

    Metrics of `losses`: `commitment`, `entropy_sample`, `entropy_codebook`, before weights; the
    entropies are in nats.
    """

    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    temperature: float = 0.01
    anneal_factor: float = 3.0
    anneal_steps: int = 2000

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.anneal_steps < 1:
            raise UserError(
                f"quantizer.temperature={self.temperature} and "
                f"quantizer.anneal_steps={self.anneal_steps} must be positive."
            )

    def encoder_channels(self, latent_channels: int) -> int:
        if not 2 <= latent_channels <= 31:
            raise UserError(
                f"latent_channels={latent_channels} does not fit the quantizer lfq: a code is an "
                "int32 of one bit a channel, so choose 2 to 31."
            )
        return latent_channels

    def num_codes(self, latent_channels: int) -> int:
        return 2**latent_channels

    def __call__(self, h: jax.Array, key: jax.Array | None = None) -> jax.Array:
        # The difference is exactly 0, so that z is exactly a sign.
        return _signs(h) + (h - jax.lax.stop_gradient(h))

    def losses(self, h: jax.Array, step: jax.Array | int) -> tuple[jax.Array, Metrics]:
        commitment = jnp.mean(jnp.square(_signs(h) - h))
        logits = (4.0 / self.temperature) * h
        sample, codebook = _sample_entropy(logits), _codebook_entropy(logits)
        ramp = jnp.maximum(0.0, 1.0 - jnp.asarray(step, jnp.float32) / self.anneal_steps)
        weight = self.entropy_weight * (1.0 + self.anneal_factor * ramp)
        loss = self.commitment_weight * commitment + weight * (sample - codebook)
        metrics = {
            "commitment": commitment,
            "entropy_sample": sample,
            "entropy_codebook": codebook,
        }
        return loss, metrics

    def codes(self, z: jax.Array) -> jax.Array:
        """Latents (..., c), or h, to int32 codes (...): bit i, of weight 2^i, is z_i >= 0."""
        weights = np.left_shift(1, np.arange(z.shape[-1], dtype=np.int32), dtype=np.int32)
        return jnp.sum((z >= 0) * weights, axis=-1, dtype=jnp.int32)

    def from_codes(self, codes: jax.Array, latent_channels: int) -> jax.Array:
        """int32 codes (...) to the latents float32 (..., latent_channels) that decode them."""
        bits = (codes[..., None] >> np.arange(latent_channels, dtype=np.int32)) & 1
        return 2.0 * bits.astype(jnp.float32) - 1.0


def _signs(h: jax.Array) -> jax.Array:
    return jnp.where(h >= 0, 1.0, -1.0).astype(jnp.float32)


def _sample_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the bits of a token, the mean over tokens."""
    size = jnp.abs(logits)  # the entropy is even; without large numbers that cancel
    return (jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)).sum(-1).mean()


def _codebook_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the mean distribution of codes; above 18 bits the mean of groups."""
    bits = logits.shape[-1]
    if bits <= _MAX_JOINT_BITS:
        return _joint_entropy(logits)
    groups = math.ceil(bits / _GROUP_BITS)
    runs = np.array_split(np.arange(bits), groups)
    strides = [np.arange(start, bits, groups) for start in range(groups)]
    return sum(_joint_entropy(logits[..., g]) for g in (*runs, *strides)) / (2 * groups)


def _joint_entropy(logits: jax.Array) -> jax.Array:
    half = logits.shape[-1] // 2
    low, high = _outcomes(logits[..., :half]), _outcomes(logits[..., half:])
    # Contracted over four axes, not one: merging them would gather a sharded batch.
    p = jnp.einsum("bthwi,bthwj->ij", low, high, precision=jax.lax.Precision.HIGHEST)
    p /= math.prod(logits.shape[:-1])
    return -jnp.sum(p * jnp.log(p + _LOG_EPSILON))


def _outcomes(logits: jax.Array) -> jax.Array:
    """Logits (..., k) of independent bits to probabilities (..., 2^k); bit i has weight 2^i."""
    k = logits.shape[-1]
    if k == 1:
        return jax.nn.sigmoid(jnp.concatenate([-logits, logits], axis=-1))
    # By halves again, so that the backward pass keeps little more than the last product.
    low, high = _outcomes(logits[..., : k // 2]), _outcomes(logits[..., k // 2 :])
    return (high[..., :, None] * low[..., None, :]).reshape(*logits.shape[:-1], 2**k)


def code_counts(codes: jax.Array, num_codes: int) -> jax.Array:
    """How often each code occurs: int32 codes of any shape to float32 (num_codes,)."""
    return jnp.bincount(codes.ravel(), length=num_codes).astype(jnp.float32)


def perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of counts (num_codes,): as many codes, evenly used, are as diverse."""
    p = counts / jnp.maximum(counts.sum(), 1e-10)
    return jnp.exp(jax.scipy.special.entr(p).sum())


def share_used(counts: jax.Array) -> jax.Array:
    """The share of codes that occur at all, in [0, 1]."""
    return jnp.mean(counts > 0, dtype=jnp.float32)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integer codes of any shape to ceil(size * bits / 8) bytes, uint8; low bits come first.

    Raises:
      UserError: a code needs more bits.
    """
    codes = np.asarray(codes).ravel()
    if codes.size and (codes.min() < 0 or codes.max() >> bits):
        raise UserError(
            f"Codes from {codes.min()} to {codes.max()} do not fit {bits} bits: pack them with "
            "the latent_channels of the tokenizer that made them."
        )
    flags = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(flags.astype(np.uint8), bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, shape: Sequence[int]) -> np.ndarray:
    """What `pack_codes` packed, as int32 of `shape`.

    Raises:
      UserError: the number of bytes is not that of the shape.
    """
    size = math.prod(shape)
    if packed.size != math.ceil(size * bits / 8):
        raise UserError(
            f"{packed.size} bytes are not the {size} codes of {bits} bits of shape {tuple(shape)}: "
            "give the shape and bits that they were packed with."
        )
    flags = np.unpackbits(packed, count=size * bits, bitorder="little").reshape(size, bits)
    return (
        (flags.astype(np.int32) << np.arange(bits, dtype=np.int32))
        .sum(-1, dtype=np.int32)
        .reshape(shape)
    )
