"""Running the tokenizer's layers over a whole video."""

from collections.abc import Callable

import jax
from flax import nnx

from walt_jax.kernels.causal_conv import causal_conv, fits
from walt_jax.models.tokenizer.layers import (
    AdaptiveGroupNorm,
    CausalConv,
    GroupNorm,
    Triple,
    depth_to_space,
)
from walt_jax.parallel import Layout


class Whole:
    """How layers run over a video: all of it at once, laid out over a mesh.

    The networks call these functions and nothing else that looks beyond a pixel; running them chunk
    by chunk (`streaming.py`) or tile by tile (`tiling.py`) takes other such functions.

    Attributes:
      first: whether the frames at hand begin with the video's first.
      layout: where activations lie on the mesh.
      remat: whether residual blocks keep their inputs only and run again for gradients.
      fused: whether convolutions of stride 1 run as Pallas kernels where they fit; None: on TPUs.
    """

    first = True

    def __init__(
        self,
        layout: Layout = Layout(),  # noqa: B008
        remat: bool = False,
        fused: bool | None = None,
    ) -> None:
        self.layout, self.remat, self.fused = layout, remat, fused

    def block(self, block: nnx.Module, x: jax.Array) -> jax.Array:
        """`block(x, self)`."""
        if not self.remat:
            return block(x, self)
        layers, params = nnx.split(block)
        return jax.checkpoint(lambda params, x: nnx.merge(layers, params)(x, self))(params, x)

    def convolve(
        self,
        conv: CausalConv,
        x: jax.Array,
        norm: GroupNorm | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """`conv(swish(norm(x))) + residual`; without a norm the convolution is of x."""
        run = self._plain
        if self._fuses(conv, x):
            run = self._fused if self.fused else self._by_platform
        return self.layout.pixels(run(conv, x, norm, residual))

    def _plain(
        self, conv: CausalConv, x: jax.Array, norm: GroupNorm | None, residual: jax.Array | None
    ) -> jax.Array:
        if norm is not None:
            x = nnx.swish(norm(x))
        y = conv.valid(conv.pad_space(self.extend(conv, x)))
        return y if residual is None else y + residual

    def _fused(
        self, conv: CausalConv, x: jax.Array, norm: GroupNorm | None, residual: jax.Array | None
    ) -> jax.Array:
        layers, params = nnx.split((conv, norm))

        def of_clips(clips: tuple[jax.Array, jax.Array | None], params: nnx.State) -> jax.Array:
            (x, residual), (conv, norm) = clips, nnx.merge(layers, params)
            affine = (None, None) if norm is None else norm.affine(x)
            kernel = conv.kernel[...].astype(conv.dtype)
            return conv.add_bias(causal_conv(x.astype(conv.dtype), kernel, *affine, residual))

        return self.layout.by_clip(of_clips, (x, residual), params)

    def _by_platform(
        self, conv: CausalConv, x: jax.Array, norm: GroupNorm | None, residual: jax.Array | None
    ) -> jax.Array:
        def of(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
            return lambda x, residual: run(conv, x, norm, residual)

        return jax.lax.platform_dependent(x, residual, tpu=of(self._fused), default=of(self._plain))

    def extend(self, conv: CausalConv, x: jax.Array) -> jax.Array:
        """Puts the frames that the convolution looks back at before x."""
        return conv.pad_time(x)

    def normalise(self, norm: AdaptiveGroupNorm, x: jax.Array, z: jax.Array) -> jax.Array:
        """`norm(x, z)`."""
        return norm(x, z, first=self.first)

    def enlarge(self, x: jax.Array, factors: Triple) -> jax.Array:
        """`depth_to_space(x, factors)`."""
        # The norm that follows reads float32. Without the barrier XLA makes the pixels float32
        # before it moves them: 37 GiB instead of 10 to decode 17x512x896 on a TPU.
        x = jax.lax.optimization_barrier(depth_to_space(x, factors, self.first))
        return self.layout.pixels(x)

    def _fuses(self, conv: CausalConv, x: jax.Array) -> bool:
        return (
            self.fused is not False
            and conv.strides == (1, 1, 1)
            and not self.layout.divides_frames
            and fits(x.shape, conv.kernel.shape, conv.dtype)
        )
