"""W.A.L.T: windows by leakage, conditions, images, self-conditioning, frame prediction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoisers import SMALL, build, evaluate, latents, network_of, random_params, reached

from walt_jax.errors import UserError
from walt_jax.models import Conditions
from walt_jax.models.denoiser import CrossAttentionConfig
from walt_jax.models.denoiser.layers import layer_norm
from walt_jax.training.flops import forward_flops

CLASSES = dataclasses.replace(SMALL, num_classes=3)
TEXT = dataclasses.replace(SMALL, text_features=6)
ONE = dataclasses.replace(SMALL, num_layers=1, windows=((0, 2, 2),))


def test_starts_at_zero():
    params, z = jax.jit(network_of(CLASSES)[0].init)(jax.random.key(0)), latents(2)
    out = evaluate(CLASSES, params, z, [0, 999], label=jnp.array([0, 2]))
    assert out.shape == z.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(
    ("window", "causal", "sees"),
    [
        ((1, 0, 0), False, lambda t, h, w: t == 1),
        ((0, 1, 1), False, lambda t, h, w: (h == 1) & (w == 2)),
        ((0, 2, 2), False, lambda t, h, w: (h < 2) & (w >= 2)),
        ((0, 0, 0), False, lambda t, h, w: t >= 0),
        ((0, 1, 1), True, lambda t, h, w: (h == 1) & (w == 2) & (t <= 1)),
        ((0, 2, 2), True, lambda t, h, w: (h < 2) & (w >= 2) & (t <= 1)),
    ],
)
def test_a_token_sees_its_window_and_nothing_else(window, causal, sees):
    config = dataclasses.replace(SMALL, num_layers=1, windows=(window,), causal=causal)
    seen = reached(build(config), latents(), [500], (0, 1, 1, 2))
    np.testing.assert_array_equal(seen[0], sees(*np.indices((3, 4, 4))))


def test_samples_do_not_see_each_other():
    model, label = build(CLASSES), jnp.array([0, 1])
    seen = reached(model, latents(2), [10, 500], 0, label=label)
    assert seen[0].all() and not seen[1].any()


def test_time_and_class_matter():
    z = jnp.broadcast_to(latents(), (3, 3, 4, 4, 8))
    out = build(CLASSES)(z, [10, 500, 10], label=jnp.array([0, 0, 3]))
    assert float(jnp.abs(out[0] - out[1]).max()) > 1e-3
    assert float(jnp.abs(out[0] - out[2]).max()) > 1e-3


def test_without_a_null_entry_no_class_adds_nothing():
    """101 classes of UCF-101 have 101 entries; the label 101 leaves the time alone."""
    config = dataclasses.replace(CLASSES, null_class=False)
    params, z = random_params(config), latents()
    without = random_params(config)
    assert without["embed"].pop("class_embedding").shape == (3, 32)
    out = evaluate(config, params, z, [10], label=jnp.array([3]))
    np.testing.assert_allclose(out, evaluate(SMALL, without, z, [10]), atol=1e-6)
    assert jnp.abs(evaluate(config, params, z, [10], label=jnp.array([2])) - out).max() > 1e-4


def test_remat_and_patches_keep_the_meaning():
    z, label = latents(), jnp.array([1])
    with_remat = build(dataclasses.replace(CLASSES, remat=True))(z, [10], label=label)
    without = build(CLASSES)(z, [10], label=label)
    np.testing.assert_allclose(with_remat, without, atol=1e-5)
    patched = build(dataclasses.replace(CLASSES, patch_size=(3, 2, 2), windows=((1, 0, 0),)))
    assert patched(z, [10], label=label).shape == z.shape


def test_what_is_kept_is_not_computed_again():
    def gradient(config):
        network, _ = network_of(config)
        run = jax.grad(lambda p: jnp.square(network.bind(p)(latents(), jnp.array([10]))).sum())
        return run, random_params(config)

    products, found = {}, {}
    for kept in ((), ("qkv", "attention"), ("qkv", "attention", "up")):
        run, params = gradient(dataclasses.replace(ONE, remat=True, kept=kept))
        products[kept] = forward_flops(run, params)
        found[kept] = jax.jit(run)(params)
    assert sorted(products.values(), reverse=True) == list(products.values())
    assert len(set(products.values())) == 3
    whole, *others = (jax.tree.leaves(f) for f in found.values())
    for a, *rest in zip(whole, *others):
        for b in rest:
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_bfloat16_stays_near_float32():
    z, label = latents(2), jnp.array([1, 2])
    exact = build(CLASSES)(z, [10, 900], label=label)
    rough = build(dataclasses.replace(CLASSES, dtype="bfloat16"))(z, [10, 900], label=label)
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(rough - exact).max()) < 0.05 * float(jnp.abs(exact).max())


# Images in a joint model.


def test_an_image_passes_spatiotemporal_layers_by_identity():
    """What one token says in an ST layer alone: no other token, and yet not nothing."""
    config = dataclasses.replace(SMALL, num_layers=1, windows=((0, 2, 2),))
    seen = reached(build(config), latents()[:, :1], [500], (0, 0, 1, 2))
    assert seen.sum() == 1 and seen[0, 0, 1, 2]
    attends = dataclasses.replace(config, image_identity=False)
    seen = reached(build(attends), latents()[:, :1], [500], (0, 0, 1, 2))
    np.testing.assert_array_equal(seen[0, 0], (np.indices((4, 4)) // 2 == [[[0]], [[1]]]).all(0))


@pytest.mark.parametrize("identity", [True, False])
def test_an_image_through_the_joint_model_equals_an_image_model(identity):
    """Identity is attention in windows of one token; the rest is the first frame's."""
    spatial = CrossAttentionConfig(window=(1, 0, 0))
    joint = dataclasses.replace(TEXT, image_identity=identity, cross_attention=spatial)
    windows = ((1, 0, 0), (1, 1, 1) if identity else (1, 2, 2))
    image = dataclasses.replace(joint, grid=(1, 4, 4), windows=windows)
    alone = random_params(joint)
    alone["spatial_embedding"] += alone.pop("temporal_embedding")[0]
    for layer, window in zip(alone["stages"][0]["layers"].values(), windows):
        bias = layer["attentions"][0]["biases"][0]
        lengths = [2 * w - 1 if w else 7 for w in window]
        middle = [
            slice((n - m) // 2, (n + m) // 2) for n, m in zip(bias["table"].shape[1:], lengths)
        ]
        bias["table"] = bias["table"][:, middle[0], middle[1], middle[2]]
    z, text = latents()[:, :1], jax.random.normal(jax.random.key(4), (1, 5, 6))
    np.testing.assert_allclose(
        evaluate(joint, random_params(joint), z, [300], text=text),
        evaluate(image, alone, z, [300], text=text),
        atol=2e-5,
    )


def test_identity_is_without_cost():
    """No attention and no queries or keys: fewer products than in a spatial layer."""

    def flops(window):
        config = dataclasses.replace(SMALL, num_layers=1, windows=(window,))
        network, shapes = network_of(config)
        z, t = latents()[:, :1], jnp.array([3])
        return forward_flops(lambda p: network.bind(p)(z, t), shapes)

    tokens, width = 16, 32
    assert flops((1, 0, 0)) - flops((0, 2, 2)) == 4 * tokens * width * (tokens + width)


# Text.


def test_pooled_text_is_the_normalised_mean_of_what_is_no_padding():
    config = dataclasses.replace(ONE, text_features=6, pooled_text=True)
    embed = network_of(config)[0].bind(random_params(config)).embed
    mask = jnp.array([[True, True, False], [False] * 3])
    text = jax.random.normal(jax.random.key(4), (2, 3, 6))
    time, pooled = embed.vectors(jnp.array([1, 2]), Conditions(text=text, text_mask=mask))
    wanted = layer_norm(jnp.stack([text[0, :2].mean(0), jnp.zeros(6)]))
    np.testing.assert_allclose(pooled, embed.pooled(wanted), atol=1e-6)
    assert pooled.shape == time.shape
    _, whole = embed.vectors(jnp.array([1, 2]), Conditions(text=text))
    np.testing.assert_allclose(whole, embed.pooled(layer_norm(text.mean(1))), atol=1e-6)
    with pytest.raises(UserError, match="pooled_text=True pools text"):
        dataclasses.replace(ONE, pooled_text=True)


@pytest.mark.parametrize(
    ("queries", "norm", "pooled"),
    [(True, "modulated", False), (True, "plain", False), (False, "none", True)],
)
def test_padding_of_the_text_is_never_seen(queries, norm, pooled):
    cross = CrossAttentionConfig(queries=queries, norm=norm)
    config = dataclasses.replace(ONE, text_features=6, cross_attention=cross, pooled_text=pooled)
    model = build(config)
    z, mask = latents(2), jnp.array([[True, True, False, False], [False] * 4])

    @jax.jit
    @jax.value_and_grad
    def out(text):
        return jnp.square(model(z, [10, 20], text=text, text_mask=mask)).sum()

    text = jax.random.normal(jax.random.key(4), (2, 4, 6))
    value, grad = out(text)
    np.testing.assert_array_equal(np.abs(np.asarray(grad)).sum(-1) > 0, mask)
    assert np.isfinite(value) and value == out(text.at[:, 3].set(jnp.nan))[0]


def test_cross_attention_has_its_own_window():
    """Spatial cross-attention in a temporal layer shows the frame; the layer's own does not."""
    config = dataclasses.replace(TEXT, num_layers=1, windows=((0, 1, 1),))
    text = jax.random.normal(jax.random.key(4), (1, 4, 6))
    seen = reached(build(config), latents(), [5], (0, 1, 1, 2), text=text)
    assert seen.sum() == 3
    spatial = dataclasses.replace(config, cross_attention=CrossAttentionConfig(window=(1, 0, 0)))
    seen = reached(build(spatial), latents(), [5], (0, 1, 1, 2), text=text)
    assert seen.all()  # the frame, and through its tokens their own columns


# Other inputs.


def test_self_conditioning_starts_from_zeros():
    model, z = build(dataclasses.replace(ONE, self_conditioning=True)), latents()
    first = model(z, [5])
    np.testing.assert_array_equal(first, model(z, [5], estimate=jnp.zeros_like(z)))
    assert jnp.abs(model(z, [5], estimate=z) - first).max() > 1e-3


def test_given_frames_enter_by_channels():
    """Only where the mask says so; all zeros is as nothing given."""
    model = build(dataclasses.replace(ONE, given="channels"))
    z, clean, nothing = latents(), latents(seed=7), jnp.zeros((1, 3, 4, 4))
    for frames in (1, 2):
        mask = nothing.at[:, :frames].set(1)
        grad = jax.grad(lambda x: jnp.square(model(z, [5], given=x, given_mask=mask)).sum())(clean)  # noqa: B023
        np.testing.assert_array_equal(np.abs(np.asarray(grad)).sum(-1) > 0, mask > 0)
    np.testing.assert_array_equal(model(z, [5], given=clean, given_mask=nothing), model(z, [5]))


def test_super_resolution():
    config = dataclasses.replace(ONE, upsampling=(1, 2, 2), patch_size=(1, 2, 2))
    model, z, low = build(config), latents(), latents(seed=5)
    out = model(z, [5], low=low, low_time=jnp.array([100]))
    assert jnp.abs(model(z, [5], low=low, low_time=jnp.array([5])) - out).max() > 1e-3
    assert jnp.abs(model(z, [5], low=2 * low, low_time=jnp.array([100])) - out).max() > 1e-3
    swapped = model(z, [100], low=low, low_time=jnp.array([5]))
    assert jnp.abs(swapped - out).max() > 1e-3  # the two times are told apart


def test_upsampling_keeps_places():
    """A low-resolution place reaches the patch that it becomes and that patch's neighbours."""
    config = dataclasses.replace(SMALL, grid=(3, 8, 8), upsampling=(1, 2, 2))
    model = network_of(config)[0].bind(random_params(config))
    assert model.upsample(latents()).shape == (1, 3, 8, 8, 8)
    grad = jax.grad(lambda x: jnp.square(model.upsample(x)[0, 1, 2:4, 4:6]).sum())(latents())
    t, h, w = np.indices((3, 4, 4))
    near = (t == 1) & (abs(h - 1) <= 1) & (abs(w - 2) <= 1)
    np.testing.assert_array_equal(np.abs(np.asarray(grad))[0].sum(-1) > 0, near)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 5}, "num_layers=5 must be a multiple of the 2 windows"),
        ({"num_heads": 5}, "width=32 must be a multiple"),
        ({"windows": ((0, 3, 3),), "num_layers": 1}, "does not tile the grid .* H a multiple of 3"),
        ({"patch_size": (2, 1, 1)}, "no multiple of patch_size"),
        ({"upsampling": (1, 3, 2)}, r"upsampling=\(1, 3, 2\) must be"),
        ({"windows": ()}, "windows is empty"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


def test_wrong_inputs_are_refused():
    z, label = jnp.zeros((1, 3, 4, 4, 8)), jnp.zeros((1,), int)

    def refused(config, z, message, **conditions):
        network, shapes = network_of(config)
        with pytest.raises(UserError, match=message):
            jax.eval_shape(
                lambda p: network.bind(p)(z, jnp.zeros((1,)), Conditions(**conditions)),
                shapes,
            )

    wide = jnp.zeros((1, 3, 4, 6, 8))
    refused(CLASSES, wide, r"built for \(3, 4, 4, 8\) or \(1, 4, 4", label=label)
    refused(CLASSES, z, "needs the 'label' condition, it was built with num_classes=3")
    refused(CLASSES, z, "takes no 'text' condition", label=label, text=z)
    refused(CLASSES, z, "takes no 'estimate' condition", label=label, estimate=z)
    refused(CLASSES, z, "takes no 'given' condition", label=label, given=z, given_mask=z)
    refused(CLASSES, z, r"'label' has the shape \(2,\)", label=jnp.zeros((2,), int))
    in_place = dataclasses.replace(SMALL, given="in_place")
    refused(in_place, z, "'given' and 'given_mask' go together", given=z)
    refused(TEXT, z, "needs the 'text' condition")
