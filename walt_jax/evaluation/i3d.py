"""I3D, FVD's network: the graph of TF-Hub's deepmind/i3d-kinetics-400/1 (1705.07750, figure 3).

An inflated Inception-v1 of RGB frames. Convolutions and poolings are padded as TensorFlow's SAME
does, at the end first; batch norms have no scale and an epsilon of 1e-3, and are folded into the
convolutions. FVD takes the 400 logits, averaged over time.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from walt_jax.errors import UserError
from walt_jax.evaluation import i3d_weights
from walt_jax.evaluation.features import Extractor
from walt_jax.evaluation.resize import by_name, resize
from walt_jax.models.tokenizer.layers import convolve

PyTree = Any

SIZE = 224
MIN_FRAMES = 10
STAGES = (*i3d_weights.STEM, *i3d_weights.MIXED)  # in the order of the graph
# Window and strides of the pooling behind a stage.
_POOLS = {
    "Conv3d_1a_7x7": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2c_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3c": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4f": ((2, 2, 2), (2, 2, 2)),
}


def load_i3d(
    weights: str | None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> Extractor:
    """The 400 logits, FVD's features; arguments and errors as in `features.load`."""
    return _load("i3d", logits, 400, weights, resize, mesh, allow)


def load_i3d_pool(
    weights: str | None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> Extractor:
    """The 1024 features before the logits; arguments and errors as in `features.load`."""
    return _load("i3d-pool", pooled, 1024, weights, resize, mesh, allow)


def _load(
    name: str,
    network: Any,
    dims: int,
    source: str | None,
    resizing: str | None,
    mesh: Mesh | None,
    allow: Collection[str],
) -> Extractor:
    resizing = resizing or "tf1-bilinear"
    by_name(resizing)
    weights = i3d_weights.read(source)
    if weights.kind in ("rgb_imagenet", "unknown") and weights.kind not in allow:
        what = {
            "rgb_imagenet": "the I3D that was first trained on ImageNet (rgb_imagenet); FVD's was "
            "trained from scratch (rgb_scratch)",
            "unknown": "an I3D whose weights are none of the published ones",
        }[weights.kind]
        raise UserError(
            f"{weights.path} holds {what}: give FVD's weights, as docs/evaluation.md says, or "
            f"allow {weights.kind} and compare such scores among themselves only."
        )
    if weights.kind == "rgb_imagenet":
        name = name.replace("i3d", "i3d-imagenet")
    return Extractor(
        name=name,
        weights=weights.kind,
        weights_hash=weights.sha256,
        trained=weights.kind in ("rgb_scratch", "rgb_imagenet"),
        dims=dims,
        min_frames=MIN_FRAMES,
        resize=resizing,
        apply=lambda params, clips: network(params, prepare(clips, resizing)),
        params=assemble(weights.tensors),
        mesh=mesh,
    )


def prepare(clips_BTHWC: jax.Array, resizing: str) -> jax.Array:
    """uint8 clips of any size to what the network takes: (B, T, 224, 224, 3) in [-1, 1]."""
    return 2.0 * resize(clips_BTHWC, (SIZE, SIZE), resizing) / 255.0 - 1.0


def assemble(tensors: dict[str, np.ndarray]) -> PyTree:
    """Folded parameters, from tensors by their official names (see `i3d_weights`)."""

    def fold(scope: str) -> PyTree:
        parts = (tensors[f"{scope}/{part}"] for part in i3d_weights.NORM)
        kernel, (beta, mean, variance) = tensors[f"{scope}/{i3d_weights.KERNEL}"], parts
        scale = 1 / np.sqrt(variance.astype(np.float64) + 1e-3)
        return {
            "kernel": (kernel * scale).astype(np.float32),
            "bias": (beta - mean * scale).astype(np.float32),
        }

    def mixed(name: str) -> PyTree:
        a, b1, b2, c1, c2, d = (fold(f"{name}/{r}") for r in i3d_weights.roles(name))
        # One product for the three branches that begin with a 1x1x1 convolution of the input.
        entry = {k: np.concatenate([p[k] for p in (a, b1, c1)], -1) for k in a}
        return {"entry": entry, "second": b2, "third": c2, "pooled": d}

    params = {scope: fold(scope) for scope in i3d_weights.STEM}
    params |= {name: mixed(name) for name in i3d_weights.MIXED}
    kernel, bias = (tensors[f"{i3d_weights.LOGITS}/conv_3d/{k}"] for k in "wb")
    return params | {"logits": {"kernel": kernel[0, 0, 0], "bias": bias}}


def logits(params: PyTree, x_BTHWC: jax.Array) -> jax.Array:
    """The logits, averaged over time.

    Args:
      params: from `assemble`.
      x_BTHWC: float32 (B, T, 224, 224, 3) in [-1, 1], 9 frames or more.

    Returns:
      float32 (B, 400).
    """
    last = params["logits"]
    with jax.default_matmul_precision("highest"):
        return pooled(params, x_BTHWC) @ last["kernel"] + last["bias"]


def pooled(params: PyTree, x_BTHWC: jax.Array) -> jax.Array:
    """What the logits are made of, averaged over time: float32 (B, 1024); see `logits`."""
    x = x_BTHWC
    for name in STAGES:
        x = stage(name, params[name], x)
    # Averages over 2 frames and 7x7 pixels at every frame, then over the frames.
    frames = x.mean((2, 3))
    return ((frames[:, 1:] + frames[:, :-1]) / 2).mean(1)


def stage(name: str, params: PyTree, x_BTHWC: jax.Array) -> jax.Array:
    """One of `STAGES`: a convolution or an Inception module, and the pooling behind it.

    Args:
      name: which.
      params: its own, from `assemble`.
      x_BTHWC: float32, what the stage before gives.
    """
    with jax.default_matmul_precision("highest"):
        if name in i3d_weights.MIXED:
            x = _mixed(x_BTHWC, params)
        else:
            x = _unit(x_BTHWC, params, 2 if name == STAGES[0] else 1)
    return _max_pool(x, *_POOLS[name]) if name in _POOLS else x


def _mixed(x: jax.Array, params: PyTree) -> jax.Array:
    """An Inception module: four branches, side by side."""
    into = [params[name]["kernel"].shape[-2] for name in ("second", "third")]
    entry = _unit(x, params["entry"])
    first = entry.shape[-1] - sum(into)
    a, b, c = jnp.split(entry, [first, first + into[0]], -1)
    d = _max_pool(x, (3, 3, 3), (1, 1, 1))
    rest = ((b, "second"), (c, "third"), (d, "pooled"))
    return jnp.concatenate([a, *(_unit(y, params[name]) for y, name in rest)], -1)


def _unit(x: jax.Array, unit: PyTree, stride: int = 1) -> jax.Array:
    """Convolution, folded norm and ReLU."""
    kernel, bias = unit["kernel"], unit["bias"]
    if kernel.shape[:3] == (1, 1, 1):
        return jax.nn.relu(x @ kernel[0, 0, 0] + bias)
    sides = jax.lax.padtype_to_pads(x.shape[1:4], kernel.shape[:3], (stride,) * 3, "SAME")
    # A row and a column of zeros: an even kernel is faster where the stride is 2.
    more = (0, *(-n % stride for n in kernel.shape[1:3]))
    kernel = jnp.pad(kernel, [*((0, n) for n in more), (0, 0), (0, 0)])
    sides = [(before, after + n) for (before, after), n in zip(sides, more)]
    x = jnp.pad(x, [(0, 0), *sides, (0, 0)])
    return jax.nn.relu(convolve(x, kernel, (stride,) * 3) + bias)


def _max_pool(x: jax.Array, window: Sequence[int], strides: Sequence[int]) -> jax.Array:
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), "SAME"
    )
