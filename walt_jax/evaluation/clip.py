"""CLIP (2103.00020) as a judge of text-to-video: how well frames match their prompt.

CLIPSIM (2104.14806, section 4.3): the cosine of the embeddings of a frame and of the text, averaged
over frames. A folder as Hugging Face serves it (`model.safetensors` and `tokenizer.json` of, say,
openai/clip-vit-base-patch32); `tokenizers` cuts the text.
"""

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from walt_jax.errors import UserError
from walt_jax.evaluation import published, vit
from walt_jax.evaluation.features import Extractor, single_frames
from walt_jax.evaluation.resize import by_name
from walt_jax.models.text import ClipConfig, ClipTextConfig, FrozenText
from walt_jax.models.text.base import PADDING
from walt_jax.models.text.clip import quick_gelu
from walt_jax.parallel.sharding import path_of
from walt_jax.weights import cache_folder

PyTree = Any
FOLDER = "clip-vit-base-patch32"
FILE = published.File(
    name=f"{FOLDER}/model.safetensors",
    where="model.safetensors and tokenizer.json of https://huggingface.co/openai/"
    "clip-vit-base-patch32",
    contents="CLIP with Hugging Face's names (vision_model.embeddings.class_embedding, ...)",
)
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_EPSILON = 1e-5
_HEAD = 64  # width of a head, in both towers
_GROUP = 8  # frames that a device takes at a time


