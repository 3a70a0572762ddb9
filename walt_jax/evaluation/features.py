"""Networks that turn videos into features, by name.

net = features.load("i3d")
moments = Moments.empty(net.dims)
moments.add(net(videos_BTHWC))
"""

import dataclasses
import importlib
from collections.abc import Callable, Collection
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from walt_jax.errors import UserError
from walt_jax.parallel import AXES, Layout
from walt_jax.parallel.sharding import batch_sharding, place, replicated

PyTree = Any
FIXTURE = "frechet_fixture"

# Name -> module, whose function of the name `load_NAME` (- becomes _) makes the network.
_MODULES = {
    "i3d": "walt_jax.evaluation.i3d",
    "i3d-pool": "walt_jax.evaluation.i3d",
    "inception": "walt_jax.evaluation.inception",
    "inception-logits": "walt_jax.evaluation.inception",
    "c3d": "walt_jax.evaluation.c3d",
    "videomae": "walt_jax.evaluation.videomae",
    "clip": "walt_jax.evaluation.clip",
}


class FeatureNet(Protocol):
    """What scores need to know of a network.

    Attributes:
      name: 'i3d' and so on.
      weights_hash: sha256 of the weights file.
      trained: False for stand-in weights, whose scores are named frechet_fixture.
      dims: width of the features.
      min_frames: of a video.
      max_frames: of a video, or None for any number; 1 is a network of single frames.
      resize: name of the resize in use (see `resize.py`).
    """

    name: str
    weights_hash: str
    trained: bool
    dims: int
    min_frames: int
    max_frames: int | None
    resize: str

    def __call__(self, videos_BTHWC: np.ndarray) -> np.ndarray:
        """Features, float32 (B, dims), of uint8 videos (B, T, H, W, 3) of one size."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extractor:
    """A FeatureNet from a function of parameters and clips.

    Every device takes `group` clips at a time, whatever the batch: the features of a clip depend on
    neither the number of devices nor the batch, and one shape of clip is compiled once. With
    several processes each gives clips of its own, which its own devices share; the sums are joined
    by `Moments.over_processes`.

    Attributes:
      weights: what the weights are, such as 'rgb_scratch' or 'fixture'.
      apply: of parameters and uint8 clips (group, T, H, W, 3); float32 (group, dims). Products are
        in float32 on any chip.
      params: on the host.
      group: 1 gives the same bits anywhere; more suits networks of single frames.
      mesh: whose devices are used, or None for the first device.
      The others are FeatureNet's.
    """

    name: str
    weights: str
    weights_hash: str
    trained: bool
    dims: int
    min_frames: int
    resize: str
    apply: Callable[[PyTree, jax.Array], jax.Array]
    params: dataclasses.InitVar[PyTree]
    mesh: dataclasses.InitVar[Mesh | None] = None
    max_frames: int | None = None
    group: int = 1

    def __post_init__(self, params: PyTree, mesh: Mesh | None) -> None:
        # Of this process only, side by side: no network here talks between devices.
        here = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
        local = Mesh(np.array(here).reshape(-1, *(1,) * (len(AXES) - 1)), AXES)
        everywhere = jax.tree.map(lambda _: replicated(local), params)
        layout = Layout(local)

        def program(clips: jax.Array, params: PyTree) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                return layout.by_clip(lambda c, p: self.apply(p, c), clips, params)

        object.__setattr__(self, "_placed", place(params, everywhere))
        object.__setattr__(self, "_sharding", batch_sharding(local))
        object.__setattr__(self, "_program", jax.jit(program))

    def __call__(self, videos_BTHWC: np.ndarray) -> np.ndarray:
        """As FeatureNet says.

        Raises:
          UserError: too few frames, or too many.
          ValueError: no uint8 videos.
        """
        videos = jax.device_get(videos_BTHWC)
        if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8:
            raise ValueError(f"videos are {videos.dtype} {videos.shape}, not uint8 (B, T, H, W, 3)")
        frames = videos.shape[1]
        if not _fits(self, frames):
            raise UserError(
                f"{self.name} needs {_takes(self)} a video, {frames} given: make "
                f"{'longer' if frames < self.min_frames else 'shorter'} clips"
                f"{', or give them to features.of_clips.' if self.max_frames == 1 else '.'}"
            )
        step = self._sharding.mesh.size * self.group
        found = []
        for start in range(0, len(videos), step):
            clips = videos[start : start + step]
            missing = step - len(clips)
            clips = np.concatenate([clips, np.repeat(clips[-1:], missing, 0)]) if missing else clips
            found.append(self._program(place(clips, self._sharding), self._placed))
        rows = [jax.device_get(f) for f in found]
        return np.concatenate([np.zeros((0, self.dims), np.float32), *rows])[: len(videos)]


def load(
    name: str,
    weights: str | None = None,
    *,
    resize: str | None = None,
    mesh: Mesh | None = None,
    allow: Collection[str] = (),
) -> FeatureNet:
    """Makes a feature network.

    Args:
      name: one of `names()`, or `module:function` of your own, called with this function's other
        arguments.
      weights: path of its weights, or a URL that ends in #sha256=...; None for the published ones,
        from the cache or the address in docs/evaluation.md.
      resize: instead of the network's own (see `resize.py`).
      mesh: whose devices are used; None is the first device.
      allow: for I3D, kinds of weights that are otherwise refused ('rgb_imagenet', 'unknown'). For
        other networks 'trained' vouches that a file whose hash is not known holds trained weights;
        without it scores are named frechet_fixture.

    Raises:
      UserError: no such network, or weights that are missing, damaged or of the wrong kind.
    """
    module, _, function = name.partition(":")
    if not function:
        if name not in _MODULES:
            raise UserError(
                f"No feature network is named {name!r}: choose one of {', '.join(names())}, or "
                "module:function of your own."
            )
        module, function = _MODULES[name], f"load_{name.replace('-', '_')}"
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The feature network {name} cannot be loaded ({error}): name a function of a module "
            "that Python finds."
        ) from error
    return make(weights, resize=resize, mesh=mesh, allow=allow)


def of_clips(net: FeatureNet, clips_BTHWC: np.ndarray) -> np.ndarray:
    """Features of clips: float32 (B, K, dims), where K is 1, or T of a network of single frames."""
    if net.max_frames != 1:
        return net(clips_BTHWC)[:, None]
    return net(single_frames(clips_BTHWC)).reshape(len(clips_BTHWC), -1, net.dims)


def check_clips(net: FeatureNet, num_frames: int) -> None:
    """Refuses a number of frames, before there are clips of it, that `of_clips` would refuse.

    Raises:
      UserError: too few frames, or too many.
    """
    if net.max_frames != 1 and not _fits(net, num_frames):
        raise UserError(
            f"{net.name} needs clips of {_takes(net)}, but protocol.num_frames is {num_frames}: "
            "change it, or choose other features."
        )


def _fits(net: FeatureNet, frames: int) -> bool:
    return net.min_frames <= frames and (net.max_frames is None or frames <= net.max_frames)


def _takes(net: FeatureNet) -> str:
    least, most = net.min_frames, net.max_frames
    if least == most:
        return f"{least} frame{'s' * (least > 1)}"
    return f"at least {least} frames" if most is None else f"{least} to {most} frames"


def single_frames(videos_BTHWC: np.ndarray) -> np.ndarray:
    """Every frame as a video of its own, for networks of images: (B * T, 1, H, W, C)."""
    return np.reshape(videos_BTHWC, (-1, 1, *np.shape(videos_BTHWC)[2:]))


def names() -> list[str]:
    """The networks that `load` knows."""
    return list(_MODULES)


def score_name(net: FeatureNet) -> str:
    """What the Frechet distance on these features is called; stand-in weights make no FVD."""
    if not net.trained:
        return FIXTURE
    return {"i3d": "fvd", "inception": "fid"}.get(net.name, f"fvd_{net.name.replace('-', '_')}")
