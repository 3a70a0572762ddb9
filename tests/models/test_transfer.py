"""Staged training: what a denoiser starts as that takes the weights of another one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoisers import SMALL, evaluate, latents, network_of, random_params

from walt_jax.errors import UserError
from walt_jax.models.denoiser import CrossAttentionConfig, transfer
from walt_jax.models.denoiser.patches import sincos

IMAGE = dataclasses.replace(SMALL, grid=(1, 4, 4), windows=((1, 0, 0),))
PLAIN = dataclasses.replace(IMAGE, relative_bias=False, qk_norm=False, conditioning="adaln_zero")
FACTORISED = {"grid": (3, 4, 4), "windows": ((1, 0, 0), (0, 1, 1))}
READS = CrossAttentionConfig(queries=False, norm="none")
TEXT = {
    "text": jax.random.normal(jax.random.key(3), (1, 5, 6)),
    "text_mask": jnp.array([[True] * 3 + [False] * 2]),
}


def given(config):
    """Latents that are given everywhere and an estimate, on this grid."""
    shape = (1, *config.grid, config.latent_channels)
    x, y = jax.random.normal(jax.random.key(4), (2, *shape))
    return {"given": x, "given_mask": jnp.ones(shape[:-1]), "estimate": y}


def move(old, new, params=None):
    """Fresh parameters are random here: nothing below holds because a layer starts at 0."""
    params = random_params(old) if params is None else params
    return transfer(params, old, new, random_params(new, seed=1))


def frame_by_frame(config, params, z, t=5, **told):
    """(T, H, W, C): the model of images on each frame of one video."""
    frames = z[0][:, None]
    told = {name: jnp.repeat(value, len(frames), 0) for name, value in told.items()}
    return evaluate(config, params, frames, [t] * len(frames), **told)[:, 0]


def close(out, expected):
    assert float(jnp.abs(expected).max()) > 0.5
    np.testing.assert_allclose(out, expected, atol=2e-4, rtol=1e-3)


STAGED = {
    # Learned tables, relative bias, one Dense for all layers and low-rank terms.
    "walt": (
        IMAGE,
        {"grid": (3, 4, 4), "windows": ((1, 0, 0), (0, 2, 2)), "num_layers": 4},
        {},
        {},
    ),
    "latte-learned": (
        dataclasses.replace(PLAIN, windows=((0, 0, 0),)),
        {**FACTORISED, "num_layers": 4},
        {},
        {},
    ),
    "fixed-in-space": (
        dataclasses.replace(PLAIN, positions="sincos"),
        {**FACTORISED, "num_layers": 4, "positions": "sincos_space"},
        {},
        {},
    ),
    "stdit": (
        dataclasses.replace(
            PLAIN, conditioning="adaln_single", text_features=6, cross_attention=READS
        ),
        {**FACTORISED, "order": "block", "causal": True},
        TEXT,
        TEXT,
    ),
    "vdt": (
        dataclasses.replace(PLAIN, conditioning="added"),
        {
            "grid": (3, 4, 4),
            "windows": ((0, 1, 1), (1, 0, 0)),
            "order": "block",
            "given": "in_place",
        },
        {},
        {},
    ),
    # An attention and a cross-attention more in the layers: 12 vectors where there were 6.
    "vivit-3-text": (
        dataclasses.replace(PLAIN, conditioning="adaln_lora"),
        {**FACTORISED, "order": "block", "text_features": 6, "pooled_text": True},
        {},
        TEXT,
    ),
    "vivit-2": (
        dataclasses.replace(PLAIN, conditioning="adaln"),
        {**FACTORISED, "order": "stages", "num_layers": 4},
        {},
        {},
    ),
    "skips": (
        dataclasses.replace(PLAIN, skips=True, num_layers=3),
        {**FACTORISED, "num_layers": 6},
        {},
        {},
    ),
    "channels": (
        dataclasses.replace(PLAIN, grid=(1, 8, 8), patch_size=(1, 2, 2), text_features=6),
        {
            "grid": (3, 8, 8),
            "windows": ((1, 0, 0), (0, 2, 2)),
            "num_layers": 4,
            "self_conditioning": True,
            "given": "channels",
            "cross_attention": CrossAttentionConfig(window=(1, 0, 0)),
        },
        TEXT,
        lambda config: TEXT | given(config),
    ),
}


@pytest.mark.parametrize("name", STAGED)
def test_a_video_model_starts_as_the_image_model(name):
    old, changes, told_images, told = STAGED[name]
    new = dataclasses.replace(old, **changes)
    params, z = random_params(old), latents(config=new)
    told = told(new) if callable(told) else told
    out = evaluate(new, move(old, new, params), z, [5], **told)
    expected = frame_by_frame(old, params, z, **told_images)
    assert float(jnp.abs(expected[0] - expected[1]).max()) > 0.1
    close(out[0], expected)


def test_fixed_positions_leave_images_and_first_frames_as_they_are():
    """Latte: later frames differ by their fixed embedding alone."""
    old = dataclasses.replace(PLAIN, positions="sincos")
    new = dataclasses.replace(old, **FACTORISED, num_layers=4)
    params, z = random_params(old), latents(config=new)
    moved = move(old, new, params)
    out = evaluate(new, moved, z, [5])
    places = sincos(np.arange(3), old.width)
    for i, place in enumerate(places - places[0]):
        patch_in = params["patch_in"] | {"bias": params["patch_in"]["bias"] + place}
        expected = evaluate(old, params | {"patch_in": patch_in}, z[:, i : i + 1], [5])
        close(out[:, i : i + 1], expected)
    close(evaluate(new, moved, z[:, :1], [5]), evaluate(old, params, z[:, :1], [5]))


def test_full_attention_goes_on_as_full_attention():
    """Frames see each other; where they are equal, that changes nothing."""
    old = dataclasses.replace(IMAGE, windows=((0, 0, 0),))
    new = dataclasses.replace(old, grid=(3, 4, 4))
    params, z = random_params(old), latents(config=new)
    moved, still = move(old, new, params), jnp.repeat(z[:, :1], 3, axis=1)
    close(evaluate(new, moved, still, [5])[0], frame_by_frame(old, params, still))
    apart = evaluate(new, moved, z, [5])[0] - frame_by_frame(old, params, z)
    assert float(jnp.abs(apart).max()) > 0.1


@pytest.mark.parametrize(
    ("order", "conditioning"), [("alternate", "adaln_zero"), ("block", "adaln_lora")]
)
def test_what_was_lacking_learns(order, conditioning):
    """Gates and outputs must not both start at 0, even where fresh gates do."""
    old = dataclasses.replace(PLAIN, conditioning=conditioning)
    new = dataclasses.replace(
        old, **FACTORISED, order=order, num_layers=4 if order == "alternate" else 2
    )
    network, _ = network_of(new)
    fresh = jax.jit(network.init)(jax.random.key(0))
    params, z = transfer(random_params(old), old, new, fresh), latents(config=new)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.square(network.bind(p)(z, jnp.array([5]))).sum())(params)

    layers = gradient(params)["stages"][0]["layers"]
    added = {
        "alternate": lambda: [layers[1]["attentions"][0]["out"], layers[1]["down"]],
        "block": lambda: [layers[0]["attentions"][1]["out"]],
    }[order]()
    for leaf in jax.tree.leaves(added):
        assert (np.abs(leaf).reshape(2, -1).max(1) > 1e-6).all()


# Another grid.


def test_tables_go_to_another_grid():
    """W.A.L.T's aspect ratio 16 x 28 in small: 5x4x4 with 5x2x2 to 5x4x7 with 5x2x7."""
    old = dataclasses.replace(SMALL, grid=(5, 4, 4))
    new = dataclasses.replace(old, grid=(5, 4, 7), windows=((1, 0, 0), (0, 2, 7)))
    params = random_params(old)
    ramp = np.arange(4.0, dtype=np.float32)
    params["spatial_embedding"] = jnp.tile(jnp.tile(ramp, 4)[:, None], (1, 32))
    out = move(old, new, params)
    assert jax.tree.map(np.shape, out) == jax.tree.map(lambda s: s.shape, network_of(new)[1])
    frame = out["spatial_embedding"].reshape(4, 7, 32)
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
    assert np.isfinite(evaluate(new, out, latents(config=new), [5])).all()


