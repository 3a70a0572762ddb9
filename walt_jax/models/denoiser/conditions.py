"""What a denoiser is told beside the noisy latents, and how it enters the network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from walt_jax.errors import UserError
from walt_jax.models.denoiser.config import DenoiserConfig
from walt_jax.models.denoiser.layers import TimeEmbedding, layer_norm, linear, sinusoids
from walt_jax.models.denoiser.packing import Packing
from walt_jax.models.denoiser.patches import patchify, volume


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a denoiser is told; all arrays have the batch first, None is what it is not told.

    Attributes:
      label: int32 (B,), classes; `num_classes` for none.
      text: float (B, M, text_features), tokens of a text encoder; text_mask: bool (B, M), False
        where a token is padding, all False for no text; None where nothing is padding.
      given: (B, T, H, W, latent_channels), clean latents; given_mask: (B, T, H, W), 1 or True
        where they are given. Without them nothing is given.
      estimate: (B, T, H, W, latent_channels), an estimate of x_0 for self-conditioning; without it
        the network makes its first guess.
      low: (B, T, H, W, latent_channels), low-resolution latents after `Denoiser.upsample` and
        noise augmentation; low_time: (B,), the time of that noise.
      times: float or int (B, T), which of a long video's latent frames these are, 0 for its first;
        without them the first T.
    """

    label: jax.Array | None = None
    text: jax.Array | None = None
    text_mask: jax.Array | None = None
    given: jax.Array | None = None
    given_mask: jax.Array | None = None
    estimate: jax.Array | None = None
    low: jax.Array | None = None
    low_time: jax.Array | None = None
    times: jax.Array | None = None


def check(config: DenoiserConfig, conditions: Conditions, z: jax.Array) -> None:
    """Refuses latents of another shape, and conditions that the network lacks or cannot take.

    Raises:
      UserError: one sentence.
    """
    fits = {(*config.grid, config.latent_channels), (1, *config.grid[1:], config.latent_channels)}
    if config.patch_size[0] > 1:
        fits = {(*config.grid, config.latent_channels)}  # an image is less than a patch
    if config.any_size:
        _check_any_size(config, z)
    elif z.shape[1:] not in fits:
        raise UserError(
            f"Latents of shape {z.shape[1:]} do not fit this denoiser, which was built for "
            f"{' or '.join(map(str, sorted(fits, reverse=True)))}."
        )
    takes = {
        "label": (config.num_classes > 0, f"num_classes={config.num_classes}"),
        "text": (config.text_features > 0, f"text_features={config.text_features}"),
        "given": (config.given != "none", f"given={config.given!r}"),
        "estimate": (config.self_conditioning, f"self_conditioning={config.self_conditioning}"),
        "low": (config.upsampling is not None, f"upsampling={config.upsampling}"),
        "times": (config.frame_times, f"frame_times={config.frame_times}"),
    }
    for name, (built, why) in takes.items():
        there = getattr(conditions, name) is not None
        if there and not built:
            raise UserError(
                f"This denoiser takes no {name!r} condition, it was built with {why}: leave it out."
            )
        if built and not there and name not in ("given", "estimate", "times"):
            raise UserError(
                f"This denoiser needs the {name!r} condition, it was built with {why}: give it."
            )
    if conditions.text_mask is not None and conditions.text is None:
        raise UserError("The condition 'text_mask' comes without 'text': give both.")
    for first, second in (("given", "given_mask"), ("low", "low_time")):
        if (getattr(conditions, first) is None) != (getattr(conditions, second) is None):
            raise UserError(f"The conditions {first!r} and {second!r} go together: give both.")
    batch = z.shape[0]
    shapes = {
        "label": (batch,),
        "given": z.shape,
        "given_mask": z.shape[:-1],
        "estimate": z.shape,
        "low": z.shape,
        "low_time": (batch,),
        "times": z.shape[:2],
    }
    if conditions.text is not None:
        shapes["text"] = (batch, *conditions.text.shape[1:2], config.text_features)
        shapes["text_mask"] = shapes["text"][:2]
    for name, shape in shapes.items():
        value = getattr(conditions, name)
        if value is not None and value.shape != shape:
            raise UserError(
                f"The condition {name!r} has the shape {value.shape}, but with these latents it "
                f"must have {shape}."
            )


def _check_any_size(config: DenoiserConfig, z: jax.Array) -> None:
    *sizes, channels = z.shape[1:]
    fits = channels == config.latent_channels and len(sizes) == 3
    fits = fits and not any(n % p for n, p in zip(sizes, config.patch_size))
    if fits and (config.positions == "fractional" or np.all(np.array(sizes) <= config.grid)):
        return
    most = "" if config.positions == "fractional" else f" and at most {config.grid}"
    raise UserError(
        f"Latents of shape {z.shape[1:]} do not fit this denoiser, which takes (T, H, W, "
        f"{config.latent_channels}) with T, H, W multiples of {config.patch_size}{most}."
    )


