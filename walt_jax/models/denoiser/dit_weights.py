"""DiT's public weights (2212.09748) as parameters of a denoiser."""

from collections.abc import Mapping

import jax
import numpy as np

from walt_jax.errors import UserError
from walt_jax.models.build import Network, Params
from walt_jax.models.denoiser.config import DenoiserConfig
from walt_jax.models.denoiser.denoiser import Denoiser
from walt_jax.parallel.sharding import path_of

_OUTER = {
    "x_embedder.proj": "patch_in",
    "t_embedder.mlp.0": "embed/time/dense_in",
    "t_embedder.mlp.2": "embed/time/dense_out",
    "final_layer.adaLN_modulation.1": "adaln_out",
    "final_layer.linear": "patch_out",
}
_INNER = {
    "attn.qkv": "attentions/0/qkv",
    "attn.proj": "attentions/0/out",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    "adaLN_modulation.1": "modulation/dense",
}
_CLASSES = "y_embedder.embedding_table.weight"


def import_dit(tensors: Mapping[str, np.ndarray], config: DenoiserConfig) -> Params:
    """Parameters from a state dict in the layout of DiT's public checkpoints.

    Its fixed table `pos_embed` is not needed.

    Args:
      tensors: name -> array, such as `load_weights` reads from a `.pt` or `.safetensors` file.
      config: the sizes that the weights were trained with, such as "dit-xl-2" of the named ones.

    Returns:
      float32 numpy arrays, as `Network.init` would give.

    Raises:
      UserError: a tensor is missing, of another shape, or not of a DiT.
    """
    left = {name: value for name, value in tensors.items() if name != "pos_embed"}

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise UserError(
                f"The weights hold no tensor {name!r}: give those of a DiT with "
                f"{config.num_layers} layers."
            )
        return np.asarray(left.pop(name), np.float32)

    def dense(name: str, path: str) -> dict[str, np.ndarray]:
        kernel = take(f"{name}.weight")
        if kernel.ndim == 4:  # the patches' convolution: (D, C, ph, pw)
            kernel = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
        return {f"{path}/kernel": kernel.T, f"{path}/bias": take(f"{name}.bias")}

    flat = {k: v for name, path in _OUTER.items() for k, v in dense(name, path).items()}
    if config.num_classes:
        flat["embed/class_embedding"] = take(_CLASSES)
    layers = [
        {
            k: v
            for name, path in _INNER.items()
            for k, v in dense(f"blocks.{i}.{name}", f"stages/0/layers/0/{path}").items()
        }
        for i in range(config.num_layers)
    ]
    flat |= {path: np.stack([layer[path] for layer in layers]) for path in layers[0]}
    if left:
        raise UserError(
            f"Nothing reads the tensor {next(iter(left))!r} of the weights: give those of a DiT "
            f"with {config.num_layers} layers."
        )

    def one(path: tuple, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_of(path)
        if name not in flat or flat[name].shape != wanted.shape:
            found = flat[name].shape if name in flat else "nothing"
            raise UserError(
                f"The weights have {found} for {name}, but config.task.model needs "
                f"{wanted.shape}: choose the model that they were trained with."
            )
        return flat[name]

    shapes = Network.of(lambda rngs: Denoiser(config, rngs=rngs)).shapes()
    return jax.tree_util.tree_map_with_path(one, shapes)
