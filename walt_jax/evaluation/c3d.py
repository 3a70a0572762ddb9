"""C3D fine-tuned on UCF-101, the network of UCF-101's inception score (1412.0767; TGAN's program).

Frames are resized to 112x112 with their corners kept, made BGR, and the mean video of the training
set is taken off. Weights are those of the TGAN authors' file `conv3d_deepnetA_ucf.npz`, joined with
`mean2.npz`; docs/evaluation.md says how.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from walt_jax.evaluation import published
from walt_jax.evaluation.features import Extractor
from walt_jax.evaluation.resize import by_name
from walt_jax.weights import Take

PyTree = Any
FILE = published.File(
    name="c3d_ucf101.npz",
    where="conv3d_deepnetA_ucf.npz and mean2.npz of the TGAN authors, join them as "
    "docs/evaluation.md says",
    contents="the C3D of UCF-101 (conv1a/W, ..., fc8/b, mean)",
)
_SIZE, _FRAMES, _CLASSES = 112, 16, 101
# Name, features; None is a pooling.
_LAYERS = (
    *(("conv1a", 64), None, ("conv2a", 128), None),
    *(("conv3a", 256), ("conv3b", 256), None),
    *(("conv4a", 512), ("conv4b", 512), None),
    *(("conv5a", 512), ("conv5b", 512), None),
)
_DENSE = (("fc6", 4096), ("fc7", 4096), ("fc8", _CLASSES))


def load_c3d(
    weights: str | None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> Extractor:
    """The logits of 101 actions, for `inception_score`; as in `features.load`."""
    resizing = resize or "bilinear-corners"
    resized = by_name(resizing)
    file = published.read(FILE, weights, allow)

    def apply(params: PyTree, clips: jax.Array) -> jax.Array:
        x = resized(clips.astype(jnp.float32), (_SIZE, _SIZE))
        return network(params, x[..., ::-1] - params["mean"])

    return Extractor(
        name="c3d",
        weights="published" if file.trained else "unknown",
        weights_hash=file.sha256,
        trained=file.trained,
        dims=_CLASSES,
        min_frames=_FRAMES,
        max_frames=_FRAMES,
        resize=resizing,
        apply=apply,
        params=assemble(file.take),
        mesh=mesh,
    )


def assemble(take: Take) -> PyTree:
    """Kernels (t, h, w, in, out) and (in, out), biases, and the mean video (16, 112, 112, BGR)."""
    params, channels = {}, 3
    for layer in _LAYERS:
        if layer:
            name, width = layer
            kernel = take(f"{name}/W", (width, channels, 3, 3, 3))
            params[name] = {
                "kernel": np.ascontiguousarray(kernel.transpose(2, 3, 4, 1, 0)),
                "bias": take(f"{name}/b", (width,)),
            }
            channels = width
    channels *= 4 * 4
    for name, width in _DENSE:
        kernel = np.ascontiguousarray(take(f"{name}/W", (width, channels)).T)
        params[name] = {"kernel": kernel, "bias": take(f"{name}/b", (width,))}
        channels = width
    # Of frames of 128x171, of which the network's first users cut this corner.
    mean = take("mean", (3, _FRAMES, 128, 171))[:, :, 8 : 8 + _SIZE, 8 : 8 + _SIZE]
    return params | {"mean": np.ascontiguousarray(mean.transpose(1, 2, 3, 0))}


def network(params: PyTree, x_BTHWC: jax.Array) -> jax.Array:
    """BGR frames (B, 16, 112, 112, 3) without their mean to logits, float32 (B, 101)."""
    x, depth = x_BTHWC, 1
    for layer in _LAYERS:
        if layer is None:
            x, depth = _max_pool(x, depth), 2  # the first leaves time alone
        else:
            kernel, bias = params[layer[0]]["kernel"], params[layer[0]]["bias"]
            numbers = ("NDHWC", "DHWIO", "NDHWC")
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1, 1), "SAME", dimension_numbers=numbers
            )
            x = jax.nn.relu(y + bias)
    # Weights of the first product lie by channel, row and column.
    x = x.transpose(0, 4, 1, 2, 3).reshape(len(x), -1)
    for name, _ in _DENSE:
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "fc8" else jax.nn.relu(x)
    return x


def _max_pool(x: jax.Array, depth: int) -> jax.Array:
    """Maxima of 2x2 pixels; an odd edge is a window of its own."""
    odd = [(0, 0), (0, x.shape[1] % depth), *((0, n % 2) for n in x.shape[2:4]), (0, 0)]
    window = (1, depth, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, odd)
