"""The TPU kernels of window attention, interpreted."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from walt_jax.kernels import ExtraKv, resolve_window, window_attention
from walt_jax.kernels.attention.tpu import attention, fits
from walt_jax.kernels.attention.tpu_plan import FORWARD, make_plan
from walt_jax.kernels.target import Target, compiling_for, target

SHAPE = (2, 3, 4, 8, 128)  # two heads of 64 share a tile of lanes


def arguments(shape, heads, block, *, bias=False, extra=0, norm=False, grid_keys=True, seed=0):
    """What has gradients, and the output's gradient."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    b, d, length = shape[0], shape[-1], math.prod(block)
    args = {"q": jax.random.normal(next(keys), shape)}
    if grid_keys:
        args["k"], args["v"] = jax.random.normal(next(keys), (2, *shape))
    if bias:
        args["bias"] = jax.random.normal(next(keys), (heads, length, length))
    if extra:
        args["extra_k"], args["extra_v"] = jax.random.normal(next(keys), (2, b, extra, d))
    if norm:
        args["scales"] = 1 + 0.3 * jax.random.normal(next(keys), (2, d // heads))
    return args, jax.random.normal(next(keys), shape)


def kernel(args, heads, block, ids=None, mask=None, causal=False, interpret=True):
    """The function under test."""
    extra = (args["extra_k"], args["extra_v"], mask) if "extra_k" in args else None
    scales = tuple(args["scales"]) if "scales" in args else None
    optional = args.get("k"), args.get("v"), args.get("bias")
    options = {"num_heads": heads, "block": block, "causal": causal, "interpret": interpret}
    return attention(args["q"], *optional, ids, extra, scales, **options)


def reference(args, heads, block, ids=None, mask=None, causal=False):
    """The same in float32 without a kernel."""
    args = {name: x.astype(jnp.float32) for name, x in args.items()}

    def norm(x, scale):
        y = x.reshape(*x.shape[:-1], heads, -1)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6) * scale
        return y.reshape(x.shape)

    if "scales" in args:
        for name, scale in (("q", 0), ("k", 1), ("extra_k", 1)):
            if name in args:
                args[name] = norm(args[name], args["scales"][scale])
    extra = ExtraKv(args["extra_k"], args["extra_v"], mask) if "extra_k" in args else None
    options = {"bias": args.get("bias"), "segment_ids": ids, "causal": causal, "extra_kv": extra}
    grid_keys = args.get("k"), args.get("v")
    return window_attention(args["q"], *grid_keys, num_heads=heads, window=block, **options)


def errors(shape, heads, window, dtype="float32", ids=None, mask=None, causal=False, **options):
    """Greatest differences of output and gradients, relative to the greatest value."""
    block = resolve_window(shape[1:4], window)
    args, dy = arguments(shape, heads, block, **options)
    args, dy = jax.tree.map(lambda x: x.astype(dtype), (args, dy))
    same = {"heads": heads, "block": block, "ids": ids, "mask": mask, "causal": causal}

    @jax.jit
    def both(args, dy):
        found, pull = jax.vjp(functools.partial(kernel, **same), args)
        expected, pull_expected = jax.vjp(functools.partial(reference, **same), args)
        assert found.dtype == dtype
        return (found, pull(dy)), (expected, pull_expected(dy.astype(jnp.float32)))

    with jax.default_matmul_precision("highest"):
        found, expected = both(args, dy)

    def difference(a, b):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        return np.abs(a - b).max() / np.abs(b).max()

    return jax.tree.map(difference, found, expected)


def assert_close(*args, tolerance=1e-5, **options):
    found = errors(*args, **options)
    assert all(e < tolerance for e in jax.tree.leaves(found)), found


def ids_of(shape):
    return jax.random.randint(jax.random.key(9), shape[:4], 0, 2)


def mask_of(shape, extra):
    return jnp.arange(extra) < jnp.array([[extra], [max(1, extra // 2)]])[: shape[0]]


@pytest.mark.parametrize(
    ("shape", "heads", "window"),
    [
        (SHAPE, 2, (1, 0, 0)),
        ((1, 3, 4, 16, 128), 2, (0, 2, 8)),
        (SHAPE, 2, (0, 1, 1)),  # windows of a tile kept apart by a mask
        ((1, 2, 4, 6, 128), 2, (0, 2, 3)),  # likewise, of a width that no block has
        ((1, 2, 4, 8, 144), 2, (1, 0, 0)),  # heads that straddle tiles of lanes
        ((1, 1, 4, 8, 256), 2, (1, 0, 0)),
        ((1, 1, 4, 8, 128), 4, (1, 0, 0)),
        ((1, 3, 16, 16, 128), 2, (0, 0, 0)),  # queries in three parts
    ],
)
def test_equals_the_reference(shape, heads, window):
    assert_close(shape, heads, window)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"ids": ids_of(SHAPE)},
        {"causal": True},
        {"causal": 2},
        {"extra": 5, "mask": mask_of(SHAPE, 5)},
        {"extra": 16},
        {"extra": 5, "mask": mask_of(SHAPE, 5), "grid_keys": False},
        {"norm": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_an_option_equals_the_reference(options):
    assert_close(SHAPE, 2, (0, 2, 8), **options)


@pytest.mark.parametrize(
    ("shape", "chip"),
    [
        (SHAPE, Target(cores=1)),  # the bias is turned once for all windows
        (SHAPE, Target(cores=1, matrix_unit=256)),  # sums as rows of a product
        ((3, *SHAPE[1:]), Target(cores=2)),  # turned at each use: cores divide no three videos
        ((1, 3, 16, 16, 128), Target(cores=1, matrix_unit=256)),  # queries in three parts
    ],
)
def test_chips_differ_in_what_they_do_and_not_in_what_comes_out(shape, chip):
    with compiling_for(chip):
        assert target() == chip
        window = (0, 0, 0) if shape[0] == 1 else (0, 2, 8)
        options = {"bias": True} if shape[0] == 1 else {"bias": True, "causal": 2}
        assert_close(shape, 2, window, **options)


ALL = {"bias": True, "extra": 5, "norm": True, "causal": 2}


@pytest.mark.parametrize("window", [(0, 2, 8), (0, 1, 1)])
def test_all_options_at_once(window):
    assert_close(SHAPE, 2, window, ids=ids_of(SHAPE), mask=mask_of(SHAPE, 5), **ALL)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "heads"), [((2, 5, 16, 16, 128), 2), ((1, 3, 16, 16, 144), 2)])
def test_all_options_at_once_with_queries_in_parts(shape, heads):
    assert_close(shape, heads, (0, 0, 0), ids=ids_of(shape), mask=mask_of(shape, 5), **ALL)


def test_bfloat16():
    assert_close(SHAPE, 2, (0, 2, 8), dtype="bfloat16", tolerance=2e-2, bias=True, extra=5)
    assert_close(SHAPE, 2, (0, 1, 1), dtype="bfloat16", tolerance=2e-2, norm=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 72, 88, 112, 128])
@pytest.mark.parametrize("window", [(1, 0, 0), (0, 8, 8), (0, 1, 1), (0, 8, 14), (0, 0, 0)])
def test_every_window_width_and_dtype(window, width, dtype):
    shape = (1, 5, 8, 28 if window == (0, 8, 14) else 16, 2 * width)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert_close(shape, 2, window, dtype=dtype, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_and_options(seed):
    rng = np.random.default_rng(seed)
    block = tuple(int(n) for n in rng.integers(1, [4, 5, 9]))
    grid = tuple(int(n * w) for n, w in zip(rng.integers(1, 4, 3), block))
    heads, width = int(rng.integers(1, 4)), int(rng.choice([8, 32, 64, 72, 128]))
    shape = (int(rng.integers(1, 3)), *grid, heads * width)
    extra = int(rng.choice([0, 1, 16, 19]))
    options = {
        "bias": bool(rng.integers(2)),
        "extra": extra,
        "norm": bool(rng.integers(2)),
        "causal": [False, True, 2][rng.integers(3)],
        "ids": ids_of(shape) if rng.integers(2) else None,
        "mask": mask_of(shape, extra) if extra and rng.integers(2) else None,
    }
    assert_close(shape, heads, block, tolerance=2e-5, seed=seed, **options)


@pytest.mark.parametrize("window", [(1, 0, 0), (0, 1, 1)])
@pytest.mark.parametrize("name", ["q", "k", "v", "dy"])
def test_nan_stays_in_its_window(window, name):
    block = resolve_window(SHAPE[1:4], window)
    args, dy = arguments(SHAPE, 2, block)
    if name == "dy":
        dy = dy.at[0, 1, 2, 3].set(jnp.nan)
    else:
        args[name] = args[name].at[0, 1, 2, 3].set(jnp.nan)
    out, pull = jax.vjp(functools.partial(kernel, heads=2, block=block), args)
    places = np.stack(np.indices(SHAPE[1:4]), -1)
    same = (places // block == np.array([1, 2, 3]) // block).all(-1)
    for x in (out, *jax.tree.leaves(pull(dy))):
        broken = np.isnan(np.asarray(x)).any(-1)
        assert not broken[1].any() and not broken[0][~same].any()
    assert name == "dy" or np.isnan(np.asarray(out)[0, 1, 2, 3]).all()


def test_what_is_padded_has_no_say_and_no_gradient():
    args, dy = arguments(SHAPE, 2, (3, 2, 8), extra=5, grid_keys=False)
    mask = jnp.zeros((2, 5), bool).at[0, 1].set(True)
    holes = {n: jnp.where(mask[..., None], args[n], jnp.nan) for n in ("extra_k", "extra_v")}
    attend = functools.partial(kernel, heads=2, block=(3, 2, 8), mask=mask)
    out, pull = jax.vjp(attend, args | holes)
    np.testing.assert_array_equal(out, attend(args))
    assert not np.any(out[1])
    (gradients,) = pull(dy)
    assert all(np.all(np.isfinite(g)) for g in gradients.values())
    reached = np.abs(np.asarray(gradients["extra_v"])).sum(-1) > 0
    np.testing.assert_array_equal(reached, mask)
    assert not np.any(gradients["q"][1])


@pytest.mark.parametrize(("causal", "frames"), [(True, [0, 1]), (1, [1]), (2, [0, 1])])
def test_no_gradient_from_hidden_frames(causal, frames):
    args, dy = arguments(SHAPE, 2, (3, 4, 8))
    attend = functools.partial(kernel, heads=2, block=(3, 4, 8), causal=causal)
    _, pull = jax.vjp(attend, args)
    (gradients,) = pull(dy * (jnp.arange(3) == 1)[:, None, None, None])
    reached = np.abs(np.asarray(gradients["k"])) + np.abs(np.asarray(gradients["v"]))
    assert [t for t in range(3) if reached[:, t].any()] == frames


@pytest.mark.parametrize("window", [(0, 2, 8), pytest.param((0, 1, 1), marks=pytest.mark.slow)])
def test_no_races(window):
    """Also that memory which was not written is not read."""
    block = resolve_window(SHAPE[1:4], window)
    args, dy = arguments(SHAPE, 2, block, bias=True, extra=5)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    attend = functools.partial(kernel, heads=2, block=block, mask=mask_of(SHAPE, 5))
    expected, pull_expected = jax.vjp(attend, args)
    out, pull = jax.vjp(functools.partial(attend, interpret=interpret), args)
    found, wanted = jax.tree.leaves((out, pull(dy))), jax.tree.leaves((expected, pull_expected(dy)))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_what_fits():
    bf16 = jnp.dtype("bfloat16")
    for width in (64, 72, 88, 112, 128):
        # All lanes of heads that straddle tiles go together, and VMEM does not hold much of that.
        for grid in [(5, 16, 16), (5, 32, 56)] if 128 % width == 0 else [(5, 16, 16)]:
            for window in ((1, 0, 0), (0, 1, 1), (0, 8, 8)):
                block = resolve_window(grid, window)
                assert fits(grid, 16 * width, 16, block, bf16, extra=77), (grid, window, width)
    assert fits((5, 16, 28), 1024, 16, (5, 8, 14), bf16)
    assert not fits((5, 16, 28), 1408, 16, (5, 8, 14), bf16, bias=True)  # its gradient alone 77 MiB
    assert fits((5, 16, 16), 1024, 16, (5, 8, 8), bf16, bias=True)
    assert fits((5, 16, 16), 1024, 16, (5, 16, 16), bf16)
    assert not fits((17, 64, 64), 1024, 16, (17, 64, 64), bf16)  # beyond VMEM
    assert not fits((5, 16, 16), 1000, 10, (1, 16, 16), bf16)
    assert not fits((5, 16, 16), 1024, 16, (1, 16, 16), jnp.dtype("float16"))


def test_plans_of_small_windows_fill_a_tile():
    plan = make_plan((4, 5, 16, 16, 1024), 16, (5, 1, 1), FORWARD)
    assert plan.length >= 64 and plan.merged
    plan = make_plan((4, 5, 16, 16, 1024), 16, (1, 16, 16), FORWARD)
    assert plan.tile == (1, 16, 16) and plan.tiles == (2, 1, 1)
