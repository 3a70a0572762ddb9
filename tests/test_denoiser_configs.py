"""The denoisers' configs say what the papers say."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from test_config import variants_of

from walt_jax import config as config_lib
from walt_jax.diffusion import Ddim, Diffusion, Linear, V
from walt_jax.models import Denoiser, Network
from walt_jax.models.denoiser import transfer
from walt_jax.models.named import DENOISERS
from walt_jax.training.experiment import Experiment

CONFIGS = Path(__file__).parents[1] / "configs"
READS = {"text_features": 1024}  # of the byte encoder; T5-XXL has 4096
# File -> variant -> the named size, and what of it is another.
SIZES = {
    "walt_ucf101": {
        "": ("walt-xl-ucf101", {}),
        "xl": ("walt-xl-ucf101", {}),
        "l": ("walt-l-ucf101", {}),
        "separate": ("walt-l-ucf101-separate", {}),
    },
    "walt_k600": {"": ("walt-l-k600", {})},
    "walt_imagenet": {"": ("walt-l-imagenet", {})},
    "walt_t2v": {
        "": ("walt-l-t2v", {}),
        "3b": ("walt-base-3b", {}),
        "bytes": ("walt-l-t2v", {}),
        "aspect": ("walt-l-t2v", {"grid": (5, 16, 28), "windows": ((1, 0, 0), (0, 8, 14))}),
    },
    "walt_sr1": {"": ("walt-sr1", {})},
    "walt_sr2": {"": ("walt-sr2", {})},
    "walt_any_size": {
        "": ("walt-l-any-size", {}),
        "tokens": ("walt-l-tokens", {}),
        "buckets": ("walt-l-any-size", {}),
    },
    "family/dit": {
        "": ("dit-xl-2", {}),
        **{size: (f"dit-{size}-2", {}) for size in ("s", "b", "l", "xl")},
        "in_context": ("dit-xl-2-in-context", {}),
        "cross_attention": ("dit-xl-2-cross-attention", {}),
        "adaln": ("dit-xl-2-adaln", {}),
    },
    "family/uvit": {
        "": ("uvit-l-2", {}),
        **{size: (f"uvit-{size}-2", {}) for size in ("s", "m", "l", "h")},
    },
    "family/latte": {"": ("latte-xl-2", {"num_classes": 101})},
    "family/vdt": {
        "": ("vdt-l", {}),
        "adaln": ("vdt-l-adaln", {}),
        "cross_attention": ("vdt-l-cross-attention", {}),
        "tokens": ("vdt-l-tokens", {}),
    },
    "family/stdit": {
        "": ("stdit-xl-2", READS),
        "image": ("stdit-xl-2", READS | {"grid": (1, 32, 32), "windows": ((1, 0, 0),)}),
        "video": ("stdit-xl-2", READS),
        "high": ("stdit-xl-2", READS | {"grid": (16, 64, 64)}),
        "flow": ("stdit-xl-2", READS | {"learned_sigma": False}),
    },
    "family/vivit": {
        "": ("vivit-b-1", {"num_classes": 101}),
        **{n: (f"vivit-b-{n}", {"num_classes": 101}) for n in "1234"},
    },
    "family/sora": {
        "": ("sora-xl-2", READS | {"learned_sigma": False}),
        "causal": ("sora-xl-2-causal", READS | {"learned_sigma": False}),
        "v": ("sora-xl-2", READS | {"learned_sigma": False}),
    },
}
ALL = [(f"{name}.py:{variant}") for name, known in SIZES.items() for variant in [*known, "debug"]]
# What the debug variants make smaller.
SMALLER = {
    "grid",
    "latent_channels",
    "width",
    "num_heads",
    "num_layers",
    "windows",
    "text_features",
    "dtype",
}


def build(spec):
    return config_lib.build(Experiment, config_lib.load(f"{CONFIGS}/{spec}"))


def test_every_denoiser_is_listed_here():
    found = {}
    for path in sorted(CONFIGS.rglob("*.py")):
        if config_lib.load(str(path))["task"]["name"] == "denoiser":
            found[str(path.relative_to(CONFIGS).with_suffix(""))] = set(variants_of(path))
    for small in ("sprites_walt", "sprites_text", "sprites_long"):
        assert "debug" in found.pop(small)
    assert found == {name: {*known, "debug"} for name, known in SIZES.items()}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_named_ones(name):
    for variant, (size, changes) in SIZES[name].items():
        model = build(f"{name}.py:{variant}").task.model
        assert model == dataclasses.replace(DENOISERS[size], **changes), variant


@pytest.mark.parametrize("spec", ALL)
def test_clips_fit_the_model(spec):
    experiment = build(spec)
    model, data, text = experiment.task.model, experiment.data, experiment.task.text
    if model.any_size:  # blocks of patches, with whole windows where these have biases
        block = data.packing.block if data.packing else (5, 8, 8)
        assert not any(n % p for n, p in zip(block, model.patch_size))
        assert not any(g % n for g, n in zip(model.grid, block))
        assert not model.relative_bias or model.windows == ((1, 0, 0), block)
        return
    # The tokenizers of W.A.L.T and of all debug runs, or one of images for frames.
    frames = (data.num_frames - 1) // 4 + 1
    if spec.startswith("family") and not spec.endswith(":debug"):
        frames = data.num_frames
    ((height, width),) = data.sizes
    assert model.grid == (frames, height // 8, width // 8)
    reads_bytes = text is not None and text.trained
    assert (data.caption_bytes > 0) == reads_bytes
    assert not reads_bytes or text.max_bytes >= data.caption_bytes
    if (images := experiment.images) is not None:
        assert (images.sizes, images.caption_bytes) == (data.sizes, data.caption_bytes)
        assert images.path != data.path


@pytest.mark.parametrize("name", SIZES)
def test_debug_is_the_same_but_small(name):
    full, debug = build(f"{name}.py"), build(f"{name}.py:debug")
    fields = {field.name for field in dataclasses.fields(full.task.model)} - SMALLER
    if name == "family/vivit":  # its debug run is model 4
        fields.remove("order")
    for field in fields:
        assert getattr(debug.task.model, field) == getattr(full.task.model, field), field
    assert debug.task.diffusion == full.task.diffusion
    assert type(debug.task.sampler) is type(full.task.sampler)
    assert debug.optimizer.name == full.optimizer.name
    assert debug.task.given.share == pytest.approx(full.task.given.share)
    assert (debug.images is None) == (full.images is None)
    assert debug.num_steps == 3 and debug.task.model.width == 16


# Table 8's columns. The hidden size of the base model, 9216, is read as that of its MLP.
COLUMNS = {
    "walt_imagenet.py": (
        ((1, 256, 256), (1, 32, 32), 24, 1024, 16),
        (437_900, 1024, "adamw", 5e-4, True, 1, None),
    ),
    "walt_ucf101.py": (
        ((17, 128, 128), (5, 16, 16), 28, 1152, 16),
        (60_000, 256, "adamw", 5e-4, True, 1, 2),
    ),
    "walt_k600.py": (
        ((17, 128, 128), (5, 16, 16), 24, 1024, 16),
        (270_000, 512, "adamw", 5e-4, True, 1, 2),
    ),
    "walt_t2v.py:3b": (
        ((17, 128, 128), (5, 16, 16), 52, 1792, 16),
        (550_000, 512, "adafactor", 2e-4, False, 1, 2),
    ),
    "walt_sr1.py": (
        ((17, 256, 448), (5, 32, 56), 40, 1408, 16),
        (675_000, 512, "adafactor", 5e-4, False, 2, 2),
    ),
    "walt_sr2.py": (
        ((17, 512, 896), (5, 64, 112), 24, 1024, 16),
        (275_000, 512, "adafactor", 5e-4, False, 4, 2),
    ),
}


@pytest.mark.parametrize("spec", COLUMNS)
def test_table_8(spec):
    experiment = build(spec)
    task, data, optimizer = experiment.task, experiment.data, experiment.optimizer
    model, lora = task.model, task.model.conditioning == "adaln_lora"
    size = (
        (data.num_frames, *data.sizes[0]),
        model.grid,
        model.num_layers,
        model.width,
        model.num_heads,
    )
    training = (
        experiment.num_steps,
        experiment.batch_size,
        optimizer.name,
        optimizer.learning_rate,
        optimizer.ema_decay > 0,
        model.patch_size[1],
        model.adaln_rank if lora else None,
    )
    assert (size, training) == COLUMNS[spec]
    hidden = 9216 if spec == "walt_t2v.py:3b" else 4 * model.width
    assert round(model.mlp_ratio * model.width) == hidden
    assert model.latent_channels == 8 and optimizer.schedule == "cosine"
    process = Linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=True)
    assert task.diffusion == Diffusion(process, V())
    assert task.sampler == Ddim(num_steps=50)
    assert task.self_conditioning == 0.9


def test_table_6():
    """The finetuning to another aspect."""
    aspect = build("walt_t2v.py:aspect")
    optimizer = aspect.optimizer
    assert (aspect.num_steps, aspect.batch_size) == (250_000, 512)
    assert (optimizer.name, optimizer.learning_rate) == ("adafactor", 5e-5)
    assert (optimizer.schedule, optimizer.ema_decay) == ("constant", 0.0)
    assert aspect.task.init_from and aspect.data.sizes == ((128, 224),)


def test_frame_prediction_is_told_five_frames():
    task = build("walt_k600.py").task
    assert task.given.first_frames == (2,) and task.given.share == task.given.first == 0.9
    assert task.model.given == "channels"


@pytest.mark.parametrize(
    "stages",
    [
        ["walt_t2v.py", "walt_t2v.py:aspect"],
        ["family/stdit.py:image", "family/stdit.py:video", "family/stdit.py:high"],
    ],
    ids=["walt", "stdit"],
)
def test_stages_take_each_others_weights(stages):
    """transfer refuses what it cannot carry over; here at a width that is quick."""
    params = before = None
    for spec in stages:
        task = build(spec).task
        small = dataclasses.replace(
            task.model,
            width=16,
            num_heads=2,
            num_layers=2,
            text_features=8,
            dtype="float32",
        )
        fresh = Network.of(lambda rngs, c=small: Denoiser(c, rngs=rngs)).init(jax.random.key(0))
        if before is not None:
            assert task.init_from
            params = transfer(params, before, small, fresh)
            assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        else:
            params = fresh
        before = small
