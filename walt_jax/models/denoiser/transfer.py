"""Staged training: a trained denoiser's weights for another grid, for videos, for more conditions.

The path of a parameter says which one of the old model it continues, and how.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from walt_jax.errors import UserError
from walt_jax.kernels import resolve_window
from walt_jax.kernels.window_attention import Window
from walt_jax.models.build import Network, Params
from walt_jax.models.denoiser.config import DenoiserConfig
from walt_jax.models.denoiser.denoiser import Denoiser
from walt_jax.models.denoiser.layers import sinusoids
from walt_jax.models.denoiser.patches import sincos, volume
from walt_jax.parallel.sharding import path_of


def transfer(params: Params, old: DenoiserConfig, new: DenoiserConfig, fresh: Params) -> Params:
    """Weights trained as `Denoiser(old)` for `Denoiser(new)`.

    *Another grid, other windows.* Learned tables are interpolated, the absolute ones along rows,
    columns and frames, the relative ones along the offsets of their windows: linearly, the papers
    name no method. W.A.L.T goes from 5x16x16 with windows of 5x8x8 to 5x16x28 with 5x8x14 in this
    way (2312.06662, table 6). A table that keeps its size keeps its values. A model of images has
    no table of frames: the videos' starts at 0.

    *From images to videos.* An old window goes on as the new one with its rule for rows and columns
    that sees one frame, too. All other new windows are parts that the old model lacks: layers in
    between ("alternate"), attentions within the layers ("block"), a stage ("stages"). Where the
    numbers of windows are equal, each goes on as its counterpart.

    *More conditions.* Channels that the old model lacks enter with weights of 0.

    Parts that the old model lacks come from `fresh`, but the outputs of their branches (attention,
    cross-attention, MLP, pooled text) are 0, and gates of their own are 1: were these 0 as well,
    neither would ever have a gradient. So the new model starts as the old one, on images and on
    each frame of a video by itself, whatever it is told by channels or as text, as long as no
    latents are given by other ways. What this leaves out:

    - Classes: the new label of no class does what the old one did, or what a model without classes
      did; the entries of classes are fresh where their number changes. Without classes the new
      model starts as the old one does at no class. (Not where conditions are tokens.)
    - positions="sincos": frame t gets the fixed embedding of t, which a model of images has never
      seen. That of frame 0 is taken off the inputs' biases, so that images and first frames are as
      before; later frames are not. With "sincos_space", which a model of images with "sincos" may
      become, all are.
    - A window of images that goes on as one over several frames (full attention, W.A.L.T's
      spatiotemporal windows): the weights fit, but frames see each other from the start.
    - An old cross-attention whose queries get another window, or that reads more tokens.
    - Upsampling: two times share the sinusoids. The Dense layer that reads them is fitted to what
      it gave for one; without time_mlp there is none, and the new model is told time otherwise.

    Args:
      params: of `Denoiser(old)`, numpy or jax arrays.
      old, new: sizes; beside what is said above `remat`, `kept`, `attention` and `dtype`
        may differ.
      fresh: newly drawn parameters of `Denoiser(new)`, numpy or jax arrays.

    Returns:
      Params of `Denoiser(new)`, float32 numpy arrays; those that stay are not copied.

    Raises:
      UserError: anything else differs, or `params` are of another model; the sentence names it.
    """
    for mistake in _mistakes(old, new):
        raise UserError(mistake)
    had = {
        path_of(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    }
    shapes = Network.of(lambda rngs: Denoiser(old, rngs=rngs)).shapes()
    for path, wanted in jax.tree_util.tree_leaves_with_path(shapes):
        name = path_of(path)
        if name not in had or had[name].shape != wanted.shape:
            found = had[name].shape if name in had else "nothing"
            raise UserError(
                f"The weights of config.task.init_from have {found} for {name}, but the "
                f"config beside them needs {wanted.shape}: give the folder of an unchanged run."
            )
    move = _Move(old, new, _places(old, new), had)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(move(path_of(path), np.asarray(leaf)), np.float32),
        jax.device_get(fresh),
    )


_SAME = (
    "latent_channels",
    "patch_size",
    "width",
    "num_heads",
    "mlp_ratio",
    "relative_bias",
    "positions",
    "frame_times",
    "qk_norm",
    "skips",
    "output_conv",
    "conditioning",
    "time_mlp",
    "learned_sigma",
)
_LACKED = {
    "text_features": 0,
    "pooled_text": False,
    "given": "none",
    "self_conditioning": False,
    "upsampling": None,
}


def _mistakes(old: DenoiserConfig, new: DenoiserConfig) -> Iterator[str]:
    """What differs and may not, a sentence each."""
    same = [*_SAME, *(name for name, lacking in _LACKED.items() if getattr(old, name) != lacking)]
    if old.conditioning == "adaln_lora":
        same.append("adaln_rank")
    if old.tokens[0] > 1:
        same += ["causal", "image_identity"]  # a model of images has seen neither
    if old.num_classes and new.num_classes:
        same.append("null_class")
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in same]
    if old.reads:
        pairs += [
            (
                f"cross_attention.{name}",
                getattr(old.cross_attention, name),
                getattr(new.cross_attention, name),
            )
            for name in ("queries", "norm")
        ]
    if len(old.windows) > 1 and len(new.windows) > 1:
        pairs.append(("order", old.order, new.order))
    for name, before, after in pairs:
        if before != after and not (name == "positions" and _learns_frames(old, new)):
            yield (
                f"The weights of config.task.init_from have {name}={before!r}, but "
                f"config.task.model.{name} is {after!r}: make it the same, or leave init_from out."
            )
    if old.tokens[0] > 1 == new.tokens[0]:
        yield (
            f"The weights of config.task.init_from are of videos, grid={old.grid}, but "
            f"config.task.model.grid={new.grid} has one frame: weights go from images to videos, "
            "not back."
        )
    if _places(old, new) is None:
        yield (
            f"The windows {old.windows} of the weights of config.task.init_from do not recur in "
            f"config.task.model.windows={new.windows} with order={new.order!r}: keep them in their "
            "order, and add windows over frames between them."
        )
    elif _depth(old) != _depth(new):
        yield (
            f"Each window in the weights of config.task.init_from has a depth of {_depth(old)}, "
            f"but in config.task.model it has {_depth(new)}: change config.task.model.num_layers."
        )


def _learns_frames(old: DenoiserConfig, new: DenoiserConfig) -> bool:
    """Whether the fixed positions of a frame stay and those of frames are new."""
    return (old.positions, old.tokens[0], new.positions) == ("sincos", 1, "sincos_space")


def _depth(config: DenoiserConfig) -> int:
    """Layers that each window is in."""
    turns = len(config.windows) if config.order in ("alternate", "stages") else 1
    return config.num_layers // turns


def _places(old: DenoiserConfig, new: DenoiserConfig) -> tuple[int | None, ...] | None:
    """For each new window the old one that it continues, or None for a part that the old model
    lacks; None in all where an old window would be lost."""
    befores, afters = _sizes(old), _sizes(new)
    if len(befores) == len(afters):
        fits = all(
            [n > 1 for n in before[1:]] == [n > 1 for n in after[1:]]
            and (before[0] == 1 or after[0] > 1)
            for before, after in zip(befores, afters)
        )
        return tuple(range(len(befores))) if fits else None
    if new.order == "heads":
        return None
    places, at = [], 0
    for i in range(len(afters)):
        continues = at < len(befores) and _alike(old, new, at, i)
        places.append(at if continues else None)
        at += continues
    # In a layer of adaLN-single only the first attention reads through the norm.
    first = new.order == "block" and new.conditioning == "adaln_single" and places[0] is None
    return tuple(places) if at == len(befores) and not first else None


def _sizes(config: DenoiserConfig) -> list[Window]:
    return [resolve_window(config.tokens, window) for window in config.windows]


def _alike(old: DenoiserConfig, new: DenoiserConfig, i: int, j: int) -> bool:
    """Whether windows see one frame both or several both, and rows and columns by one rule."""

    def rule(config: DenoiserConfig, at: int) -> list[str]:
        return [
            "whole" if size == axis else "one" if size == 1 else "part"
            for size, axis in zip(_sizes(config)[at][1:], config.tokens[1:])
        ]

    frames = (_sizes(old)[i][0] > 1) == (_sizes(new)[j][0] > 1)
    named = old.windows[i][1:] == new.windows[j][1:]
    return frames and (named or rule(old, i) == rule(new, j))


@dataclasses.dataclass(frozen=True)
class _Move:
    """A parameter of the new model, from its path and its fresh value."""

    old: DenoiserConfig
    new: DenoiserConfig
    places: tuple[int | None, ...]
    had: dict[str, np.ndarray]

    def __call__(self, name: str, fresh: np.ndarray) -> np.ndarray:
        old, new = self.old, self.new
        x = self.had.get(self._source(name))
        match name.split("/"):
            case ["patch_in", "kernel"]:
                return self._channels(x)
            case ["patch_in", "bias"] | ["embed", "given", "bias"] if x is not None:
                return x - self._unseen_position()
            case ["spatial_embedding"]:
                frame = x.reshape(*old.tokens[1:], -1)
                return _resize(frame, (*new.tokens[1:], old.width)).reshape(fresh.shape)
            case ["temporal_embedding"]:
                return np.zeros_like(fresh) if x is None else _resize(x, fresh.shape)
            case ["axes", _, "table"] | [*_, "biases", _, "table"] if x is not None:
                return _resize(x, fresh.shape)
            case ["embed", "class_embedding"]:
                return self._classes(x, fresh)
            case ["embed", "time", "dense_in", "kernel"] if new.upsampling and not old.upsampling:
                return _fit_to_two_times(x)
            case ["embed", "time", "dense_out", "bias"] if _adds_up(new) and not new.num_classes:
                return x + self._no_class()
            case ["adaln", _] | [*_, "modulation", "table"]:
                return self._vectors(x, fresh, bias=name == "adaln/bias")
            case [*_, "modulation", "dense" | "lora_b", leaf]:
                return self._vectors(x, fresh, bias=leaf == "bias")
            case [*_, "out" | "down" | "pooled", "kernel" | "bias"] if x is None:
                return np.zeros_like(fresh)
        if x is not None and x.shape != fresh.shape:
            raise UserError(
                f"The weights of config.task.init_from have {x.shape} for {name}, but "
                f"config.task.model needs {fresh.shape}: leave config.task.init_from out."
            )
        return fresh if x is None else x

    def _source(self, name: str) -> str | None:
        """The path in the old model, which may lack it."""
        order = self.new.order
        match name.split("/"):
            case ["stages", stage, "layers", layer, *rest]:
                if order == "stages":
                    stage = self.places[int(stage)]
                elif order == "alternate":
                    layer = self.places[int(layer)]
                if order == "block" and rest[0] == "attentions":
                    rest[1] = self.places[int(rest[1])]
                if rest[0] == "norms":
                    rest[1] = self._branches()[int(rest[1])]
                parts = ["stages", stage, "layers", layer, *rest]
                return None if None in parts else "/".join(map(str, parts))
        return name

    def _branches(self) -> list[int | None]:
        """For each branch of a new layer that has a norm or vectors of its own, the number of the
        old one."""

        def names(config: DenoiserConfig, attentions: Sequence[Any]) -> list[Any]:
            if config.order != "block":
                attentions = [0]
            elif config.conditioning == "adaln_single":
                attentions = attentions[:1]
            cross = config.reads and config.cross_attention.norm == "modulated"
            return [*attentions, *["cross"] * cross, "mlp"]

        before = names(self.old, range(len(self.old.windows)))
        return [
            before.index(name) if name in before else None for name in names(self.new, self.places)
        ]

    def _vectors(self, x: np.ndarray | None, fresh: np.ndarray, *, bias: bool) -> np.ndarray:
        """Shifts, scales and gates along the last axis: old branches keep theirs, those of new ones
        are 0 but for a bias of 1 in their gates."""
        each = (2 if self.new.conditioning == "adaln" else 3, self.new.width)
        branches = self._branches()
        out = np.zeros((*fresh.shape[:-1], len(branches), *each), np.float32)
        if bias:
            out[..., 2:, :] = 1.0
        if x is not None:
            x = x.reshape(*x.shape[:-1], -1, *each)
            for i, branch in enumerate(branches):
                if branch is not None:
                    out[..., i, :, :] = x[..., branch, :, :]
        return out.reshape(fresh.shape)

    def _channels(self, x: np.ndarray) -> np.ndarray:
        """The kernel of the patches (pt ph pw C, D) with zeros for channels that it lacks."""
        before, after = _channels(self.old), _channels(self.new)
        places = volume(self.old.patch_size)
        x = x.reshape(places, -1, x.shape[-1])
        out = np.zeros((places, len(after), x.shape[-1]), np.float32)
        out[:, [after.index(channel) for channel in before]] = x
        return out.reshape(-1, x.shape[-1])

    def _unseen_position(self) -> np.ndarray | float:
        """The fixed embedding of frame 0, where the old model has had none."""
        fixed = self.new.positions == "sincos"
        first = fixed and self.old.tokens[0] == 1 < self.new.tokens[0]
        return sincos(np.zeros(1), self.new.width)[0] if first else 0.0

    def _classes(self, x: np.ndarray | None, fresh: np.ndarray) -> np.ndarray:
        table, classes = fresh.copy(), self.new.num_classes
        if self.old.num_classes == classes:
            table[:classes] = x[:classes]
        table[classes:] = self._no_class()
        return table

    def _no_class(self) -> np.ndarray | float:
        """The old model's vector of no class."""
        table = self.had.get("embed/class_embedding")
        return 0.0 if table is None or not self.old.null_class else table[-1]


