"""Scores of videos frame by frame: PSNR, SSIM and MS-SSIM (by TensorFlow), LPIPS."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from walt_jax.errors import UserError
from walt_jax.models.perceptual import LpipsVgg
from walt_jax.parallel.sharding import Layout

_LEAST = {"psnr": 1, "ssim": 11, "ms_ssim": 161}  # pixels a side


def psnr(videos_BTHWC: np.ndarray, others_BTHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, averaged over frames.

    Args:
      videos_BTHWC, others_BTHWC: uint8 of one shape.

    Returns:
      float32 (B,); infinite where a frame equals its other.

    Raises:
      UserError: shapes or types differ from that.
    """
    return _by_tensorflow("psnr", videos_BTHWC, others_BTHWC)


def ssim(videos_BTHWC: np.ndarray, others_BTHWC: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004, Gaussian windows of 11x11 with a deviation of 1.5,
    colours averaged), averaged over frames: float32 (B,), at most 1. Arguments as in `psnr`, of
    11x11 pixels or more."""
    return _by_tensorflow("ssim", videos_BTHWC, others_BTHWC)


def ms_ssim(videos_BTHWC: np.ndarray, others_BTHWC: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity (Wang et al. 2003, five scales), averaged over frames:
    float32 (B,), at most 1. Arguments as in `psnr`, of 161x161 pixels or more."""
    return _by_tensorflow("ms_ssim", videos_BTHWC, others_BTHWC)


def _by_tensorflow(name: str, videos: np.ndarray, others: np.ndarray) -> np.ndarray:
    _check(name, videos, others, _LEAST[name])
    import tensorflow as tf  # seconds to import

    function = {
        "psnr": tf.image.psnr,
        "ssim": tf.image.ssim,
        "ms_ssim": tf.image.ssim_multiscale,
    }[name]
    with tf.device("/CPU:0"):  # JAX has the others
        # A video at a time: its frames are the batch.
        rows = [function(a, b, max_val=255).numpy().mean() for a, b in zip(videos, others)]
    return np.array(rows, np.float32)


def lpips(weights: str, sha256: str = "") -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Loads LPIPS on VGG-16 (1801.03924).

    Args:
      weights: path or URL of its file; docs/weights.md says how to make it.
      sha256: of the file; needed for a URL.

    Returns:
      A function of two uint8 (B, T, H, W, 3) to float32 (B,): the distance averaged over frames, of
      16x16 pixels or more.

    Raises:
      UserError: the file is missing or lacks a tensor.
    """
    network = LpipsVgg(weights=weights, sha256=sha256)
    params = jax.device_put(network.load())

    @jax.jit
    def distance(params: dict, a: jax.Array, b: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            scaled = (v.astype(jnp.float32) / 127.5 - 1 for v in (a, b))
            return network.distance(params, *scaled, Layout()).mean()

    def run(videos_BTHWC: np.ndarray, others_BTHWC: np.ndarray) -> np.ndarray:
        _check("lpips", videos_BTHWC, others_BTHWC, 16)
        pairs = zip(videos_BTHWC, others_BTHWC)
        found = [distance(params, *jax.device_put(pair)) for pair in pairs]
        return np.array(jax.device_get(found), np.float32)

    return run


def _check(name: str, videos: np.ndarray, others: np.ndarray, least: int) -> None:
    shapes = np.shape(videos), np.shape(others)
    if shapes[0] != shapes[1] or len(shapes[0]) != 5 or shapes[0][-1] != 3:
        raise UserError(
            f"{name} compares videos (B, T, H, W, 3) of one shape, {shapes[0]} and {shapes[1]} "
            "given: cut or resize them first."
        )
    if videos.dtype != np.uint8 or others.dtype != np.uint8:
        raise UserError(
            f"{name} compares uint8 videos, {videos.dtype} and {others.dtype} given: convert them."
        )
    if min(shapes[0][2:4]) < least:
        size = "x".join(map(str, shapes[0][2:4]))
        raise UserError(
            f"{name} takes frames of {least}x{least} or more, {size} given: leave it out or use "
            "larger videos."
        )
