"""Pipelines that tests read from."""

import itertools

from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.records import open_dataset

SIZES = ((16, 16), (16, 24), (24, 16))


def make(dataset, *, batch_size=8, seed=3, split="train", shuffle=True, **config):
    """A pipeline of short clips; `dataset` is a Dataset or its folder."""
    dataset = open_dataset(getattr(dataset, "directory", dataset))
    config = {"num_frames": 5, "sizes": SIZES, "eval_fraction": 0.2, "num_threads": 2} | config
    config = DataConfig(str(dataset.directory), **config)
    return Pipeline(dataset, config, batch_size=batch_size, seed=seed, split=split, shuffle=shuffle)


def take(pipeline, count, start=0, rows=None):
    return list(itertools.islice(pipeline.batches(start, rows), count))
