"""What is summed over videos: the sums of two disjoint sets add up to those of both."""

import abc
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from walt_jax.data.sprite_readback import read_back
from walt_jax.data.sprites import COLOURS, DIRECTIONS, SHAPES
from walt_jax.errors import UserError
from walt_jax.evaluation.clips import compared
from walt_jax.evaluation.features import FeatureNet, of_clips, score_name
from walt_jax.evaluation.frechet import (
    class_sums,
    frechet_distance,
    inception_score_of,
    kernel_distance,
)
from walt_jax.evaluation.moments import Moments
from walt_jax.evaluation.protocols import Protocol
from walt_jax.evaluation.scores import Record

State = dict[str, np.ndarray]


class Measure(abc.ABC):
    """Sums over videos, in float64, and the scores that follow from them.

    Attributes:
      record: what the scores depend on beside the videos, JSON values.
    """

    record: Record

    @abc.abstractmethod
    def add(self, numbers: np.ndarray, videos: np.ndarray, real: np.ndarray | None = None) -> None:
        """Counts in videos of these numbers (B,), uint8 (B, T, H, W, 3).

        `real` is what they are reconstructions of, where they are.
        """

    @abc.abstractmethod
    def state(self) -> State:
        """The sums."""

    @abc.abstractmethod
    def absorb(self, state: State) -> None:
        """Adds the sums of other videos."""

    @abc.abstractmethod
    def results(self) -> dict[str, tuple[float, ...]]:
        """Name of a score -> its value of each fold."""


def describe(net: FeatureNet) -> Record:
    """What of a feature network a score depends on."""
    return {
        "name": net.name,
        "weights": net.weights_hash,
        "trained": net.trained,
        "dims": net.dims,
        "resize": net.resize,
    }


class FeatureSums(Measure):
    """Moments of the features of clips that come as they are compared, a set for each fold.

    Networks of single frames give those of every frame.

    Attributes:
      moments: of each fold.
      rows: float32 (kept, D), features of the first videos themselves, or of their middle frames.
    """

    def __init__(
        self, net: FeatureNet, folds: int = 1, fold_size: int = 0, *, kept: int = 0
    ) -> None:
        """`fold_size` videos make a fold, by their numbers; 0 where there is one fold."""
        self._net, self._fold_size = net, fold_size
        self.moments = [Moments.empty(net.dims) for _ in range(folds)]
        self.rows = np.zeros((kept, net.dims), np.float32)
        self.record = {"features": describe(net)}

    def add(self, numbers: np.ndarray, videos: np.ndarray, real: np.ndarray | None = None) -> None:
        features = of_clips(self._net, videos)
        folds = numbers // self._fold_size if len(self.moments) > 1 else np.zeros_like(numbers)
        for fold in np.unique(folds):
            self.moments[fold].add(np.concatenate(features[folds == fold]))
        first = numbers < len(self.rows)
        self.rows[numbers[first]] = features[first, features.shape[1] // 2]

    def state(self) -> State:
        return {
            "count": np.array([m.count for m in self.moments], np.float64),
            "total": np.stack([m.total for m in self.moments]),
            "outer": np.stack([m.outer for m in self.moments]),
            "rows": self.rows,
        }

    def absorb(self, state: State) -> None:
        rows = zip(state["count"], state["total"], state["outer"])
        self.moments = [
            mine.merge(Moments(round(float(row[0])), *row[1:]))
            for mine, row in zip(self.moments, rows)
        ]
        self.rows = self.rows + state["rows"]  # zero where they were not counted

    def results(self) -> dict[str, tuple[float, ...]]:
        return {}


class Frechet(FeatureSums):
    """The Frechet distance of samples to real clips: `fvd`, or `frechet_fixture`.

    Where the reference keeps features, also the kernel distance to these.
    """

    def __init__(
        self,
        net: FeatureNet,
        protocol: Protocol,
        reference: Moments,
        real_rows: np.ndarray | None = None,
        *,
        cut: bool = False,
        prefix: str = "",
    ) -> None:
        """Nothing is counted yet.

        Args:
          net: of the features.
          protocol: how samples are brought before it.
          reference: the sums of the real clips.
          real_rows: float32 (K, D), features of some real clips, for the kernel distance.
          cut: whether what comes is cut to the protocol's frames already.
          prefix: of the names of scores with trained weights.
        """
        kept = 0 if real_rows is None else min(len(real_rows), protocol.total_samples)
        super().__init__(net, protocol.folds, protocol.num_samples, kept=kept)
        self._protocol, self._reference, self._real_rows = protocol, reference, real_rows
        if kept:
            self.record["kernel"] = {"real": len(real_rows), "samples": kept}
        self._stride = 1 if cut else protocol.stride
        self._name = score_name(net)
        if net.trained:
            self._name = prefix + self._name

    def add(self, numbers: np.ndarray, videos: np.ndarray, real: np.ndarray | None = None) -> None:
        p, stride = self._protocol, self._stride
        frames = slice(0, (p.num_frames - 1) * stride + 1, stride)
        clips = [compared(video[frames], p) for video in videos]
        super().add(numbers, np.stack(clips))

    def results(self) -> dict[str, tuple[float, ...]]:
        folds = (
            frechet_distance(m, self._reference, unbiased=self._protocol.unbiased)
            for m in self.moments
        )
        found = {self._name: tuple(folds)}
        if len(self.rows):
            name = self._name.replace("fvd", "kvd").replace("fid", "kid")
            name = name.replace("frechet", "kernel")
            found[name] = (kernel_distance(self._real_rows, self.rows)[0],)
        return found


_PARTS: Mapping[str, Mapping] = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}


