"""Running the tokenizer's layers over a whole video."""

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

    def convolve(self, conv: CausalConv, x: jax.Array, norm: GroupNorm | None = None) -> jax.Array:
        """`conv(swish(norm(x)))`, or `conv(x)` without a norm."""

        def plain(x: jax.Array) -> jax.Array:
            if norm is not None:
                x = nnx.swish(norm(x))
            return conv.valid(conv.pad_space(self.extend(conv, x)))

        def fused(x: jax.Array) -> jax.Array:
            clips = (x.astype(conv.dtype), *(norm.affine(x) if norm is not None else ()))
            return conv.add_bias(
                self.layout.by_clip(
                    lambda clips, kernel: causal_conv(clips[0], kernel, *clips[1:]),
                    clips,
                    conv.kernel[...].astype(conv.dtype),
                )
            )

        if not self._fuses(conv, x):
            y = plain(x)
        elif self.fused:
            y = fused(x)
        else:
            y = jax.lax.platform_dependent(x, tpu=fused, default=plain)
        return self.layout.pixels(y)

    def extend(self, conv: CausalConv, x: jax.Array) -> jax.Array:
        """Puts the frames that the convolution looks back at before x."""
        return conv.pad_time(x)

    def normalise(self, norm: AdaptiveGroupNorm, x: jax.Array, z: jax.Array) -> jax.Array:
        """`norm(x, z)`."""
        return norm(x, z, first=self.first)

    def enlarge(self, x: jax.Array, factors: Triple) -> jax.Array:
        """`depth_to_space(x, factors)`."""
        return self.layout.pixels(depth_to_space(x, factors, self.first))

    def _fuses(self, conv: CausalConv, x: jax.Array) -> bool:
        return (
            self.fused is not False
            and conv.strides == (1, 1, 1)
            and not self.layout.divides_frames
            and fits(x.shape, conv.kernel.shape, conv.dtype)
        )
