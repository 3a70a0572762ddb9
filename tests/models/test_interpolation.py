"""Position tables on another grid: values by hand, and what may not differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoisers import SMALL, evaluate, latents, network_of, random_params

from walt_jax.errors import UserError
from walt_jax.models.denoiser import interpolate_positions


def test_tables_go_to_another_grid():
    """W.A.L.T's aspect ratio 16 x 28 in small: 5x4x4 with 5x2x2 to 5x4x8 with 5x2x4."""
    old = dataclasses.replace(SMALL, grid=(5, 4, 4))
    new = dataclasses.replace(old, grid=(5, 4, 7), windows=((1, 0, 0), (0, 2, 7)))
    params = random_params(old)
    ramp = np.arange(4.0, dtype=np.float32)
    params["spatial_embedding"] = jnp.tile(jnp.tile(ramp, 4)[:, None], (1, 32))
    out = interpolate_positions(params, old, new)
    shapes = network_of(new)[1]
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(lambda s: s.shape, shapes)
    frame = np.asarray(out["spatial_embedding"]).reshape(4, 7, 32)
    expected = np.clip((np.arange(7) + 0.5) * 4 / 7 - 0.5, 0, 3)
    np.testing.assert_allclose(
        frame, np.broadcast_to(expected[None, :, None], frame.shape), atol=1e-5
    )
    np.testing.assert_array_equal(out["temporal_embedding"], params["temporal_embedding"])
    tables = [
        [p["stages"][0]["layers"][i]["attentions"][0]["biases"][0]["table"] for p in (params, out)]
        for i in (0, 1)
    ]
    for before, after in tables:  # what a place says of itself stays
        middle = [tuple(n // 2 for n in x.shape[1:4]) for x in (before, after)]
        np.testing.assert_allclose(before[:, *middle[0]], after[:, *middle[1]], atol=1e-6)
    z = latents(config=new)
    assert np.isfinite(evaluate(new, out, z, [5])).all()
    same = interpolate_positions(params, old, old)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_grids_apart_nothing_is_interpolated():
    params = random_params(SMALL)
    for change in ({"width": 16}, {"num_classes": 3}):
        with pytest.raises(UserError, match="only grid and windows may differ"):
            interpolate_positions(params, SMALL, dataclasses.replace(SMALL, **change))