def _adds_up(config: DenoiserConfig) -> bool:
    """Whether time and class act by their sum."""
    return config.conditioning not in ("in_context", "cross_attention")


def _channels(config: DenoiserConfig) -> list[tuple[str, int]]:
    """What each channel is that `Embedder.channels` gives."""
    latent = config.latent_channels
    sizes = {
        "z": latent,
        "estimate": latent * config.self_conditioning,
        "given": (latent + 1) * (config.given == "channels"),
        "low": latent * (config.upsampling is not None),
    }
    return [(name, i) for name, size in sizes.items() for i in range(size)]


def _fit_to_two_times(kernel: np.ndarray) -> np.ndarray:
    """The Dense layer of a time's sinusoids (F, D) for half of them, 0 for the other time's.

    Fewer frequencies cannot give the same; least squares over the times come nearest.
    """
    features, times = kernel.shape[0], np.arange(1001.0, dtype=np.float32)
    all_of_them, half = (
        np.asarray(jax.device_get(sinusoids(times, n)), np.float64)
        for n in (features, features // 2)
    )
    rows = np.linalg.lstsq(half, all_of_them @ kernel, rcond=1e-4)[0]
    return np.concatenate([rows, np.zeros_like(rows)])


def _resize(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Linear interpolation between the middles of the places, the same beyond the outer ones."""
    for axis, size in enumerate(shape):
        before = x.shape[axis]
        if before == size:
            continue
        at = np.clip((np.arange(size) + 0.5) * before / size - 0.5, 0, before - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, before - 1)
        share = (at - low).astype(np.float32).reshape(-1, *[1] * (x.ndim - axis - 1))
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x
