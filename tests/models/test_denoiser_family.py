"""The family by configuration: layouts by leakage, VDT's given frames, U-ViT's skips."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoisers import SMALL, build, evaluate, latents, network_of, random_params, reached

from walt_jax.errors import UserError
from walt_jax.models import Conditions, Network, count
from walt_jax.models.denoiser import CrossAttentionConfig
from walt_jax.models.denoiser.block import Context, Group
from walt_jax.parallel import Layout, MeshConfig, make_mesh, state_shardings
from walt_jax.parallel.sharding import place

FACTORISED = dataclasses.replace(
    SMALL,
    windows=((1, 0, 0), (0, 1, 1)),
    relative_bias=False,
    qk_norm=False,
    conditioning="adaln_zero",
)
PLACES = np.indices((3, 4, 4))


# Layouts.


def test_heads_that_share_a_layer_have_their_own_windows():
    """ViViT's model 4: half of the heads see the frame, half the column; no head sees the rest."""
    config = dataclasses.replace(FACTORISED, order="heads", num_layers=1)
    t, h, w = PLACES
    seen = reached(build(config), latents(), [5], (0, 1, 1, 2))
    np.testing.assert_array_equal(seen[0], (t == 1) | ((h == 1) & (w == 2)))


def test_attentions_of_one_block_share_its_mlp():
    config = dataclasses.replace(FACTORISED, order="block", num_layers=1)
    assert reached(build(config), latents(), [5], (0, 1, 1, 2)).all()
    layer = network_of(config)[1]["stages"][0]["layers"][0]
    assert len(layer["attentions"]) == 2 and count(layer["up"]) == 32 * 128 + 128


def test_stages_come_one_after_another():
    """ViViT's model 2: as layers that take turns where each window has one."""
    turns = dataclasses.replace(FACTORISED, num_layers=2)
    stages = dataclasses.replace(turns, order="stages")
    params = random_params(turns)
    layers = params["stages"][0]["layers"]
    apart = params | {"stages": {i: {"layers": {0: layers[i]}} for i in (0, 1)}}
    z = latents()
    np.testing.assert_allclose(
        evaluate(stages, apart, z, [5]), evaluate(turns, params, z, [5]), atol=1e-5
    )
    four = dataclasses.replace(stages, num_layers=4).stages
    assert [(s.blocks, s.repeats) for s in four] == [((((w,)),), 2) for w in turns.windows]


def test_skips_join_the_first_group_with_the_last():
    config = dataclasses.replace(
        SMALL, windows=((0, 0, 0),), num_layers=5, skips=True, relative_bias=False
    )
    params, (network, _) = random_params(config), network_of(config)
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 32))
    vectors = jax.random.normal(jax.random.key(1), (1, 32)), jnp.ones((1, 6 * 32))
    context, model = Context(*vectors), network.bind(params)

    groups = []
    for stage, stacked in zip(config.stages, params["stages"].values()):
        single = Network.of(lambda r, s=stage: Group(config, s, r))
        for i in range(stage.repeats):
            groups.append(single.bind(jax.tree.map(lambda p, i=i: p[i], stacked)))
    assert len(groups) == 5

    @jax.jit
    def by_hand(x):
        saved = []
        for i, group in enumerate(groups):
            x = group(x, saved.pop() if i > 2 else None, context, Layout())
            saved += [x] if i < 2 else []
        return x

    np.testing.assert_allclose(
        jax.jit(lambda x: model._layers(x, context, Layout()))(x), by_hand(x), atol=1e-4
    )


def test_all_is_tokens_in_context():
    """U-ViT: learned positions, skips and a convolution; and the head conv sees its neighbours."""
    config = dataclasses.replace(
        SMALL,
        grid=(1, 4, 4),
        windows=((0, 0, 0),),
        num_layers=3,
        relative_bias=False,
        conditioning="in_context",
        time_mlp=False,
        num_classes=3,
        skips=True,
        output_conv=True,
    )
    assert network_of(config)[1]["token_embedding"].shape == (2, 32)
    z = jnp.broadcast_to(latents(config=config), (3, 1, 4, 4, 8))
    out = build(config)(z, [5, 700, 5], label=jnp.array([0, 0, 1]))
    assert out.shape == z.shape
    assert jnp.abs(out[0] - out[1]).max() > 1e-3 < jnp.abs(out[0] - out[2]).max()


