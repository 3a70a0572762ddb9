"""A published text encoder as others use it: weights, and a hash that names it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from walt_jax.config import differences, to_dict
from walt_jax.errors import UserError
from walt_jax.models.text.base import Embeddings, FrozenTextConfig
from walt_jax.models.text.hub import folder_of
from walt_jax.models.text.published import fingerprint, read_config, stored
from walt_jax.parallel import Layout, state_shardings
from walt_jax.parallel.sharding import path_of, place, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenText:
    """An encoder with its weights.

    Attributes:
      params: arrays; `published.Stored` of `open`; ShapeDtypeStructs of `abstract`.
      config: which encoder.
      hash: 16 hex digits of its sizes, tensors and tokenizer; embeddings in records carry it.
    """

    params: Any
    config: FrozenTextConfig = dataclasses.field(metadata={"static": True})
    hash: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def open(cls, config: FrozenTextConfig, *, download: bool = True) -> "FrozenText":
        """Finds the files and checks all but the numbers; no weight is read but for the hash.

        `parallel.sharding.place` then reads each parameter, every process the slices of its own
        devices alone.

        Raises:
          UserError: no such folder, something in it is missing or damaged, or its sizes are not
            those of `config.model`.
        """
        folder = config.folder(download=download)
        sizes = config.sizes_of(read_config(folder))
        sizes = dataclasses.replace(sizes, dtype=config.model.dtype)
        if diff := differences(to_dict(config.model), to_dict(sizes)):
            told = ", ".join(f"{key} is {b}, not {a}" for key, (a, b) in diff.items())
            raise UserError(
                f"The encoder in {folder} is not that of config.task.text.model ({told}): set "
                "these, or give another path."
            )
        tree = config.network.shapes()
        shapes = {path_of(at): x.shape for at, x in jax.tree_util.tree_leaves_with_path(tree)}
        params = stored(folder, config.tensors(), shapes, jnp.dtype(config.model.dtype))
        words = folder_of(config.tokenizer, config.revision) if config.tokenizer else folder
        files = [words / name for name in ("tokenizer.json", "spiece.model")]
        digest = fingerprint(_identity(config), params, [f for f in files if f.exists()][:1])
        params = jax.tree_util.tree_map_with_path(lambda at, _: params[path_of(at)], tree)
        return cls(params, config, digest)

    @classmethod
    def load(cls, config: FrozenTextConfig, mesh: Mesh) -> "FrozenText":
        """Opens an encoder and reads its weights onto a mesh, divided as a denoiser's are.

        Raises:
          UserError: as `open`.
        """
        frozen = cls.open(config)
        params = place(frozen.params, state_shardings(frozen.params, mesh))
        return dataclasses.replace(frozen, params=params)

    @classmethod
    def abstract(cls, config: FrozenTextConfig) -> "FrozenText":
        """Shapes alone, to compile with."""

        def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            stacked = path_of(path).startswith("layers/")
            matrix = len(leaf.shape) - stacked > 1
            dtype = jnp.dtype(config.model.dtype) if matrix else jnp.float32
            return jax.ShapeDtypeStruct(leaf.shape, dtype)

        params = jax.tree_util.tree_map_with_path(one, config.network.shapes())
        return cls(params, config, "none")

    def __call__(self, tokens: jax.Array, layout: Layout = Layout()) -> Embeddings:  # noqa: B008
        """Token ids, int32 (..., M) with -1 for padding, to embeddings; without a gradient."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        out = self.config.network.bind(self.params)(flat, layout)
        out = Embeddings(*(x.reshape(*tokens.shape, *x.shape[2:]) for x in out))
        return jax.lax.stop_gradient(out)

    def embed(self, ids: np.ndarray, mesh: Mesh) -> Embeddings:
        """Token ids to embeddings on the host, as records hold them: float16, 0 in padding.

        One by one, so that a text's are the same bits in any company.

        Args:
          ids: int32 (N, M) of `config.tokenize`.
          mesh: where the weights lie.

        Raises:
          UserError: the encoder's numbers do not fit float16.
        """
        with jax.set_mesh(mesh):
            rows = [
                jax.device_get(_program(mesh)(self, place(row, replicated(mesh))))
                for row in ids[:, None]
            ]
        if not rows:
            nothing = np.zeros((0, ids.shape[1], self.config.width), np.float16)
            return Embeddings(nothing, np.zeros(nothing.shape[:2], bool))
        tokens, mask = (np.concatenate(x) for x in zip(*rows))
        check_finite(tokens, self.config.path)
        return Embeddings(tokens, mask)


def half(embeddings: Embeddings) -> Embeddings:
    """As records hold them: tokens in float16, 0 in padding."""
    tokens = jnp.where(embeddings.mask[..., None], embeddings.tokens, 0.0)
    return Embeddings(tokens.astype(jnp.float16), embeddings.mask)


def check_finite(tokens: np.ndarray, source: str) -> None:
    """Refuses embeddings that are no numbers.

    Raises:
      UserError: some are infinite or not a number.
    """
    if not np.isfinite(tokens).all():
        raise UserError(
            f"The text encoder {source} gave numbers beyond float16: its weights are damaged, or "
            "were saved in float16 from a network that needs bfloat16."
        )


def _identity(config: FrozenTextConfig) -> dict[str, Any]:
    """What of a config says which encoder it is, not where it lies or how it is run."""
    elsewhere = ("path", "revision", "tokenizer", "max_tokens")
    about = {key: value for key, value in to_dict(config).items() if key not in elsewhere}
    return about | {"model": {k: v for k, v in about["model"].items() if k != "dtype"}}


@functools.lru_cache(maxsize=4)
def _program(mesh: Mesh) -> Any:
    def run(encoder: FrozenText, tokens: jax.Array) -> Embeddings:
        return half(encoder(tokens, Layout(mesh)))

    return jax.jit(run, out_shardings=replicated(mesh))
