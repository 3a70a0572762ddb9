"""From given pixels to given latents."""

import numpy as np
import pytest

from walt_jax.generation.requests import filled, latent_mask, pixel_mask
from walt_jax.tasks import GivenConfig


def test_a_latent_is_given_whose_pixels_all_are():
    known = np.zeros((9, 4, 4), bool)
    known[:5] = True
    known[5:8, :2] = True  # not the whole group
    known[0, 3, 3] = False
    mask = latent_mask(known, (4, 2, 2))
    assert mask.shape == (3, 2, 2)
    assert mask[0].tolist() == [[True, True], [True, False]]
    assert mask[1].all() and not mask[2].any()
    back = pixel_mask(mask, (4, 2, 2))
    assert back.shape == known.shape and not (back & ~known).any()
    assert back[1:5].all() and not back[0, 2:, 2:].any() and back[0, :2].all()
    images = np.ones((3, 4, 4), bool)  # of a tokenizer of images, frame by frame
    images[1] = False
    assert latent_mask(images, (1, 2, 2))[:, 0, 0].tolist() == [True, False, True]


def test_what_is_not_given_repeats_the_nearest():
    frames = np.arange(9, dtype=np.uint8)[None, :, None, None, None] * np.ones(
        (2, 9, 2, 3, 3), "u1"
    )
    frames[1] += 100
    known = np.zeros((9, 2, 3), bool)
    known[[2, 7]] = True
    assert filled(frames, known)[:, :, 0, 0, 0].tolist() == [
        [2, 2, 2, 2, 2, 7, 7, 7, 7],
        [102] * 5 + [107] * 4,
    ]
    assert (frames[0, 0] == 0).all()  # left as it was
    picture = np.zeros((1, 1, 4, 7, 3), np.uint8)
    picture[..., :2, :] = 10
    picture[..., 6, :] = 50
    known = np.zeros((1, 4, 7), bool)
    known[:, :, :2] = known[:, :, 6] = True
    assert filled(picture, known)[0, 0, 2, :, 1].tolist() == [10, 10, 10, 10, 50, 50, 50]


FRAMES = {
    "first": [0],
    "two": [0, 1],
    "three": [0, 1, 2],
    "last": [4],
    "ends": [0, 4],
    "other": [0, 2, 4],
    "middle": [2],
}


@pytest.mark.parametrize(
    ("config", "admitted"),
    [
        ({"first": 0.5}, {"first", "two"}),
        ({"first": 0.5, "first_frames": (3,)}, {"three"}),
        ({"last": 0.5}, {"last"}),
        ({"ends": 0.5}, {"ends"}),
        ({"every_other": 0.5}, {"other"}),
        ({"random": 0.5}, set(FRAMES)),
        ({"region": 0.5}, set()),
        ({"first": 0.1, "last": 0.1, "ends": 0.1}, {"first", "two", "last", "ends"}),
        ({}, set()),
    ],
)
def test_masks_that_training_draws(config, admitted):
    found = set()
    for name, frames in FRAMES.items():
        mask = np.zeros((5, 2, 2), bool)
        mask[frames] = True
        if GivenConfig(**config).admits(mask):
            found.add(name)
    assert found == admitted


def test_a_region_is_the_same_in_every_frame():
    mask = np.zeros((3, 4, 4), bool)
    mask[:, 1:3] = True
    assert GivenConfig(region=0.5).admits(mask) and not GivenConfig(random=0.5).admits(mask)
    mask[0, 0] = True
    assert not GivenConfig(region=0.5).admits(mask)


def test_given_in_words():
    config = GivenConfig(first=0.1, region=0.1, first_frames=(2, 1))
    assert str(config) == "the first 1 or 2, all but a region of the latent frames"
    assert str(GivenConfig()) == "nothing"
