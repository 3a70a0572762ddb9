"""Perceptual distances between frames, by networks with published weights.

MAGVIT's authors compare the logits of a ResNet-50 (2212.05199 and its code), others compare
features of a VGG-16 (LPIPS, 1801.03924). Weights come from a file with torchvision's names.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError
from walt_jax.parallel import Layout
from walt_jax.weights import Take, load_weights, taker

PyTree = Any

# (width, convolutions) of VGG-16's stages; (width, blocks, stride) of ResNet-50's.
_VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_RESNET_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_NORM_EPS = 1e-5
# Of ImageNet's colours: for pixels in [0, 1], and LPIPS' own for pixels in [-1, 1].
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
_LPIPS_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_LPIPS_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True)
class Perceptual(abc.ABC):
    """A distance between frames; a loss of the tokenizer.

    Attributes:
      weights: path or URL of a `.safetensors` or `.npz` file (docs/weights.md says how to make it).
      sha256: hash of that file; needed for a URL.
      weight: of the distance in the loss (MAGVIT: 0.1).
      dtype: what the convolutions compute in; the distance itself is float32.
    """

    registry: ClassVar[dict[str, type["Perceptual"]]] = {}
    contents: ClassVar[str]

    weights: str = ""
    sha256: str = ""
    weight: float = 0.1
    dtype: str = "float32"

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Perceptual.registry[name] = cls

    def load(self) -> PyTree:
        """The network's parameters: float32, on the host, convolutions as HWIO.

        Raises:
          UserError: no file is given, it cannot be loaded, or it lacks a tensor.
        """
        if not self.weights:
            raise UserError(
                "config.task.perceptual.weights is empty: give a .safetensors or .npz file of "
                f"{self.contents}, made as docs/weights.md says, or turn the term off by "
                "--config.task.perceptual=none."
            )
        tensors = load_weights(self.weights, self.sha256)
        return self._assemble(taker(tensors, self.weights, self.contents))

    def shapes(self) -> PyTree:
        """ShapeDtypeStructs of the network's parameters; no file is read."""
        nothing = self._assemble(lambda name, shape: np.broadcast_to(np.float32(0), shape))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nothing)

    @abc.abstractmethod
    def distance(
        self,
        params: PyTree,
        x: jax.Array,
        y: jax.Array,
        layout: Layout = Layout(),  # noqa: B008
    ) -> jax.Array:
        """How far frames are apart; each network runs twice, once a side.

        Args:
          params: from `load`, the same on every device.
          x, y: (N, H, W, 3) in [-1, 1]; any batch of frames.
          layout: where activations lie on the mesh: frames as a tokenizer's clips do.

        Returns:
          float32 (N,), differentiable with respect to both; 0 where they are equal.
        """

    @abc.abstractmethod
    def _assemble(self, take: Take) -> PyTree:
        """Parameters, from a function that gives the tensor of a name and checks its shape."""


@dataclasses.dataclass(frozen=True)
class LpipsVgg(Perceptual, name="lpips"):
    """LPIPS version 0.1 on VGG-16 (1801.03924, section 3), for frames of 16x16 or more.

    Features after the last convolution of each of five stages are scaled to unit length, and their
    squared differences are weighted by channel, averaged over the frame and added up.
    """

    contents: ClassVar[str] = (
        "torchvision's VGG-16 (features.0.weight, ...) with LPIPS v0.1's linear layers "
        "(lin0.model.1.weight, ...)"
    )

    def _assemble(self, take: Take) -> PyTree:
        stages, channels, index = [], 3, 0
        for width, count in _VGG_STAGES:
            stage = []
            for _ in range(count):
                name = f"features.{index}"
                kernel = take(f"{name}.weight", (width, channels, 3, 3))
                stage.append(_convolution(kernel, take(f"{name}.bias", (width,))))
                channels, index = width, index + 2  # a ReLU follows
            stages.append(stage)
            index += 1  # a pooling follows
        linear = [
            take(f"lin{i}.model.1.weight", (1, width, 1, 1)).reshape(width)
            for i, (width, _) in enumerate(_VGG_STAGES)
        ]
        return {"stages": stages, "linear": linear}

    def distance(
        self,
        params: PyTree,
        x: jax.Array,
        y: jax.Array,
        layout: Layout = Layout(),  # noqa: B008
    ) -> jax.Array:
        if min(x.shape[1:3]) < 16:
            raise UserError(
                f"LPIPS halves frames four times: {x.shape[1]}x{x.shape[2]} is too small, it "
                "takes 16x16 or more."
            )
        fx, fy = (self._features(params, v, layout) for v in (x, y))
        return sum(
            (jnp.square(a - b) * weights).sum(-1).mean((1, 2))
            for a, b, weights in zip(fx, fy, params["linear"])
        )

    def _features(self, params: PyTree, x: jax.Array, layout: Layout) -> list[jax.Array]:
        """Unit features of the five stages, float32."""
        x = ((x.astype(jnp.float32) - _LPIPS_SHIFT) / _LPIPS_SCALE).astype(self.dtype)
        x = _pin(x, layout)
        features = []
        for i, stage in enumerate(params["stages"]):
            if i:
                x = _max_pool(x, size=2, padding=0)
            for convolution in stage:
                x = _pin(jax.nn.relu(_convolve(x, convolution)), layout)
            features.append(unit_length(x.astype(jnp.float32)))
        return features


