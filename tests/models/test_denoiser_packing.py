"""Packed videos: the denoiser gives each what it gives it alone, and no other one reaches it."""

import functools
import math
from dataclasses import replace as change

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoisers import network_of, random_params

from walt_jax.errors import UserError
from walt_jax.models import Conditions, DenoiserConfig, Packing
from walt_jax.models.denoiser import CrossAttentionConfig
from walt_jax.models.denoiser.packing import from_row, to_frame, to_row, whole

WINDOWS = DenoiserConfig(
    grid=(4, 8, 8),
    latent_channels=3,
    width=32,
    num_heads=4,
    num_layers=2,
    windows=((1, 0, 0), (2, 4, 4)),
    positions="fractional",
    num_classes=5,
    self_conditioning=True,
    remat=False,
    dtype="float32",
)
TOKENS = change(
    WINDOWS,
    patch_size=(1, 2, 2),
    windows=((0, 0, 0),),
    relative_bias=False,
    image_identity=False,
    positions="factorised",
)
# Sizes (T, H, W) in latents: two rows, one of which two videos and padding share.
SIZES = [[(2, 4, 4), (4, 8, 4), (2, 4, 4)], [(2, 4, 8), (2, 4, 4)]]


def pack(config, block, sizes, rows, *, seed=0, keep=None):
    """Random videos, and the rows of so many blocks that hold them.

    Returns the videos by row, the latents (B, N, t, h, w, C), and the packing; `keep` is the share
    of each video's blocks that are not dropped.
    """
    rng = np.random.default_rng(seed)
    videos = [[rng.standard_normal((*s, 3)).astype(np.float32) for s in row] for row in sizes]
    z = rng.standard_normal((len(sizes), rows, *block, 3)).astype(np.float32)  # padding: anything
    most = max(map(len, sizes))
    segments = np.full(z.shape[:2], -1, np.int32)
    places = np.zeros((*z.shape[:2], 3), np.int32)
    extents = np.zeros((len(sizes), most, 3), np.int32)
    for b, row in enumerate(videos):
        n = 0
        for s, video in enumerate(row):
            extents[b, s] = np.array(video.shape[:3]) // config.patch_size
            corners = [
                (t, h, w)
                for t in range(0, video.shape[0], block[0])
                for h in range(0, video.shape[1], block[1])
                for w in range(0, video.shape[2], block[2])
            ]
            if keep:
                left = rng.permutation(len(corners))[: max(1, round(keep * len(corners)))]
                corners = [corners[i] for i in left]
            for corner in corners:
                cut = tuple(slice(c, c + size) for c, size in zip(corner, block))
                z[b, n], segments[b, n] = video[cut], s
                places[b, n] = np.array(corner) // config.patch_size
                n += 1
    size = tuple(np.array(block) // config.patch_size)
    return videos, z, Packing(*map(jnp.asarray, (segments, places, extents)), block=size)


def told(config, sizes, seed=1):
    """Random times and conditions of the videos: (B, S) and the like."""
    rng, shape = np.random.default_rng(seed), (len(sizes), max(map(len, sizes)))
    t = rng.integers(0, 1000, shape).astype(np.float32)
    conditions = {"label": rng.integers(0, 5, shape).astype(np.int32)}
    if config.text_features:
        conditions["text"] = rng.standard_normal((*shape, 6, config.text_features)).astype("f4")
        conditions["text_mask"] = rng.random((*shape, 6)) < 0.7
    return t, conditions


def gathered(packing, blocks, b, s, shape):
    """Video s of row b, put together from its blocks."""
    out = np.full((*shape, blocks.shape[-1]), np.nan, np.float32)
    for n in np.flatnonzero(np.asarray(packing.segments[b]) == s):
        t, h, w = blocks.shape[2:5]
        scale = np.array((t, h, w)) // packing.block
        i, j, k = np.asarray(packing.places[b, n]) * scale
        out[i : i + t, j : j + h, k : k + w] = blocks[b, n]
    return out


CASES = {
    "windows": (WINDOWS, (2, 4, 4)),
    "windows without bias, absolute": (
        change(WINDOWS, relative_bias=False, positions="factorised"),
        (2, 4, 4),
    ),
    "several windows in a block": (change(WINDOWS, windows=((1, 0, 0), (2, 2, 2))), (2, 4, 4)),
    "time": (change(WINDOWS, windows=((1, 0, 0), (0, 1, 1)), order="block"), (2, 4, 4)),
    "heads": (change(WINDOWS, windows=((0, 0, 0), (2, 4, 4)), order="heads"), (2, 4, 4)),
    "tokens": (TOKENS, (1, 2, 2)),
    "tokens in windows": (
        change(TOKENS, windows=((1, 0, 0), (0, 2, 2), (0, 1, 1)), num_layers=3),
        (1, 2, 2),
    ),
    "tokens, time added": (
        change(TOKENS, conditioning="added", skips=True, num_layers=3),
        (1, 2, 2),
    ),
    "text": (
        change(WINDOWS, text_features=7, pooled_text=True, conditioning="adaln_single"),
        (2, 4, 4),
    ),
    "text alone": (
        change(TOKENS, text_features=7, cross_attention=CrossAttentionConfig(queries=False)),
        (1, 2, 2),
    ),
}


@functools.cache
def compiled(config):
    network, _ = network_of(config)
    return jax.jit(
        lambda params, z, t, conditions, packing=None: network.bind(params)(
            z, t, conditions, packing=packing
        )
    )


def _marked(name):
    return name if name in ("windows", "tokens") else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", map(_marked, CASES))
def test_a_packed_video_comes_out_as_alone(name):
    config, block = CASES[name]
    count = 12 if block[0] == 2 else 60
    videos, z, packing = pack(config, block, SIZES, count)
    t, conditions = told(config, SIZES)
    estimate = z[:, :, ::-1]
    params, run = random_params(config), compiled(config)
    out = np.asarray(run(params, z, t, Conditions(estimate=estimate, **conditions), packing))
    assert out.shape == z.shape
    for b, row in enumerate(videos):
        for s, video in enumerate(row):
            own = {n: x[b : b + 1, s] for n, x in conditions.items()}
            own["estimate"] = gathered(packing, estimate, b, s, video.shape[:3])[None]
            alone = run(params, video[None], t[b : b + 1, s], Conditions(**own))[0]
            found = gathered(packing, out, b, s, video.shape[:3])
            np.testing.assert_allclose(found, alone, atol=2e-5 * np.abs(alone).max())


@pytest.mark.parametrize(
    "name", ["windows", pytest.param("tokens", marks=pytest.mark.slow), _marked("text")]
)
def test_no_video_reaches_another_one_and_padding_none(name):
    config, block = CASES[name]
    _, z, packing = pack(config, block, SIZES, 12 if block[0] == 2 else 60)
    t, conditions = told(config, SIZES)
    params, run = random_params(config), compiled(config)

    def error(z, conditions):
        out = run(params, z, t, Conditions(**conditions), packing)
        return jnp.square(out[0][np.asarray(packing.segments[0]) == 1]).sum()

    texts = {k: conditions[k] for k in ("text",) if k in conditions}
    grads = jax.grad(lambda z, texts: error(z, conditions | texts), (0, 1))(z, texts)
    reached = np.abs(np.asarray(grads[0])).max((2, 3, 4, 5)) > 0
    np.testing.assert_array_equal(reached[0], np.asarray(packing.segments[0]) == 1)
    assert not reached[1].any()
    for grad in grads[1].values():
        own = np.abs(np.asarray(grad)).max((2, 3)) > 0
        np.testing.assert_array_equal(own[0], [False, True, False])


def test_dropped_tokens_are_seen_by_none():
    """What is left attends as a shorter video: the same in every order of the blocks."""
    _, z, packing = pack(TOKENS, (1, 2, 2), [[(2, 4, 4), (2, 8, 8)]], 24, keep=0.5)
    t, conditions = told(TOKENS, [[(2, 4, 4), (2, 8, 8)]])
    run, params = compiled(TOKENS), random_params(TOKENS)
    out = np.asarray(run(params, z, t, Conditions(**conditions), packing))
    order = np.random.default_rng(0).permutation(24)
    turned = change(packing, segments=packing.segments[:, order], places=packing.places[:, order])
    again = np.asarray(run(params, z[:, order], t, Conditions(**conditions), turned))
    real = np.asarray(packing.segments[0])[order] >= 0
    assert real.sum() == 4 + 16
    np.testing.assert_allclose(again[0, real], out[0, order][real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["factorised", "fractional"])
def test_positions_of_other_sizes(positions):
    """A fractional position depends on the share of the axis; an absolute one does not."""
    config = change(TOKENS, positions=positions, grid=(4, 16, 16))
    params, run = random_params(config), compiled(config)
    z = np.ones((1, 1, 16, 16, 3), np.float32)
    conditions = Conditions(label=np.zeros(1, np.int32))
    outs = [run(params, z[:, :, :n, :n], np.zeros(1), conditions) for n in (8, 16)]
    assert all(np.isfinite(out).all() for out in outs)
    if positions == "factorised":
        with pytest.raises(UserError, match=r"at most \(4, 16, 16\)"):
            run(params, np.ones((1, 1, 32, 16, 3), np.float32), np.zeros(1), conditions)
    else:
        larger = run(params, np.ones((1, 1, 32, 16, 3), np.float32), np.zeros(1), conditions)
        assert np.isfinite(larger).all()


def test_rows_of_blocks_and_back():
    blocks = np.arange(2 * 3 * 2 * 4 * 5 * 2).reshape(2, 3, 2, 4, 5, 2)
    row = to_row(jnp.asarray(blocks))
    assert row.shape == (2, 2, 4, 15, 2)
    np.testing.assert_array_equal(row[:, :, :, 5:10], blocks[:, 1])
    np.testing.assert_array_equal(from_row(row, 3), blocks)


def test_a_line_of_tokens_is_a_frame():
    x = jnp.arange(2 * 24 * 3).reshape(2, 1, 1, 24, 3)
    assert to_frame(x).shape == (2, 1, 8, 3, 3)
    np.testing.assert_array_equal(to_frame(x).reshape(x.shape), x)
    assert to_frame(x[:, :, :, :20]).shape == (2, 1, 1, 20, 3)
    tokens = whole((1, 1, 1))
    for window in ((0, 1, 1), (1, 0, 0), (0, 2, 2)):  # no row of the frame is a window
        assert tokens.native(window) == (0, 0, 0)


def test_window_ids_are_of_the_videos_windows():
    _, _, packing = pack(WINDOWS, (2, 4, 4), SIZES, 12)
    for window in ((1, 0, 0), (0, 0, 0), (0, 1, 1), (2, 4, 0)):
        ids = np.asarray(from_row(packing.window_ids(window)[..., None], 12))[..., 0]
        assert (ids[np.asarray(packing.segments) < 0] == -1).all()
        for b, row in enumerate(SIZES):
            count = sum(math.prod(-(-n // (w or n)) for n, w in zip(size, window)) for size in row)
            assert len(np.unique(ids[b][ids[b] >= 0])) == count


@pytest.mark.parametrize(
    "other, words",
    [
        ({"positions": "learned", "relative_bias": False}, "positions='learned'"),
        ({"conditioning": "cross_attention"}, "conditioning='cross_attention'"),
        ({"causal": True}, "causal"),
        ({"output_conv": True}, "output_conv"),
        ({"given": "adaln"}, "given='adaln'"),
        ({"windows": ((2, 8, 8),)}, "relative_bias"),
    ],
)
def test_what_cannot_be_packed_is_told(other, words):
    config = change(WINDOWS, **other)
    _, z, packing = pack(config, (2, 4, 4), SIZES, 12)
    t, conditions = told(config, SIZES)
    network, shapes = network_of(config)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(
            lambda p: network.bind(p)(z, t, Conditions(**conditions), packing=packing), shapes
        )
