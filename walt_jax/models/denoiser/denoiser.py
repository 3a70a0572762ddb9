"""The denoiser: a list of attention windows and a way of conditioning (2312.06662, section 3.2)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from walt_jax.models.build import stack
from walt_jax.models.denoiser.block import Context, Group, num_vectors
from walt_jax.models.denoiser.conditions import (
    Conditions,
    Embedder,
    channels_in,
    check,
    check_packed,
)
from walt_jax.models.denoiser.config import DenoiserConfig
from walt_jax.models.denoiser.layers import (
    Affine,
    AxisEmbedding,
    FrameTimes,
    layer_norm,
    linear,
    modulate,
)
from walt_jax.models.denoiser.packing import Packing, from_row, to_row, whole
from walt_jax.models.denoiser.patches import (
    depth_to_space,
    patchify,
    sincos,
    sincos_frame,
    unpatchify,
    volume,
)
from walt_jax.parallel import Layout


class Denoiser(nnx.Module):
    """Predicts the diffusion target from noisy latents, time and conditions.

    Layers are stacked in groups of equal ones and scanned over, recomputed in the backward pass.
    """

    def __init__(self, config: DenoiserConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        t, h, w = config.tokens
        patch, channels = volume(config.patch_size), config.latent_channels
        table = nnx.initializers.normal(0.02)
        learned = config.positions == "learned"
        self.patch_in = linear(patch * channels_in(config), width, dtype, rngs)
        self.spatial_embedding = (
            nnx.Param(table(rngs.params(), (h * w, width))) if learned else None
        )
        self.temporal_embedding = (
            nnx.Param(table(rngs.params(), (t, width)))
            if config.positions in ("learned", "sincos_space") and t > 1 and not config.frame_times
            else None
        )
        self.frame_times = FrameTimes(width, rngs) if config.frame_times else None
        fractional = config.positions == "fractional"
        self.axes = (
            nnx.List([AxisEmbedding(n, width, fractional=fractional, rngs=rngs) for n in (t, h, w)])
            if config.any_size
            else None
        )
        self.embed = Embedder(config, rngs)
        self.token_embedding = (
            nnx.Param(table(rngs.params(), (_num_vector_tokens(config), width)))
            if learned and config.conditioning == "in_context"
            else None
        )
        shares = config.conditioning in ("adaln_lora", "adaln_single")
        self.adaln = (
            linear(width, num_vectors(config) * width, jnp.float32, rngs, zero=True)
            if shares
            else None
        )
        self.stages = nnx.List(
            [
                stack(lambda r, s=stage: Group(config, s, r), stage.repeats, rngs)
                for stage in config.stages
            ]
        )
        single = config.conditioning == "adaln_single"
        self.adaln_out = (
            linear(width, 2 * width, jnp.float32, rngs, zero=True)
            if config.modulated and not single
            else None
        )
        self.table_out = (
            nnx.Param(jax.random.normal(rngs.params(), (2 * width,)) * width**-0.5)
            if single
            else None
        )
        self.norm_out = None if config.modulated else Affine(width, rngs)
        channels_out = channels * (2 if config.learned_sigma else 1)
        self.patch_out = linear(width, patch * channels_out, jnp.float32, rngs, zero=True)
        self.conv_out = (
            _frame_conv(channels_out, channels_out, rngs) if config.output_conv else None
        )
        self.conv_up = (
            _frame_conv(channels, channels * volume(config.upsampling), rngs)
            if config.upsampling
            else None
        )

    def __call__(
        self,
        z: jax.Array,
        t: jax.Array,
        conditions: Conditions = Conditions(),  # noqa: B008
        layout: Layout = Layout(),  # noqa: B008
        packing: Packing | None = None,
    ) -> jax.Array:
        """One evaluation of the network.

        Args:
          z: noisy latents (B, T, H, W, latent_channels) on the config's grid, or images of T = 1;
            with the positions of any size on any grid. Packed: (B, N, t, h, w, latent_channels), N
            blocks a row.
          t: timesteps (B,), 0 (clean) to the schedule's length - 1 (noise). Packed: (B, S).
          conditions: what the network is told. Packed: arrays have (B, S) where they had (B,), and
            `estimate` and `given` are like z, `given_mask` without the channels.
          layout: where activations lie on the mesh.
          packing: which video each block belongs to, for rows of packed videos.

        Returns:
          float32 like z, twice the channels with learned_sigma; anything in padding.

        Raises:
          UserError: latents of another shape, a condition that is lacking or that the network was
            not built for.
        """
        with jax.named_scope("embed"):
            if packing is None:
                check(self.config, conditions, z)
                inputs = self.embed.channels(z, conditions)
            else:
                check_packed(self.config, z, conditions, packing)
                inputs = to_row(self.embed.channels(z, conditions))
            patches = patchify(inputs, self.config.patch_size)
            x = self._add_positions(self.patch_in(patches), conditions.times, packing)
            b, frames, rows, columns, _ = x.shape
            x, context = self._tell(x, z, t, conditions, packing)
        x = self._layers(layout.tokens(x), context, layout)
        if self.config.conditioning == "in_context":
            x = x[:, -frames * rows * columns :].reshape(b, frames, rows, columns, -1)
        with jax.named_scope("read_out"):
            out = self._read_out(x[:, :frames], context)
        return out if packing is None else from_row(out, z.shape[1])

    @jax.named_scope("upsample")
    def upsample(self, low: jax.Array) -> jax.Array:
        """Low-resolution latents (B, T, h, w, C) on the grid, by convolution and depth to space.

        Noise augmentation comes between this and the `low` of `Conditions`.
        """
        return depth_to_space(_by_frame(self.conv_up, low), self.config.upsampling)

    @jax.named_scope("embed")
    def _tell(
        self,
        x: jax.Array,
        z: jax.Array,
        t: jax.Array,
        conditions: Conditions,
        packing: Packing | None,
    ) -> tuple[jax.Array, Context]:
        """The tokens with those that stand beside the grid's, and what all layers are given."""
        config, vectors = self.config, self.embed.vectors(t, conditions)
        frames = x.shape[1]
        image = frames == 1 if config.any_size else frames < config.tokens[0]
        image = image and packing is None and config.tokens[0] > 1
        memory, segment_ids = [], None
        if config.given in ("adaln", "cross_attention", "tokens"):
            given, known = self.embed.given_tokens(z, conditions)
            given = self._add_positions(given, conditions.times)
            if config.given == "adaln":
                vectors.append(_masked_mean(given, known))
            elif config.given == "cross_attention":
                memory.append((_flat(given), _flat(known)))
            else:
                x = jnp.concatenate([x, given.astype(x.dtype)], axis=1)
                # What is not given sees itself alone, and no other token sees it.
                alone = 1 + jnp.arange(known[0].size).reshape(known.shape[1:])
                ids = jnp.where(known, 0, alone)
                segment_ids = jnp.concatenate([jnp.zeros_like(ids), ids], axis=1)
        if config.text_features:
            text, mask = self.embed.text(conditions.text), conditions.text_mask
            if packing is not None:
                text, mask = packing.flat(text), packing.of_own(text.shape[2], mask)
            memory.append((text, mask))
        condition, tokens = sum(vectors[1:], vectors[0]), jnp.stack(vectors, axis=1)
        if config.conditioning == "cross_attention":
            memory.append((tokens, None))
        if config.conditioning == "added":
            where = Context(condition, packing=packing)
            x = x + where.over(x, condition.astype(x.dtype))
        if config.conditioning == "in_context":
            if self.token_embedding is not None:
                tokens = tokens + self.token_embedding[...]
            x = jnp.concatenate([tokens.astype(x.dtype), _flat(x)], axis=1)[:, :, None, None]
            image = False  # a sequence now, read as a whole
        shared = None if self.adaln is None else self.adaln(nnx.silu(condition))
        memory = _join(memory, x.dtype)
        return x, Context(condition, shared, *memory, segment_ids, image, packing)

    def _add_positions(
        self, x: jax.Array, times: jax.Array | None, packing: Packing | None = None
    ) -> jax.Array:
        """Adds the places' embeddings; an image has the first frame's."""
        frames, rows, columns, width = x.shape[1:]
        if self.axes is not None:
            packing = packing or whole(x.shape[1:4])
            parts = []
            for axis, embedding in enumerate(self.axes):
                extents = packing.of_blocks(packing.extents)[..., axis]
                part = embedding(packing.places_of_tokens(axis), extents)
                parts.append(jnp.expand_dims(part, [2 + i for i in range(3) if i != axis]))
            return x + to_row(sum(parts[1:], parts[0])).astype(x.dtype)
        if self.spatial_embedding is not None:
            places = self.spatial_embedding[...]
        else:
            places = jnp.asarray(sincos_frame(rows, columns, width))
        places = places.reshape(1, rows, columns, width)
        if self.frame_times is not None:
            times = jnp.arange(frames)[None] if times is None else times
            places = places + self.frame_times(times)[:, :, None, None]
        elif self.temporal_embedding is not None:
            places = places + self.temporal_embedding[...][:frames, None, None]
        elif self.config.tokens[0] > 1:
            places = places + jnp.asarray(sincos(np.arange(frames), width))[:, None, None]
        return x + places.astype(x.dtype)

    @jax.named_scope("layers")
    def _layers(self, x: jax.Array, context: Context, layout: Layout) -> jax.Array:
        skips = None
        for stage, module in zip(self.config.stages, self.stages):
            x, skips = self._scan(stage.skip, module, x, skips, context, layout)
        return x

    def _scan(
        self,
        skip: str,
        stage: Group,
        x: jax.Array,
        skips: jax.Array | None,
        context: Context,
        layout: Layout,
    ) -> tuple[jax.Array, jax.Array | None]:
        """One stage of stacked groups; the last group reads the skip that the first one saved."""
        graphdef, state = nnx.split(stage)
        dtype = jnp.dtype(self.config.dtype)

        def group(
            x: jax.Array, inputs: tuple[dict, jax.Array | None]
        ) -> tuple[jax.Array, jax.Array | None]:
            params, saved = inputs
            x = checkpoint_name(x, "input")
            module = nnx.merge(graphdef, layout.gather(params, dtype, keep=("tensor",)))
            x = module(x, saved, context, layout)
            return x, x if skip == "save" else None

        if self.config.remat:
            keep = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=self.config.kept,
                names_which_can_be_offloaded=self.config.offloaded,
                offload_src="device",
                offload_dst="pinned_host",
            )
            group = jax.checkpoint(group, policy=keep)
        given = skips[::-1] if skip == "read" else None
        x, saved = jax.lax.scan(group, x, (nnx.to_pure_dict(state), given))
        return x, skips if saved is None else saved

    def _read_out(self, x: jax.Array, context: Context) -> jax.Array:
        x, condition = x.astype(jnp.float32), context.condition_BD
        if self.norm_out is not None:
            x = self.norm_out(x)
        else:
            if self.table_out is not None:
                vectors = self.table_out[...] + jnp.concatenate([condition] * 2, axis=-1)
            else:
                vectors = self.adaln_out(nnx.silu(condition))
            vectors = jnp.split(vectors, 2, axis=-1)
            x = modulate(layer_norm(x), *(context.over(x, v) for v in vectors))
        out = unpatchify(self.patch_out(x), self.config.patch_size)
        return out if self.conv_out is None else _by_frame(self.conv_out, out)


