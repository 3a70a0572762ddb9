"""Published numbers of parameters, and the command that lists them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax.models import Conditions, Denoiser, DenoiserConfig, Network
from walt_jax.models.__main__ import main
from walt_jax.models.denoiser import transfer
from walt_jax.models.named import DENOISERS, DISCRIMINATORS, TOKENIZERS


def test_published_parameter_counts(capsys):
    main(["--json"])
    counts = json.loads(capsys.readouterr().out)
    totals = {name: parts["total"] for name, parts in counts.items()}
    assert {
        name: total for name, total in totals.items() if name in TOKENIZERS | DISCRIMINATORS
    } == {
        "tokenizer-walt": 375_829_131,  # 375.8M with 8 channels
        "tokenizer-walt-2d": 112_971_915,
        "tokenizer-walt-imagenet": 103_331_083,  # 103.3M with multipliers (1, 1, 2, 4)
        "tokenizer-magvit2": 376_003_221,  # 376.0M with 18 channels
        "tokenizer-magvit2-2d": 113_053_845,  # 113.1M
        "discriminator-magvit2": 61_341_569,  # 61.3M in the code's order
        "discriminator-magvit2-figure": 67_977_473,  # 68.0M in the figure's
        "discriminator-imagenet": 73_924_481,
    }
    magvit2 = counts["tokenizer-magvit2"]
    assert round(magvit2["encoder"] / 1e6, 1) == 150.3
    assert round(magvit2["decoder"] / 1e6, 1) == 225.7
    exact = {
        "walt-l-ucf101": 313_237_384,
        "walt-l-ucf101-separate": 457_738_120,
        "walt-xl-ucf101": 460_017_928,
        "walt-l-k600": 313_143_176,
        "dit-xl-2": 675_129_632 - 256 * 1152,  # less the fixed sine-cosine table
    }
    assert {name: totals[name] for name in exact} == exact
    millions = {
        "walt-l-ucf101-r4": 313.58,
        "walt-l-ucf101-r16": 315.65,
        "walt-l-ucf101-r64": 323.90,
        "walt-l-ucf101-r256": 356.93,
        "walt-l-imagenet": 459.67,
        "walt-l-t2v": 419.30,
    }
    assert {name: round(totals[name] / 1e6, 2) for name in millions} == millions
    rough = {
        "walt-base-3b": 3.09e9,
        "walt-sr1": 1.29e9,
        "walt-sr2": 417.0e6,
        "dit-s-2": 33e6,  # DiT's table 1 and, for the ways of conditioning, its table 4
        "dit-b-2": 130e6,
        "dit-l-2": 458e6,
        "dit-xl-2-in-context": 449e6,
        "dit-xl-2-cross-attention": 598e6,
        "dit-xl-2-adaln": 600e6,
        "latte-xl-2": 674e6,
        "vdt-l": 596e6,
        "uvit-s-2": 44e6,
        "uvit-m-2": 131e6,
        "uvit-l-2": 287e6,
        "uvit-h-2": 501e6,
    }
    for name, size in rough.items():
        assert abs(totals[name] - size) < (5e6 if size > 1e9 else 0.9e6), name


def shape(*lengths, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(lengths, dtype)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (i % 5 > 0)) for i, n in enumerate(DENOISERS)],
)
def test_a_named_denoiser_takes_its_conditions_for_videos_and_for_images(name):
    config = DENOISERS[name]
    network = Network.of(lambda rngs: Denoiser(config, rngs=rngs))
    params = network.shapes()
    for frames in {config.grid[0], 1}:
        z = shape(2, frames, *config.grid[1:], config.latent_channels)
        told = {}
        if config.num_classes:
            told["label"] = shape(2, dtype=jnp.int32)
        if config.text_features:
            text = shape(2, 20, config.text_features), shape(2, 20, dtype=jnp.bool_)
            told |= {"text": text[0], "text_mask": text[1]}
        if config.given != "none":
            told |= {"given": z, "given_mask": shape(*z.shape[:-1])}
        if config.self_conditioning:
            told["estimate"] = z
        if config.upsampling:
            told |= {"low": z, "low_time": shape(2)}

        def run(params, z, t, conditions):
            return network.bind(params)(z, t, conditions)

        out = jax.eval_shape(run, params, z, shape(2), Conditions(**told))
        channels = config.latent_channels * (2 if config.learned_sigma else 1)
        assert out.shape == (*z.shape[:-1], channels)


def test_the_aspect_ratio_of_table_6():
    """5x16x16 with windows of 5x8x8 to 5x16x28 with 5x8x14."""
    old = DENOISERS["walt-l-t2v"]
    new = dataclasses.replace(old, grid=(5, 16, 28), windows=((1, 0, 0), (0, 8, 14)))
    old_shapes, new_shapes = (
        Network.of(lambda rngs, c=config: Denoiser(c, rngs=rngs)).shapes() for config in (old, new)
    )
    params, fresh = (
        jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
        for shapes in (old_shapes, new_shapes)
    )
    out = transfer(params, old, new, fresh)
    assert jax.tree.map(np.shape, out) == jax.tree.map(lambda s: s.shape, new_shapes)
    assert out["spatial_embedding"].shape == (16 * 28, 1024)
    tables = [
        layer["attentions"][0]["biases"][0]["table"]
        for layer in out["stages"][0]["layers"].values()
    ]
    assert [t.shape for t in tables] == [(12, 1, 31, 55, 16), (12, 9, 15, 27, 16)]


def test_a_named_size_survives_a_config_file():
    for config in DENOISERS.values():
        values = json.loads(json.dumps(config_lib.to_dict(config)))
        assert config_lib.build(DenoiserConfig, values) == config