def load_clip(
    weights: str | None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> Extractor:
    """Embeddings of single frames, of length 1; arguments and errors as in `features.load`."""
    return _images(_read(weights, allow), resize, mesh)


@dataclasses.dataclass(frozen=True)
class TextMatch:
    """How well videos match texts.

    Attributes:
      images: the network of frames.
      texts: of strings, float32 (N, D), of length 1.
    """

    images: Extractor
    texts: Any

    @classmethod
    def load(
        cls,
        folder: str | None = None,
        *,
        mesh: Mesh | None = None,
        allow: Collection[str] = (),
    ) -> "TextMatch":
        """Reads both towers and the tokenizer.

        Args:
          folder: with model.safetensors and tokenizer.json; None for the cache.
          mesh, allow: as in `features.load`.

        Raises:
          UserError: a missing file, or `tokenizers` is not installed.
        """
        folder = epath.Path(folder or cache_folder() / FOLDER)
        file = _read(str(folder / "model.safetensors") if folder.exists() else None, allow)
        return cls(_images(file, None, mesh), _texts(file, folder / "tokenizer.json"))

    def __call__(self, videos_BTHWC: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """The mean cosine over the frames of each video with its text.

        Args:
          videos_BTHWC: uint8.
          texts: one a video.

        Returns:
          float32 (B,) in [-1, 1]; published tables multiply by 100.

        Raises:
          UserError: another number of texts.
        """
        if len(texts) != len(videos_BTHWC):
            raise UserError(
                f"{len(videos_BTHWC)} videos and {len(texts)} texts: give one text a video."
            )
        frames = self.images(single_frames(videos_BTHWC))
        frames = frames.reshape(len(texts), -1, frames.shape[-1])
        return np.einsum("btd,bd->bt", frames, self.texts(texts)).mean(1)


def _read(source: str | None, allow: Collection[str]) -> published.Published:
    return published.read(FILE, source, allow)


def _images(file: published.Published, resize: str | None, mesh: Mesh | None) -> Extractor:
    resizing = resize or "bicubic-antialias"
    resized = by_name(resizing)
    params = vision_params(file)
    dims, side = params["projection"].shape[1], params["patch"].shape[1]
    size = side * round((len(params["positions"]) - 1) ** 0.5)

    def apply(params: PyTree, clips: jax.Array) -> jax.Array:
        frames = clips[:, 0].astype(jnp.float32)
        # The short side fits, then the centre is cut out.
        height, width = frames.shape[1:3]
        scale = size / min(height, width)
        frames = resized(frames, tuple(max(size, int(n * scale)) for n in (height, width)))
        top, left = ((n - size) // 2 for n in frames.shape[1:3])
        frames = frames[:, top : top + size, left : left + size]
        # As pixels of an image, between them nothing is lost that the authors' program keeps.
        frames = jnp.round(jnp.clip(frames, 0, 255)) / 255
        return vision(params, (frames - _MEAN) / _STD)

    return Extractor(
        name="clip",
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


def _texts(file: published.Published, path: epath.Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise UserError(
            'CLIP reads text by the package tokenizers: pip install -e ".[text]".'
        ) from error
    if not path.exists():
        raise UserError(f"{path} is missing: get {FILE.where} and put both into one folder.")
    tokenizer = Tokenizer.from_str(path.read_text())
    encoder = text_encoder(file)
    length = encoder.config.model.places
    tokenizer.enable_truncation(length)
    projection = text_projection(file)
    program = jax.jit(text)

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]
        ids = np.full((len(rows), length), PADDING, np.int32)
        for row, found in zip(ids, rows):
            row[: len(found)] = found
        with jax.default_matmul_precision("highest"):
            return jax.device_get(program(encoder, projection, jax.device_put(ids)))

    return embed


def vision_params(file: published.Published) -> PyTree:
    """Of the tower of images; sizes by the tensors' own."""
    take, at = _any_shape(file), "vision_model"
    projection = take("visual_projection.weight")
    kernel = take(f"{at}.embeddings.patch_embedding.weight")
    return {
        "class": take(f"{at}.embeddings.class_embedding"),
        "patch": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))[None],
        "positions": take(f"{at}.embeddings.position_embedding.weight"),
        "before": _norm(take, f"{at}.pre_layrnorm"),  # their spelling
        "blocks": _blocks(take, file, at),
        "after": _norm(take, f"{at}.post_layernorm"),
        "projection": np.ascontiguousarray(projection.T),
    }


def text_encoder(file: published.Published) -> FrozenText:
    """The tower of texts."""
    take, at = _any_shape(file), "text_model"
    words, places = (
        take(f"{at}.embeddings.{name}_embedding.weight") for name in ("token", "position")
    )
    model = ClipConfig(
        width=words.shape[1],
        mlp_width=len(take(f"{at}.encoder.layers.0.mlp.fc1.weight")),
        num_layers=_depth(file, at),
        num_heads=words.shape[1] // _HEAD,
        vocabulary=len(words),
        places=len(places),
        epsilon=_EPSILON,
        dtype="float32",
    )
    config = ClipTextConfig("", max_tokens=len(places), model=model)
    names = config.tensors()

    def one(place: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = path_of(place)
        name, stacked = names[path][0], path.startswith("layers/")
        parts = [take(name.format(i)) for i in range(leaf.shape[0] if stacked else 1)]
        parts = [part.T if path.endswith("kernel") else part for part in parts]
        return np.stack(parts) if stacked else parts[0]

    params = jax.tree_util.tree_map_with_path(one, config.network.shapes())
    return FrozenText(params, config, file.sha256)


def text_projection(file: published.Published) -> np.ndarray:
    """From the text tower's width to the embeddings'."""
    return np.ascontiguousarray(_any_shape(file)("text_projection.weight").T)


def vision(params: PyTree, x_NHWC: jax.Array) -> jax.Array:
    """Normalised frames to embeddings of length 1, float32 (N, D)."""
    tokens = vit.patches(x_NHWC[:, None], params["patch"])
    first = jnp.broadcast_to(params["class"], (len(tokens), 1, tokens.shape[-1]))
    x = jnp.concatenate([first, tokens], 1) + params["positions"]
    x = vit.encode(
        params["blocks"],
        vit.norm(x, params["before"], _EPSILON),
        heads=x.shape[-1] // _HEAD,
        activation=quick_gelu,
        epsilon=_EPSILON,
    )
    return _unit(vit.norm(x[:, 0], params["after"], _EPSILON) @ params["projection"])


def text(encoder: FrozenText, projection: jax.Array, ids_NL: jax.Array) -> jax.Array:
    """Token ids, -1 behind the end token, to embeddings of length 1, float32 (N, D)."""
    _, ends = encoder.config.network.bind(encoder.params).states(ids_NL)
    return _unit(ends @ projection)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _any_shape(file: published.Published) -> Any:
    """Tensors whose shapes follow from each other: a wrong one cannot be multiplied."""
    return partial(file.take, shape=None)


def _norm(take: Any, at: str) -> PyTree:
    return {"scale": take(f"{at}.weight"), "bias": take(f"{at}.bias")}


def _blocks(take: Any, file: published.Published, at: str) -> PyTree:
    def dense(*names: str) -> PyTree:
        kernel, bias = (
            np.concatenate([take(f"{n}.{p}") for n in names]) for p in ("weight", "bias")
        )
        return {"kernel": np.ascontiguousarray(kernel.T), "bias": bias}

    def block(here: str) -> PyTree:
        attention = f"{here}.self_attn"
        return {
            "norm1": _norm(take, f"{here}.layer_norm1"),
            "qkv": dense(*(f"{attention}.{p}_proj" for p in "qkv")),
            "out": dense(f"{attention}.out_proj"),
            "norm2": _norm(take, f"{here}.layer_norm2"),
            "up": dense(f"{here}.mlp.fc1"),
            "down": dense(f"{here}.mlp.fc2"),
        }

    return vit.stack([block(f"{at}.encoder.layers.{i}") for i in range(_depth(file, at))])


def _depth(file: published.Published, at: str) -> int:
    found = sum(n.startswith(f"{at}.") and n.endswith("layer_norm1.weight") for n in file.names)
    return max(1, found)