def _num_vector_tokens(config: DenoiserConfig) -> int:
    """How many vectors the condition has."""
    return 1 + (config.num_classes > 0) + config.pooled_text + (config.given == "adaln")


def _frame_conv(features_in: int, features: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(features_in, features, (3, 3), dtype=jnp.float32, rngs=rngs)


def _by_frame(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    frames = conv(x.reshape(-1, *x.shape[2:]))
    return frames.reshape(*x.shape[:2], *frames.shape[1:])


def _flat(x: jax.Array) -> jax.Array:
    """(B, T, H, W, ...) to (B, T H W, ...)."""
    return x.reshape(x.shape[0], -1, *x.shape[4:])


def _masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the grid where the mask holds, float32 (B, D); 0 where it holds nowhere."""
    weights = _flat(mask).astype(jnp.float32)
    total = jnp.einsum("BL,BLD->BD", weights, _flat(x).astype(jnp.float32))
    return total / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)


def _join(
    memory: list[tuple[jax.Array, jax.Array | None]], dtype: jnp.dtype
) -> tuple[jax.Array | None, jax.Array | None]:
    """Tokens (B, M, D) of all sources and their mask; a source without one is seen whole."""
    if not memory:
        return None, None
    masks = [jnp.ones(x.shape[:2], bool) if mask is None else mask for x, mask in memory]
    tokens = jnp.concatenate([x.astype(dtype) for x, _ in memory], axis=1)
    return tokens, jnp.concatenate([mask.astype(bool) for mask in masks], axis=1)
