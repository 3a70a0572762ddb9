"""The unified mask: which latents training gives."""

import jax
import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.tasks.base import sample_keys
from walt_jax.tasks.given import GivenConfig, draw_masks


def test_masks_are_of_their_kinds_and_shares():
    keys, grid = jax.random.split(jax.random.key(0), 600), (5, 4, 6)
    frames = {
        kind: np.asarray(draw_masks(GivenConfig(**{kind: 1.0}), keys, grid))
        for kind in ("first", "last", "ends", "every_other", "random", "region")
    }
    assert all(m.dtype == bool and m.shape == (600, *grid) for m in frames.values())
    first = frames["first"][:, :, 0, 0]
    assert set(map(tuple, first.astype(int))) == {(1, 0, 0, 0, 0), (1, 1, 0, 0, 0)}
    assert 0.4 < first[:, 1].mean() < 0.6
    last = frames["last"][:, :, 0, 0]
    assert set(map(tuple, last.astype(int))) == {(0, 0, 0, 0, 1), (0, 0, 0, 1, 1)}
    assert (frames["ends"][:, :, 0, 0] == [1, 0, 0, 0, 1]).all()
    assert (frames["every_other"][:, :, 0, 0] == [1, 0, 1, 0, 1]).all()
    assert 0.45 < frames["random"].mean() < 0.55
    for kind, m in frames.items():  # whole frames, or the same in all frames
        assert (m == (m[:, :1] if kind == "region" else m[:, :, :1, :1])).all()
    left = ~frames["region"][:, 0]  # a box, of at least one latent
    box = left.any(1)[:, None, :] & left.any(2)[:, :, None]
    assert (left == box).all() and left.any((1, 2)).all()
    assert len({tuple(m.ravel()) for m in left}) > 50
    mixed = draw_masks(GivenConfig(first=0.3, ends=0.2), keys, grid)
    assert 0.42 < 1 - np.asarray(mixed).any((1, 2, 3)).mean() < 0.58


def test_wrong_shares_and_counts_of_given_frames_are_named():
    with pytest.raises(UserError, match="sum to more than 1"):
        GivenConfig(first=0.7, last=0.7)
    with pytest.raises(UserError, match="at least 1"):
        GivenConfig(first_frames=(0,))
    with pytest.raises(UserError, match="gives all of clips of 3"):
        draw_masks(
            GivenConfig(first=1.0, first_frames=(3,)), sample_keys(jax.random.key(0), 2), (3, 1, 1)
        )
