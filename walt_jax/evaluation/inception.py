"""Inception-v3 of 2015, the network of FID and of the inception score (1512.00567; 1706.08500).

The graph that TensorFlow's file of 2015-12-05 holds, with weights under the names of its PyTorch
port: averages leave padding out, and the last block pools maxima where the paper has averages.
Features are the 2048 averages of the last maps, logits are of 1008 classes, without their bias as
in the score's first program.
"""

from collections.abc import Callable, Collection
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
# x, name, features, (rows, columns), stride, padding -> convolution, norm and ReLU.
Unit = Callable[..., jax.Array]

FILE = published.File(
    name="pt_inception-2015-12-05-6726825d.pth",
    where="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    contents="FID's Inception-v3 (Conv2d_1a_3x3.conv.weight, ...)",
    sha256="6726825d",
)
_SIZE = 299
_GROUP = 8  # frames that a device takes at a time


def load_inception(
    weights: str | None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> Extractor:
    """FID's 2048 features of single frames; arguments and errors as in `features.load`."""
    return _load("inception", 2048, weights, resize, mesh, allow)


def load_inception_logits(
    weights: str | None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> Extractor:
    """The 1008 logits of single frames, for `inception_score`; as `load_inception`."""
    return _load("inception-logits", 1008, weights, resize, mesh, allow)


def _load(
    name: str,
    dims: int,
    source: str | None,
    resizing: str | None,
    mesh: Mesh | None,
    allow: Collection[str],
) -> Extractor:
    resizing = resizing or "bilinear"
    resize = by_name(resizing)
    file = published.read(FILE, source, allow)

    def apply(params: PyTree, clips: jax.Array) -> jax.Array:
        frames = resize(clips[:, 0].astype(jnp.float32), (_SIZE, _SIZE))
        features = network(2.0 * frames / 255.0 - 1.0, folded(params["units"]))
        return features @ params["logits"] if dims == 1008 else features

    params = {"units": assemble(file.take)}
    if dims == 1008:
        params["logits"] = np.ascontiguousarray(file.take("fc.weight", (1008, 2048)).T)
    return Extractor(
        name=name,
        weights="published" if file.trained else "unknown",
        weights_hash=file.sha256,
        trained=file.trained,
        dims=dims,
        min_frames=1,
        max_frames=1,
        group=_GROUP,
        resize=resizing,
        apply=apply,
        params=params,
        mesh=mesh,
    )


def assemble(take: Take) -> dict[str, PyTree]:
    """Folded kernels (rows, columns, in, out) and biases of all convolutions, by name."""
    units: dict[str, PyTree] = {}

    def unit(x: jax.Array, name: str, width: int, *where: Any, **how: Any) -> jax.Array:
        kernel = take(f"{name}.conv.weight", (width, x.shape[-1], *_size(*where)))
        scale, bias, mean, variance = (
            take(f"{name}.bn.{part}", (width,)).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + 1e-3)
        units[name] = {
            "kernel": (kernel.transpose(2, 3, 1, 0) * scale).astype(np.float32),
            "bias": (bias - mean * scale).astype(np.float32),
        }
        return folded(units)(x, name, width, *where, **how)

    jax.eval_shape(lambda x: network(x, unit), jnp.zeros((1, _SIZE, _SIZE, 3)))
    return units


def folded(units: dict[str, PyTree]) -> Unit:
    """The units of folded parameters."""

    def unit(
        x: jax.Array,
        name: str,
        width: int,
        size: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: str = "SAME",
    ) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            units[name]["kernel"],
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(y + units[name]["bias"])

    return unit


def _size(size: int | tuple[int, int] = 1, *_: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def network(x: jax.Array, unit: Unit) -> jax.Array:
    """Frames (N, 299, 299, 3) in [-1, 1] to float32 (N, 2048)."""
    x = unit(x, "Conv2d_1a_3x3", 32, 3, 2, "VALID")
    x = unit(x, "Conv2d_2a_3x3", 32, 3, 1, "VALID")
    x = _max_pool(unit(x, "Conv2d_2b_3x3", 64, 3), 2, "VALID")
    x = unit(x, "Conv2d_3b_1x1", 80)
    x = _max_pool(unit(x, "Conv2d_4a_3x3", 192, 3, 1, "VALID"), 2, "VALID")
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = _block_a(x, unit, name, pooled)
    x = _block_b(x, unit, "Mixed_6a")
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = _block_c(x, unit, name, width)
    x = _block_d(x, unit, "Mixed_7a")
    x = _block_e(x, unit, "Mixed_7b", _average_pool)
    x = _block_e(x, unit, "Mixed_7c", lambda x: _max_pool(x, 1, "SAME"))
    return x.mean((1, 2))


def _chain(x: jax.Array, unit: Unit, name: str, *steps: tuple) -> jax.Array:
    """Convolutions one after another, whose names end in _1, _2 and so on."""
    for i, step in enumerate(steps, start=1):
        x = unit(x, f"{name}_{i}", *step)
    return x


def _block_a(x: jax.Array, unit: Unit, at: str, pooled: int) -> jax.Array:
    branches = (
        unit(x, f"{at}.branch1x1", 64),
        _chain(x, unit, f"{at}.branch5x5", (48,), (64, 5)),
        _chain(x, unit, f"{at}.branch3x3dbl", (64,), (96, 3), (96, 3)),
        unit(_average_pool(x), f"{at}.branch_pool", pooled),
    )
    return jnp.concatenate(branches, -1)


def _block_b(x: jax.Array, unit: Unit, at: str) -> jax.Array:
    branches = (
        unit(x, f"{at}.branch3x3", 384, 3, 2, "VALID"),
        _chain(x, unit, f"{at}.branch3x3dbl", (64,), (96, 3), (96, 3, 2, "VALID")),
        _max_pool(x, 2, "VALID"),
    )
    return jnp.concatenate(branches, -1)


def _block_c(x: jax.Array, unit: Unit, at: str, c: int) -> jax.Array:
    row, column = (1, 7), (7, 1)
    branches = (
        unit(x, f"{at}.branch1x1", 192),
        _chain(x, unit, f"{at}.branch7x7", (c,), (c, row), (192, column)),
        _chain(
            x,
            unit,
            f"{at}.branch7x7dbl",
            *((c,), (c, column), (c, row), (c, column), (192, row)),
        ),
        unit(_average_pool(x), f"{at}.branch_pool", 192),
    )
    return jnp.concatenate(branches, -1)


def _block_d(x: jax.Array, unit: Unit, at: str) -> jax.Array:
    last = (3, 2, "VALID")
    branches = (
        _chain(x, unit, f"{at}.branch3x3", (192,), (320, *last)),
        _chain(x, unit, f"{at}.branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, *last)),
        _max_pool(x, 2, "VALID"),
    )
    return jnp.concatenate(branches, -1)


def _block_e(
    x: jax.Array, unit: Unit, at: str, pool: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    def fork(y: jax.Array, name: str) -> list[jax.Array]:
        return [unit(y, f"{name}a", 384, (1, 3)), unit(y, f"{name}b", 384, (3, 1))]

    three = unit(x, f"{at}.branch3x3_1", 384)
    double = _chain(x, unit, f"{at}.branch3x3dbl", (448,), (384, 3))
    branches = (
        unit(x, f"{at}.branch1x1", 320),
        *fork(three, f"{at}.branch3x3_2"),
        *fork(double, f"{at}.branch3x3dbl_3"),
        unit(pool(x), f"{at}.branch_pool", 192),
    )
    return jnp.concatenate(branches, -1)


def _max_pool(x: jax.Array, stride: int, padding: str) -> jax.Array:
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


def _average_pool(x: jax.Array) -> jax.Array:
    """Of 3x3 pixels; at the edges, of those that are there."""
    sums = [
        jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        for y in (x, jnp.ones((1, *x.shape[1:3], 1), x.dtype))
    ]
    return sums[0] / sums[1]