class ReadBack(Measure):
    """Shares of sprite samples that show the colour, shape and direction of their class.

    A program looks (`walt_jax.data.sprite_readback`) that knows the names, but not what was asked.
    """

    def __init__(
        self,
        label_names: Sequence[str],
        labels: np.ndarray,
        fps: float,
        folds: int = 1,
        fold_size: int = 0,
    ) -> None:
        """Takes the classes' names and the class of each sample.

        Raises:
          UserError: the classes are no sprites.
        """
        self._asked = [name.split() for name in label_names]
        for words in self._asked:
            if len(words) != 3 or any(w not in known for w, known in zip(words, _PARTS.values())):
                raise UserError(
                    f"The class {' '.join(words)!r} is no sprite such as 'red square left': only "
                    "a model of the built-in sprite videos can be read back."
                )
        self._options = {
            f"{part}s": tuple(sorted({words[i] for words in self._asked}))
            for i, part in enumerate(_PARTS)
        }
        self._labels, self._fps, self._fold_size = labels, fps, fold_size
        self._right = np.zeros((folds, len(_PARTS) + 1))
        self._count = np.zeros(folds)
        self.record = {"read_back": {k: list(v) for k, v in self._options.items()}}

    def add(self, numbers: np.ndarray, videos: np.ndarray, real: np.ndarray | None = None) -> None:
        for number, video in zip(numbers, videos):
            seen = read_back(video, self._fps, **self._options, forced=True)
            asked = self._asked[self._labels[number]]
            right = [a == f for a, f in zip(asked, (seen.colour, seen.shape, seen.direction))]
            fold = number // self._fold_size if len(self._count) > 1 else 0
            self._right[fold] += [*right, all(right)]
            self._count[fold] += 1

    def state(self) -> State:
        return {"right": self._right, "count": self._count}

    def absorb(self, state: State) -> None:
        self._right = self._right + state["right"]
        self._count = self._count + state["count"]

    def results(self) -> dict[str, tuple[float, ...]]:
        shares = (self._right / self._count[:, None]).T
        names = [*(f"read_back/{part}" for part in _PARTS), "read_back"]
        return {name: tuple(map(float, row)) for name, row in zip(names, shares)}


