"""The models that come with the package: whole, small, and as good as their cards say."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

import walt_jax
from benchmarks import sprite_judges
from benchmarks.sprite_generation import EVERY, HELD_OUT
from walt_jax.data.sprites import sprite_video
from walt_jax.generation.walt import ASSETS

FOLDERS = sorted(path for path in ASSETS.iterdir() if path.is_dir())


def test_the_sprites_are_there():
    assert "sprites" in [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_an_asset_is_whole_and_small(folder):
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) < 8.4e6
    hashes = json.loads((folder / "export.json").read_text())["sha256"]
    assert set(sizes) == {*hashes, "export.json", "README.md"}
    card = (folder / "README.md").read_text()
    for name, digest in hashes.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        if name.endswith(".safetensors"):
            assert digest in card
    values = (folder / "config.json").read_text()
    assert "/tmp" not in values and "/home" not in values and "/work" not in values


@pytest.mark.slow
def test_sprites_are_what_prompts_say_that_training_never_had():
    walt = walt_jax.load("sprites")
    truths = []
    for i, (name, ground) in enumerate(4 * HELD_OUT):
        config = dataclasses.replace(EVERY, backgrounds=(ground,), colours=(name.split()[0],))
        truths.append(sprite_video(config, 11, i, config.class_names.index(name)))
    captions = [truth.caption for truth in truths]
    videos = walt.sample(captions, seed=3, guidance=3.0, steps=30)
    assert videos.shape == (24, 9, 64, 64, 3) and videos.dtype == np.uint8
    right = sprite_judges.attributes(videos, truths, EVERY)
    assert min(right.values()) >= 0.8
