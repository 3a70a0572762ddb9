"""Mean and covariance of features as sums, so that any number of videos needs the same memory."""

import dataclasses
import io

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from walt_jax.errors import UserError


@dataclasses.dataclass
class Moments:
    """Sums of features and of their products, float64.

    Attributes:
      count: of feature vectors.
      total: (D,), their sum.
      outer: (D, D), the sum of their products.
    """

    count: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def empty(cls, dims: int) -> "Moments":
        """Of no features yet."""
        return cls(0, np.zeros(dims), np.zeros((dims, dims)))

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "Moments":
        """Of features (N, D)."""
        moments = cls.empty(np.shape(features_ND)[-1])
        moments.add(features_ND)
        return moments

    @property
    def dims(self) -> int:
        return len(self.total)

    def add(self, features_ND: np.ndarray) -> None:
        """Counts features (N, D) in.

        Raises:
          UserError: one of them is not finite; nothing is added then.
          ValueError: another shape.
        """
        x = np.asarray(features_ND, np.float64)
        if x.ndim != 2 or x.shape[1] != self.dims:
            raise ValueError(f"features {x.shape} are not (N, {self.dims})")
        bad = np.flatnonzero(~np.isfinite(x).all(1))
        if bad.size:
            raise UserError(
                f"The features of video {self.count + bad[0]} are not finite: look at that video "
                "and at the weights of the feature network."
            )
        self.total += x.sum(0)
        self.outer += x.T @ x
        self.count += len(x)

    def merge(self, other: "Moments") -> "Moments":
        """Those of both sets together.

        Raises:
          ValueError: features of another width.
        """
        if other.dims != self.dims:
            raise ValueError(f"features of {self.dims} and of {other.dims} dimensions")
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def over_processes(self) -> "Moments":
        """Those of all processes together, on each of them; each gives its own."""
        if jax.process_count() == 1:
            return self
        # As bytes: JAX would round float64 to float32.
        flat = np.concatenate([[float(self.count)], self.total, self.outer.ravel()])
        gathered = np.asarray(multihost_utils.process_allgather(flat.view(np.uint8)))
        everyone = gathered.view(np.float64).reshape(jax.process_count(), -1)
        total = everyone.sum(0)
        outer = total[1 + self.dims :].reshape(self.dims, self.dims)
        return Moments(round(total[0]), total[1 : 1 + self.dims], outer)

    @property
    def mean(self) -> np.ndarray:
        """(D,) float64.

        Raises:
          UserError: no features.
        """
        if not self.count:
            raise UserError("There are no features: give at least two videos.")
        return self.total / self.count

    def covariance(self, unbiased: bool = True) -> np.ndarray:
        """(D, D) float64, divided by N - 1, or by N where not `unbiased`.

        Raises:
          UserError: fewer than two features.
        """
        if self.count < 2:
            raise UserError(
                f"A covariance needs at least 2 videos, {self.count} given: give more videos."
            )
        mean = self.mean
        around = self.outer - self.count * np.multiply.outer(mean, mean)
        return around / (self.count - unbiased)

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz file (gs:// too); it is there as a whole or not at all."""
        path, file = epath.Path(path), io.BytesIO()
        np.savez(file, count=self.count, total=self.total, outer=self.outer)
        part = path.with_name(path.name + ".part")
        part.write_bytes(file.getvalue())
        part.rename(path)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Moments":
        """Reads what `save` wrote.

        Raises:
          UserError: missing, damaged, or another kind of file.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"{path} does not exist: compute the statistics first.")
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                count, total, outer = (file[name] for name in ("count", "total", "outer"))
            if outer.shape != total.shape * 2 or total.ndim != 1 or count.ndim:
                raise ValueError("shapes that do not fit together")
        except Exception as error:  # a damaged zip file raises whatever NumPy trips over
            raise UserError(
                f"{path} holds no sums of features ({error}): delete it and compute it again."
            ) from error
        return cls(int(count), total.astype(np.float64), outer.astype(np.float64))