def test_tables_are_resized_as_pictures_are():
    old = dataclasses.replace(SMALL, windows=((1, 0, 0),))
    new = dataclasses.replace(old, grid=(5, 6, 2))
    params = random_params(old)
    out = move(old, new, params)
    frame = params["spatial_embedding"].reshape(4, 4, 32)
    np.testing.assert_allclose(
        out["spatial_embedding"].reshape(6, 2, 32),
        jax.image.resize(frame, (6, 2, 32), "linear", antialias=False),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        out["temporal_embedding"],
        jax.image.resize(params["temporal_embedding"], (5, 32), "linear", antialias=False),
        atol=1e-6,
    )


def test_on_the_same_grid_nothing_changes():
    old = dataclasses.replace(SMALL, num_classes=3, text_features=6, self_conditioning=True)
    params = random_params(old)
    out = move(old, dataclasses.replace(old, remat=True, dtype="bfloat16"), params)
    jax.tree.map(np.testing.assert_array_equal, out, params)
    assert {(type(x), x.dtype.name) for x in jax.tree.leaves(out)} == {(np.ndarray, "float32")}


# Other conditions.


@pytest.mark.parametrize(("before", "after"), [(0, 3), (2, 3), (2, 0)])
def test_no_class_is_what_it_was(before, after):
    old = dataclasses.replace(PLAIN, num_classes=before)
    new = dataclasses.replace(old, num_classes=after)
    params, z = random_params(old), latents(config=old)
    moved = move(old, new, params)

    def told(classes):
        return {"label": jnp.array([classes])} if classes else {}

    expected = evaluate(old, params, z, [5], **told(before))
    close(evaluate(new, moved, z, [5], **told(after)), expected)
    if after:
        fresh = random_params(new, seed=1)["embed"]["class_embedding"]
        np.testing.assert_array_equal(moved["embed"]["class_embedding"][:after], fresh[:after])


