"""Distances between two sets of features: Frechet's, of Gaussians, and the kernel distance.

The Frechet distance of Gaussians (1706.08500, section 2; of videos: 1812.01717, section 3) is
|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)). The last trace is the sum of the singular
values of C1^(1/2) C2^(1/2), with roots by symmetric eigenvalues. Unlike the root of the product,
which is not symmetric, that is stable where there are fewer videos than dimensions.
"""

import numpy as np

from walt_jax.errors import UserError
from walt_jax.evaluation.moments import Moments


def frechet_distance(a: Moments, b: Moments, *, unbiased: bool = True) -> float:
    """The squared Frechet distance of the Gaussians with these moments.

    Args:
      a, b: of features of one network.
      unbiased: covariances divided by N - 1, as in the published FVD; else by N (StyleGAN-V).

    Returns:
      At least 0; 0 for equal moments, up to rounding of about 1e-13 of the variance.

    Raises:
      UserError: fewer than two videos on a side, or features of different widths.
    """
    if a.dims != b.dims:
        raise UserError(
            f"Features of {a.dims} and of {b.dims} dimensions cannot be compared: use one feature "
            "network for both sides."
        )
    roots = [_root(m, unbiased) for m in (a, b)]
    traces = sum(np.square(root).sum() for root in roots)
    shared = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + traces - 2 * shared
    return float(max(distance, 0.0))


def _root(moments: Moments, unbiased: bool) -> np.ndarray:
    """R (D, K) with R R^T the covariance, K its rank."""
    values, vectors = np.linalg.eigh(moments.covariance(unbiased))
    # What rounding leaves of directions without variance; the sums hold the mean's square too.
    scale = max(values[-1], np.square(moments.mean).max())
    kept = values > moments.dims * np.finfo(np.float64).eps * scale
    return vectors[:, kept] * np.sqrt(values[kept])


def kernel_distance(
    x_ND: np.ndarray, y_MD: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (KID of 1801.01401, section 4; on I3D's features, KVD).

    The unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, averaged over
    random subsets. Its expectation does not depend on the number of videos, unlike Frechet's.

    Args:
      x_ND, y_MD: features of the two sets.
      subsets: how many are drawn, each without replacement.
      size: videos of a subset on each side, at most; all where there are fewer.
      seed: of the choice.

    Returns:
      The mean over the subsets and their standard deviation; it may be slightly below 0.

    Raises:
      UserError: fewer than two videos on a side, or features of different widths.
    """
    x, y = (np.asarray(f, np.float64) for f in (x_ND, y_MD))
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"Features of {x.shape[1]} and of {y.shape[1]} dimensions cannot be compared: use one "
            "feature network for both sides."
        )
    size = min(len(x), len(y), size)
    if size < 2:
        raise UserError(
            f"The kernel distance needs at least 2 videos a side, {len(x)} and {len(y)} given: "
            "give more videos."
        )
    if size == len(x) == len(y):
        subsets = 1
    rng = np.random.default_rng(seed)
    values = [
        _discrepancy(*(f[rng.permutation(len(f))[:size]] for f in (x, y))) for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared discrepancy of two sets of one size."""
    n = len(x)
    within = [(k.sum() - np.trace(k)) / (n * (n - 1)) for k in (_kernel(x, x), _kernel(y, y))]
    return sum(within) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits_ND: np.ndarray, *, splits: int = 10) -> tuple[float, float]:
    """The inception score (1606.03498, section 4) of logits of classes.

    exp of the mean Kullback-Leibler divergence between each video's classes and those of all.

    Args:
      logits_ND: of frames by Inception, of videos by C3D (UCF-101's score).
      splits: equal parts, in order, which are scored by themselves (MAGVIT: its 4 folds).

    Returns:
      The mean over the parts and their standard deviation; between 1 and the number of classes.

    Raises:
      UserError: fewer videos than parts.
    """
    logits = np.asarray(logits_ND, np.float64)
    if not 1 <= splits <= len(logits):
        raise UserError(
            f"The inception score of {len(logits)} videos cannot be split into {splits} parts: "
            "give more videos or fewer splits."
        )
    scores = [
        inception_score_of(len(part), *class_sums(part)) for part in np.array_split(logits, splits)
    ]
    return float(np.mean(scores)), float(np.std(scores))


def class_sums(logits_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """What an inception score needs of logits: sums of p (D,), and of p log p, in float64."""
    logits = np.asarray(logits_ND, np.float64)
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    return p.sum(0), float((p * log_p).sum())


def inception_score_of(count: int, total: np.ndarray, inner: float) -> float:
    """The inception score of `count` videos with the `class_sums` (total, inner)."""
    mean = total / count
    # Where the mean is 0 so are all p, and the product is 0.
    log_mean = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    return float(np.exp(inner / count - (mean * log_mean).sum()))