# Given frames.


@pytest.mark.parametrize("way", ["in_place", "adaln", "cross_attention", "tokens"])
def test_given_frames_are_seen_and_others_are_not(way):
    """Any number of frames, anywhere, by one compiled network; also none and all."""
    config = dataclasses.replace(
        FACTORISED,
        order="block",
        num_layers=1,
        given=way,
        cross_attention=CrossAttentionConfig(queries=False, norm="plain"),
    )
    params, (network, _) = random_params(config), network_of(config)

    @jax.jit
    @jax.value_and_grad
    def run(clean, mask):
        conditions = Conditions(given=clean, given_mask=mask)
        out = network.bind(params)(z, jnp.array([5]), conditions)
        return jnp.square(out[:, 1, 2]).sum()

    z, clean = latents(), latents(seed=9)
    values = set()
    for frames in ([], [0], [0, 2], [1], [0, 1, 2]):
        mask = jnp.zeros((1, 3, 4, 4)).at[:, np.array(frames, int)].set(1)
        value, grad = run(clean, mask)
        np.testing.assert_array_equal(np.abs(np.asarray(grad)).sum(-1) > 0, mask > 0)
        values.add(float(value))
    assert len(values) == 5


def test_given_tokens_leave_the_others_grid_alone():
    """Without given frames the tokens beside the grid change nothing."""
    config = dataclasses.replace(FACTORISED, given="tokens")
    params, z = random_params(config), latents()
    without = jax.tree.map(lambda x: x, params)
    del without["embed"]["given"]
    np.testing.assert_allclose(
        evaluate(config, params, z, [5]), evaluate(FACTORISED, without, z, [5]), atol=1e-5
    )


# What does not go together.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "heads", "windows": ((1, 0, 0),) * 3}, "must be a multiple of the 3 windows"),
        ({"conditioning": "in_context", "relative_bias": False}, r"full attention, \(0, 0, 0\)"),
        ({"given": "tokens"}, "relative_bias has no offsets"),
        ({"given": "tokens", "relative_bias": False, "causal": True}, "not causal"),
        ({"skips": True, "num_layers": 4}, "odd number of groups"),
        ({"width": 30, "num_heads": 5, "positions": "sincos"}, "multiple of 4"),
    ],
)
def test_layouts_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


# Under a mesh.

CROSS = CrossAttentionConfig(queries=True, window=(1, 0, 0))
MESHED = {
    "text": dataclasses.replace(SMALL, text_features=6, cross_attention=CROSS),
    "tokens": dataclasses.replace(FACTORISED, order="block", num_layers=1, given="tokens"),
    "skips": dataclasses.replace(
        SMALL,
        windows=((0, 0, 0),),
        num_layers=3,
        relative_bias=False,
        conditioning="in_context",
        skips=True,
    ),
}


@pytest.mark.parametrize("name", MESHED)
def test_a_mesh_changes_nothing(name):
    config, z = MESHED[name], latents(4)
    conditions = {}
    if name == "text":
        conditions = {"text": jax.random.normal(jax.random.key(4), (4, 5, 6))}
    if name == "tokens":
        mask = jnp.zeros((4, 3, 4, 4)).at[:, 0].set(1)
        conditions = {"given": latents(4, seed=9), "given_mask": mask}
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    params, network = random_params(config), network_of(config)[0]
    placed = place(jax.tree.map(np.asarray, params), state_shardings(params, mesh))
    t, conditions = jnp.array([5, 200, 400, 999]), Conditions(**conditions)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda p, *args: network.bind(p)(*args, Layout(mesh)))(
            placed, z, t, conditions
        )
    expected = evaluate(config, params, z, t, **vars(conditions))
    np.testing.assert_allclose(out, expected, atol=1e-4)
