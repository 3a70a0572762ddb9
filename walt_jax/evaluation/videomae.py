"""VideoMAE (2203.12602, 2303.16727): features of videos with less of a bias to single frames.

"On the Content Bias in Frechet Video Distance" (2404.12391) takes those of the giant VideoMAE-v2,
fine-tuned on Something-Something v2, of 16 frames of 224x224 in [0, 1]: the average of all tokens
after a norm. Weights under their names, of any size.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from walt_jax.errors import UserError
from walt_jax.evaluation import published, vit
from walt_jax.evaluation.features import Extractor
from walt_jax.evaluation.resize import by_name
from walt_jax.weights import Take

PyTree = Any
FILE = published.File(
    name="vit_g_hybrid_pt_1200e_ssv2_ft.pth",
    where="https://huggingface.co/OpenGVLab/InternVideoMAE_models/resolve/main/mae-g/"
    "vit_g_hybrid_pt_1200e_ssv2_ft.pth",
    contents="a fine-tuned VideoMAE (patch_embed.proj.weight, blocks.0.attn.qkv.weight, ..., "
    "fc_norm.weight)",
)
_SIZE = 224
_TUBE = 2  # frames of a token
# Width -> heads, patch, MLP width: small, base, large, huge, giant.
_SIZES = {
    384: (6, 16, 1536),
    768: (12, 16, 3072),
    1024: (16, 16, 4096),
    1280: (16, 16, 5120),
    1408: (16, 14, 6144),
}


def load_videomae(
    weights: str | None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> Extractor:
    """VideoMAE's features; arguments and errors as in `features.load`."""
    resizing = resize or "bilinear"
    resized = by_name(resizing)
    file = published.read(FILE, weights, allow)
    # Files of training runs hold the network inside 'model' or 'module'.
    roots = [n.removesuffix("fc_norm.weight") for n in file.names if n.endswith("fc_norm.weight")]
    root = roots[0] if roots else ""
    params = assemble(lambda name, shape: file.take(root + name, shape))
    width = params["fc_norm"]["scale"].size

    def apply(params: PyTree, clips: jax.Array) -> jax.Array:
        x = resized(clips.astype(jnp.float32), (_SIZE, _SIZE)) / 255.0
        return network(params, x)

    return Extractor(
        name="videomae",
        weights="published" if file.trained else "unknown",
        weights_hash=file.sha256,
        trained=file.trained,
        dims=width,
        min_frames=16,
        max_frames=16,
        resize=resizing,
        apply=apply,
        params=params,
        mesh=mesh,
    )


def assemble(take: Take) -> PyTree:
    """Parameters; the size is found by trying the known ones.

    Raises:
      UserError: no size fits.
    """
    width = _width(take)
    _, patch, mlp = _SIZES[width]

    def dense(name: str, into: int, out: int) -> PyTree:
        kernel = np.ascontiguousarray(take(f"{name}.weight", (out, into)).T)
        return {"kernel": kernel, "bias": take(f"{name}.bias", (out,))}

    def norm(name: str) -> PyTree:
        return {"scale": take(f"{name}.weight", (width,)), "bias": take(f"{name}.bias", (width,))}

    def block(at: str) -> PyTree:
        kernel = take(f"{at}.attn.qkv.weight", (3 * width, width)).T
        q, v = (take(f"{at}.attn.{name}_bias", (width,)) for name in "qv")
        return {
            "norm1": norm(f"{at}.norm1"),
            "qkv": {
                "kernel": np.ascontiguousarray(kernel),
                "bias": np.concatenate([q, np.zeros_like(q), v]),
            },
            "out": dense(f"{at}.attn.proj", width, width),
            "norm2": norm(f"{at}.norm2"),
            "up": dense(f"{at}.mlp.fc1", width, mlp),
            "down": dense(f"{at}.mlp.fc2", mlp, width),
        }

    kernel = take("patch_embed.proj.weight", (width, 3, _TUBE, patch, patch))
    blocks = [block("blocks.0")]
    while _has(take, f"blocks.{len(blocks)}.norm1.weight", (width,)):
        blocks.append(block(f"blocks.{len(blocks)}"))
    return {
        "patch": {
            "kernel": np.ascontiguousarray(kernel.transpose(2, 3, 4, 1, 0)),
            "bias": take("patch_embed.proj.bias", (width,)),
        },
        "blocks": vit.stack(blocks),
        "fc_norm": norm("fc_norm"),
    }


def _width(take: Take) -> int:
    for width in _SIZES:
        if _has(take, "fc_norm.weight", (width,)):
            return width
    take("fc_norm.weight", (max(_SIZES),))  # says what is there instead
    raise AssertionError


def _has(take: Take, name: str, shape: tuple[int, ...]) -> bool:
    try:
        take(name, shape)
    except UserError:
        return False
    return True


def network(params: PyTree, x_BTHWC: jax.Array) -> jax.Array:
    """Frames (B, T, H, W, 3) in [0, 1], T even, to float32 (B, D)."""
    width = params["fc_norm"]["scale"].size
    tokens = vit.patches(x_BTHWC, params["patch"]["kernel"]) + params["patch"]["bias"]
    tokens = tokens + positions(tokens.shape[1], width)
    encode = partial(vit.encode, heads=_SIZES[width][0], epsilon=1e-6)
    tokens = encode(params["blocks"], tokens, activation=partial(jax.nn.gelu, approximate=False))
    return vit.norm(tokens.mean(1), params["fc_norm"], 1e-6)


def positions(count: int, width: int) -> np.ndarray:
    """Sines and cosines in turn: float32 (count, width)."""
    rates = 10000.0 ** (-2 * (np.arange(width) // 2) / width)
    angles = np.arange(count)[:, None] * rates
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)