def test_upsampling_nearly_keeps_the_time():
    """What the time's Dense layer reads at low frequencies is also read at half of them."""
    old = dataclasses.replace(PLAIN, self_conditioning=True)
    new = dataclasses.replace(old, upsampling=(1, 2, 2))
    params, z = random_params(old), latents(2, old)
    kernel = np.array(params["embed"]["time"]["dense_in"]["kernel"]).reshape(2, 128, -1)
    kernel[:, :80] = 0.0
    params["embed"]["time"]["dense_in"]["kernel"] = kernel.reshape(256, -1)
    moved, low = move(old, new, params), latents(2, old, seed=5)
    told = {"estimate": latents(2, old, seed=6)}
    expected = evaluate(old, params, z, [5, 700], **told)
    assert float(jnp.abs(expected - evaluate(old, params, z, [300, 300], **told)).max()) > 1
    out = evaluate(new, moved, z, [5, 700], low=low, low_time=jnp.array([100, 3]), **told)
    np.testing.assert_allclose(out, expected, atol=0.02)


# What may not differ.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 16}, "have width=32, but config.task.model.width is 16"),
        ({"num_heads": 8}, "num_heads=4"),
        ({"patch_size": (1, 2, 2)}, "patch_size"),
        ({"conditioning": "adaln_zero"}, "conditioning='adaln_lora'"),
        ({"adaln_rank": 4}, "adaln_rank=2"),
        ({"positions": "sincos"}, "positions='learned'"),
        ({"learned_sigma": True}, "learned_sigma=False"),
        ({"num_layers": 4}, "has a depth of 1, but in config.task.model it has 2"),
        ({"order": "block"}, "order='alternate'"),
        ({"causal": True}, "causal=False"),
        ({"self_conditioning": False}, "self_conditioning=True"),
        ({"given": "in_place"}, "given='channels'"),
        ({"text_features": 0}, "text_features=6"),
        ({"grid": (1, 4, 4)}, "not back"),
        ({"windows": ((1, 0, 0),)}, "windows"),
        ({"windows": ((0, 1, 1), (1, 0, 0))}, "windows"),
        ({"cross_attention": CrossAttentionConfig(norm="plain")}, "norm='modulated'"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_nothing_else_may_differ(changes, sentence):
    old = dataclasses.replace(SMALL, text_features=6, self_conditioning=True, given="channels")
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")) as error:
        transfer({}, old, dataclasses.replace(old, **changes), {})
    assert str(error.value).endswith(".") and "config.task" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": ((0, 1, 1),)},
        {"windows": ((0, 1, 1), (0, 2, 2)), "num_layers": 4},
        {"windows": ((1, 2, 2), (0, 1, 1)), "num_layers": 4},
        {"windows": ((1, 0, 0), (0, 1, 1)), "order": "heads"},
        # The first attention of adaLN-single's layers alone reads through the norm.
        {"windows": ((0, 1, 1), (1, 0, 0)), "order": "block", "conditioning": "adaln_single"},
    ],
    ids=str,
)
def test_windows_of_images_must_recur(changes):
    old = dataclasses.replace(PLAIN, conditioning=changes.get("conditioning", "adaln_zero"))
    new = dataclasses.replace(old, grid=(3, 4, 4), **changes)
    with pytest.raises(UserError, match="do not recur"):
        transfer({}, old, new, {})


def test_weights_of_another_model_are_refused():
    params = random_params(PLAIN) | {"spatial_embedding": jnp.zeros((9, 32))}
    with pytest.raises(UserError, match=r"\(9, 32\) for spatial_embedding"):
        move(PLAIN, PLAIN, params)
    with pytest.raises(UserError, match="nothing for patch_in/bias"):
        move(PLAIN, PLAIN, params | {"patch_in": {}})