class Means(Measure):
    """Means over videos of what functions say of each, alone or beside its original or its text."""

    def __init__(
        self,
        functions: Mapping[str, Callable[..., np.ndarray]],
        *,
        pairs: bool = False,
        texts: Sequence[str] = (),
        net: FeatureNet | None = None,
        folds: int = 1,
        fold_size: int = 0,
    ) -> None:
        """Nothing is counted yet.

        Args:
          functions: name of a score -> function of uint8 (B, T, H, W, 3) to (B,).
          pairs: whether they take the originals too.
          texts: of the videos, in turn, which functions take then; in place of originals.
          net: that they use, for the record.
          folds: sets of videos.
          fold_size: videos that make a fold, by their numbers.
        """
        self._functions, self._pairs, self._texts = functions, pairs, texts
        self._fold_size = fold_size
        self._sums, self._count = np.zeros((folds, len(functions))), np.zeros(folds)
        self.record = {"functions": sorted(functions)}
        if net is not None:
            self.record["features"] = describe(net)

    def add(self, numbers: np.ndarray, videos: np.ndarray, real: np.ndarray | None = None) -> None:
        given: tuple = (videos, real) if self._pairs else (videos,)
        if self._texts:
            given = (videos, [self._texts[n % len(self._texts)] for n in numbers])
        found = [np.asarray(f(*given), np.float64) for f in self._functions.values()]
        folds = numbers // self._fold_size if len(self._count) > 1 else np.zeros_like(numbers)
        np.add.at(self._sums, folds, np.stack(found, 1))
        np.add.at(self._count, folds, 1.0)

    def state(self) -> State:
        return {"sums": self._sums, "count": self._count}

    def absorb(self, state: State) -> None:
        self._sums = self._sums + state["sums"]
        self._count = self._count + state["count"]

    def results(self) -> dict[str, tuple[float, ...]]:
        means = (self._sums / self._count[:, None]).T
        return {name: tuple(map(float, row)) for name, row in zip(self._functions, means)}


class InceptionScore(Measure):
    """The inception score of each fold, by a network of class logits: `is`, or `is_fixture`.

    Networks of single frames judge every frame.
    """

    def __init__(self, net: FeatureNet, protocol: Protocol) -> None:
        self._net, self._protocol, folds = net, protocol, protocol.folds
        self._count, self._inner = np.zeros(folds), np.zeros(folds)
        self._total = np.zeros((folds, net.dims))
        self.record = {"features": describe(net)}

    def add(self, numbers: np.ndarray, videos: np.ndarray, real: np.ndarray | None = None) -> None:
        p = self._protocol
        clips = [compared(video[: p.span : p.stride], p) for video in videos]
        for number, logits in zip(numbers, of_clips(self._net, np.stack(clips))):
            fold = number // p.num_samples if p.folds > 1 else 0
            total, inner = class_sums(logits)
            self._total[fold] += total
            self._inner[fold] += inner
            self._count[fold] += len(logits)

    def state(self) -> State:
        return {"count": self._count, "total": self._total, "inner": self._inner}

    def absorb(self, state: State) -> None:
        self._count = self._count + state["count"]
        self._total = self._total + state["total"]
        self._inner = self._inner + state["inner"]

    def results(self) -> dict[str, tuple[float, ...]]:
        name = "is" if self._net.trained else "is_fixture"
        folds = zip(self._count, self._total, self._inner)
        return {name: tuple(inception_score_of(*sums) for sums in folds)}


class Shown(Measure):
    """The first videos themselves, to be looked at; no score follows."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        """`shape` is frames, height and width."""
        self.videos = np.zeros((count, *shape, 3), np.uint8)
        self.record = {}

    def add(self, numbers: np.ndarray, videos: np.ndarray, real: np.ndarray | None = None) -> None:
        first = numbers < len(self.videos)
        self.videos[numbers[first]] = videos[first]

    def state(self) -> State:
        return {"videos": self.videos}

    def absorb(self, state: State) -> None:
        self.videos = self.videos + state["videos"]  # zero where they were not counted

    def results(self) -> dict[str, tuple[float, ...]]:
        return {}