@dataclasses.dataclass(frozen=True)
class ResNet50Logits(Perceptual, name="resnet50"):
    """Mean squared difference of a ResNet-50's ImageNet logits, on frames of 224x224.

    The loss of MAGVIT's code (`perceptual_loss_on_logit`), here with torchvision's ResNet-50, which
    has the stride in the 3x3 convolutions. Frames are resized bilinearly, with antialiasing where
    they shrink. Batch norms use their running statistics, folded into the convolutions.
    """

    contents: ClassVar[str] = "torchvision's ResNet-50 (conv1.weight, bn1.running_mean, ...)"

    def _assemble(self, take: Take) -> PyTree:
        def folded(conv: str, norm: str, features: int, channels: int, size: int) -> PyTree:
            kernel = take(f"{conv}.weight", (features, channels, size, size))
            scale, bias, mean, variance = (
                take(f"{norm}.{part}", (features,))
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = scale / np.sqrt(variance + _NORM_EPS)
            return _convolution(kernel * scale[:, None, None, None], bias - mean * scale)

        conv1 = folded("conv1", "bn1", 64, 3, 7)
        stages, channels = [], 64
        for stage, (width, count, _) in enumerate(_RESNET_STAGES, start=1):
            blocks = []
            for i in range(count):
                at = f"layer{stage}.{i}"
                block = {
                    "conv1": folded(f"{at}.conv1", f"{at}.bn1", width, channels, 1),
                    "conv2": folded(f"{at}.conv2", f"{at}.bn2", width, width, 3),
                    "conv3": folded(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1),
                }
                if i == 0:
                    names = f"{at}.downsample.0", f"{at}.downsample.1"
                    block["shortcut"] = folded(*names, 4 * width, channels, 1)
                blocks.append(block)
                channels = 4 * width
            stages.append(blocks)
        return {
            "conv1": conv1,
            "stages": stages,
            "fc": {
                "kernel": np.ascontiguousarray(take("fc.weight", (1000, channels)).T),
                "bias": take("fc.bias", (1000,)),
            },
        }

    def distance(
        self,
        params: PyTree,
        x: jax.Array,
        y: jax.Array,
        layout: Layout = Layout(),  # noqa: B008
    ) -> jax.Array:
        of_x, of_y = (self.logits(params, v, layout) for v in (x, y))
        return jnp.square(of_x - of_y).mean(-1)

    def logits(self, params: PyTree, x: jax.Array, layout: Layout = Layout()) -> jax.Array:  # noqa: B008
        """Frames (N, H, W, 3) in [-1, 1] to float32 (N, 1000)."""
        x = jax.image.resize(x.astype(jnp.float32), (x.shape[0], 224, 224, 3), "bilinear")
        x = (((x + 1.0) / 2.0 - _IMAGENET_MEAN) / _IMAGENET_STD).astype(self.dtype)
        x = _pin(jax.nn.relu(_convolve(_pin(x, layout), params["conv1"], stride=2)), layout)
        x = _pin(_max_pool(x, size=3, padding=1), layout)
        for blocks, (_, _, stride) in zip(params["stages"], _RESNET_STAGES):
            for i, block in enumerate(blocks):
                x = _bottleneck(x, block, 1 if i else stride, layout)
        features = x.astype(jnp.float32).mean((1, 2))
        kernel, bias = params["fc"]["kernel"], params["fc"]["bias"]
        return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias


def _convolution(kernel_OIHW: np.ndarray, bias: np.ndarray) -> PyTree:
    return {"kernel": np.ascontiguousarray(kernel_OIHW.transpose(2, 3, 1, 0)), "bias": bias}


def _convolve(x: jax.Array, convolution: PyTree, stride: int = 1) -> jax.Array:
    """A 2-D convolution of an odd size with zeros around, as torch pads: (k - 1) / 2 a side.

    They are padded beforehand: XLA's partitioner multiplies the gradient of a padded convolution by
    the number of devices of the data axis where two rows lie on two devices (jax 0.10).
    """
    kernel = convolution["kernel"].astype(x.dtype)
    around = (kernel.shape[0] // 2,) * 2
    y = jax.lax.conv_general_dilated(
        jnp.pad(x, ((0, 0), around, around, (0, 0))),
        kernel,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + convolution["bias"].astype(x.dtype)


def _max_pool(x: jax.Array, size: int, padding: int) -> jax.Array:
    """Maxima of windows at every second pixel."""
    edges = (0, 0), (padding, padding), (padding, padding), (0, 0)
    window, strides = (1, size, size, 1), (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, edges)


def _bottleneck(x: jax.Array, block: PyTree, stride: int, layout: Layout) -> jax.Array:
    y = _pin(jax.nn.relu(_convolve(x, block["conv1"])), layout)
    y = _pin(jax.nn.relu(_convolve(y, block["conv2"], stride)), layout)
    y = _convolve(y, block["conv3"])
    shortcut = _convolve(x, block["shortcut"], stride) if "shortcut" in block else x
    return _pin(jax.nn.relu(y + shortcut), layout)


def _pin(x: jax.Array, layout: Layout) -> jax.Array:
    """Frames (N, H, W, C) lie as clips of one frame."""
    return layout.pixels(x[:, None])[:, 0]


def unit_length(x: jax.Array) -> jax.Array:
    """Features (..., C) of each pixel, float32, at length 1; where all are 0 they stay so."""
    square = jnp.square(x).sum(-1, keepdims=True)
    # The gradient of a root at 0 is infinite.
    return x / (jnp.sqrt(jnp.maximum(square, 1e-30)) + 1e-10)
