"""Videos and images in one batch."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

from walt_jax.data.pipeline import Pipeline

IMAGES = "image/"  # before the names of a joint batch's images


class Joint:
    """Batches of videos that also hold images: the two go through the step together.

    An image is a clip of one frame. The arrays of a batch of images are added to those of the
    videos under names that begin with `image/`.
    """

    def __init__(self, videos: Pipeline, images: Pipeline) -> None:
        self._videos, self._images = videos, images

    @property
    def pipelines(self) -> list[Pipeline]:
        """Of the videos and of the images."""
        return [self._videos, self._images]

    def num_clips(self, k: int) -> int:
        """Videos in batch k."""
        return self._videos.num_clips(k)

    @property
    def broken(self) -> dict[str, str]:
        """As of `Pipeline`, of both."""
        return {**self._videos.broken, **self._images.broken}

    def describe(self) -> str:
        """One line for both."""
        return f"{self._videos.describe()}; images from {self._images.describe()}"

    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Every bucket of videos with every bucket of images."""
        both = itertools.product(self._videos.shapes(), self._images.shapes())
        return [_beside(videos, images) for videos, images in both]

    def on_devices(self, sharding: NamedSharding, start: int = 0) -> Iterator[dict[str, jax.Array]]:
        """As `Pipeline.on_devices`."""
        both = zip(*(p.on_devices(sharding, start) for p in (self._videos, self._images)))
        return (_beside(videos, images) for videos, images in both)


def _beside(videos: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    return videos | {f"{IMAGES}{name}": array for name, array in images.items()}