def check_packed(
    config: DenoiserConfig, z: jax.Array, conditions: Conditions, packing: Packing
) -> None:
    """Refuses what cannot be packed.

    Raises:
      UserError: a network whose parts need a whole video, or arrays of other shapes; one sentence.
    """
    spans = any(window[0] != 1 for window in config.windows)
    wrong = {
        f"positions={config.positions!r}: make it 'factorised' or 'fractional'": (
            not config.any_size
        ),
        f"conditioning={config.conditioning!r}: modulate (adaln...) or add": config.conditioning
        in ("in_context", "cross_attention"),
        f"given={config.given!r}: make it 'channels' or 'in_place'": config.given
        not in ("none", "channels", "in_place"),
        "causal=True: make it False": config.causal,
        f"upsampling={config.upsampling}: make it None": config.upsampling is not None,
        "output_conv=True: make it False": config.output_conv,
        "image_identity=True, and blocks of one frame can be images: make it False": (
            config.image_identity and spans and packing.block[0] == 1
        ),
        f"relative_bias=True, and windows={config.windows} do not all lie within a block of "
        f"{packing.block} tokens or span the whole axis: make it False": config.relative_bias
        and not all(0 in window or packing.holds(window) for window in config.windows),
    }
    for what, found in wrong.items():
        if found:
            raise UserError(f"Packed videos do not go with config.task.model.{what}.")
    b, n = packing.segments.shape
    s = packing.extents.shape[1]
    block = tuple(size * patch for size, patch in zip(packing.block, config.patch_size))
    shapes = {
        "latents": (z, (b, n, *block, config.latent_channels)),
        "places": (packing.places, (b, n, 3)),
        "extents": (packing.extents, (b, s, 3)),
        "label": (conditions.label, (b, s)),
        "estimate": (conditions.estimate, z.shape),
        "given": (conditions.given, z.shape),
        "given_mask": (conditions.given_mask, z.shape[:-1]),
    }
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise UserError(f"Of packed videos {name!r} has the shape {shape}, not {array.shape}.")


def mask_given(z: jax.Array, conditions: Conditions) -> tuple[jax.Array, jax.Array]:
    """The given latents, 0 elsewhere, and their mask (B, T, H, W, 1), both like z."""
    if conditions.given is None:
        return jnp.zeros_like(z), jnp.zeros_like(z[..., :1])
    mask = conditions.given_mask.astype(z.dtype)[..., None]
    return conditions.given.astype(z.dtype) * mask, mask


class Embedder(nnx.Module):
    """Conditions to input channels, vectors and tokens."""

    def __init__(self, config: DenoiserConfig, rngs: nnx.Rngs) -> None:
        width, self.config = config.width, config
        dtype = jnp.dtype(config.dtype)
        self.num_sinusoids = 256 if config.time_mlp else width
        self.time = TimeEmbedding(width, self.num_sinusoids, rngs) if config.time_mlp else None
        self.class_embedding = (
            # As large as the time embedding that it is added to, so that classes differ from the
            # first step on.
            nnx.Param(
                jax.random.normal(rngs.params(), (config.num_classes + config.null_class, width))
            )
            if config.num_classes
            else None
        )
        self.text = (
            linear(config.text_features, width, dtype, rngs) if config.text_features else None
        )
        self.pooled = (
            linear(config.text_features, width, jnp.float32, rngs) if config.pooled_text else None
        )
        patch = volume(config.patch_size) * config.latent_channels
        apart = config.given in ("adaln", "cross_attention", "tokens")
        self.given = linear(patch, width, dtype, rngs) if apart else None

    def channels(self, z: jax.Array, conditions: Conditions) -> jax.Array:
        """The noisy latents with everything that is concatenated to them."""
        config, parts = self.config, [z]
        given, mask = mask_given(z, conditions)
        if config.given == "in_place":
            parts = [jnp.where(mask > 0, given, z)]
        if config.self_conditioning:
            parts.append(jnp.zeros_like(z) if conditions.estimate is None else conditions.estimate)
        if config.given == "channels":
            parts += [given, mask]
        if config.upsampling is not None:
            parts.append(conditions.low)
        return jnp.concatenate(parts, axis=-1)

    def vectors(self, t: jax.Array, conditions: Conditions) -> list[jax.Array]:
        """Time, class and pooled text, each float32 (B, D), of packed videos (B, S, D).

        The time of the low-resolution latents' noise has half of the sinusoids, so that the same
        Dense layers read both times: SR2's published size leaves no room for more.
        """
        times = [t] if conditions.low_time is None else [t, conditions.low_time]
        features = self.num_sinusoids // len(times)
        time = jnp.concatenate([sinusoids(x, features) for x in times], axis=-1)
        out = [time if self.time is None else self.time(time)]
        if conditions.label is not None:
            table, label = self.class_embedding[...], conditions.label
            # An index behind the table is filled: the vector of no class is 0.
            out.append(table.at[label].get(mode="fill", fill_value=0.0))
        if self.pooled is not None:
            text, mask = conditions.text.astype(jnp.float32), conditions.text_mask
            known = jnp.ones((*text.shape[:-1], 1)) if mask is None else mask[..., None]
            total = jnp.where(known > 0, text, 0.0).sum(-2)
            out.append(self.pooled(layer_norm(total / jnp.maximum(known.sum(-2), 1.0))))
        return out

    def given_tokens(self, z: jax.Array, conditions: Conditions) -> tuple[jax.Array, jax.Array]:
        """Tokens (B, T, H, W, D) of the given latents, and which are given at all, bool."""
        given, mask = mask_given(z, conditions)
        patch = self.config.patch_size
        return self.given(patchify(given, patch)), patchify(mask, patch).any(-1)


def channels_in(config: DenoiserConfig) -> int:
    """Channels that `Embedder.channels` gives."""
    copies = 1 + config.self_conditioning + (config.upsampling is not None)
    masked = config.latent_channels + 1 if config.given == "channels" else 0
    return copies * config.latent_channels + masked
