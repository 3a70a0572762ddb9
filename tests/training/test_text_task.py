"""A denoiser that reads a published text encoder: in the step, cached, sampled, refused."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_text

from walt_jax import config as config_lib
from walt_jax import encode
from walt_jax.data.records import open_dataset
from walt_jax.diffusion import Constant, Ddim
from walt_jax.errors import UserError
from walt_jax.generation import Generator
from walt_jax.models import DenoiserConfig, TokenizerConfig
from walt_jax.models.text import (
    ByteEncoderConfig,
    ClipTextConfig,
    Embeddings,
    FrozenText,
    T5TextConfig,
)
from walt_jax.models.text.frozen import half
from walt_jax.models.tokenizer.frozen import FrozenTokenizer, network
from walt_jax.parallel import Layout, MeshConfig, make_mesh
from walt_jax.parallel.sharding import frozen_shardings
from walt_jax.tasks import DenoiserTask, captions
from walt_jax.tasks.frozen import Frozen
from walt_jax.training.experiment import Experiment
from walt_jax.training.loop import train
from walt_jax.training.texts import find_text, keep_text, open_text
from walt_jax.training.tokenizers import keep_tokenizer

IDS = np.array([[3, 4, 6, 1, -1, -1], [3, 5, 6, 7, 8, 1]], np.int32)
STEP = np.zeros((), np.int32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a tiny T5."""
    text = small_text.t5(tmp_path_factory.mktemp("t5"))
    small_text.write(text)
    return text


@pytest.fixture(scope="module")
def encoder(text):
    return FrozenText.load(text, make_mesh(MeshConfig(), jax.devices()[:1]))


def make_task(text, **fields):
    model = DenoiserConfig(
        grid=(1, 4, 4),
        latent_channels=2,
        width=16,
        num_heads=2,
        num_layers=1,
        windows=((1, 0, 0),),
        text_features=16,
        remat=False,
        dtype="float32",
    )
    return DenoiserTask(tokenizer="", model=model, text=text, self_conditioning=0.0, **fields)


def test_embeddings_from_records_train_as_the_encoder_does(text, encoder):
    task = make_task(text, text_dropout=0.0)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(task.init, jax.random.key(0))
    assert "text" not in shapes  # nothing of it is trained, or in the moving average
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape)), shapes)
    batch = {
        "latents": rng.normal(size=(2, 1, 4, 4, 2)).astype(np.float16),
        "label": np.zeros(2, np.int32),
    }

    @jax.jit
    def loss(params, encoder, batch):
        frozen = Frozen(None, encoder)
        return task.loss(params, {}, frozen, batch, jax.random.key(3), STEP, Layout())[0]

    run = float(loss(params, encoder, batch | {"text": IDS}))
    assert float(loss(params, encoder, batch | {"text": IDS[::-1]})) != pytest.approx(run)
    read = half(encoder(IDS))
    cached = {"text_embeddings": read.tokens, "text_length": np.array([4, 6], np.int32)}
    assert float(loss(params, None, batch | cached)) == pytest.approx(run, rel=1e-4)
    # What lies beyond the length is not read.
    dirty = np.array(read.tokens)
    dirty[0, 4:] = 9.0
    cached["text_embeddings"] = dirty
    assert float(loss(params, None, batch | cached)) == pytest.approx(run, rel=1e-4)


def test_texts_are_left_out_whole():
    text = Embeddings(jnp.ones((2, 3, 4), jnp.float16), jnp.ones((2, 3), bool))
    out = captions.without(text, jnp.array([True, False]))
    assert out.tokens.dtype == jnp.float16 and out.mask.dtype == bool
    assert out.mask.tolist() == [[False] * 3, [True] * 3]
    assert out.tokens.sum((1, 2)).tolist() == [0, 12]
    packed = captions.without(jnp.ones((2, 3, 4), jnp.uint8), jnp.eye(2, 3, dtype=bool))
    assert packed.dtype == jnp.uint8 and packed.sum(-1).tolist() == [[0, 4, 4], [4, 0, 4]]


def test_of_what_is_frozen_the_text_encoder_is_divided(text):
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    tokenizer = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 8, 8), np.float32)}}
    shardings = frozen_shardings(Frozen(tokenizer, FrozenText.abstract(text)), mesh)
    assert shardings.tokenizer["conv"]["kernel"].is_fully_replicated
    kernel = shardings.text.params["layers"]["up"]["kernel"]
    assert kernel.shard_shape((2, 16, 24)) == (2, 2, 24)


def dataset(name, digest=""):
    """As much of a dataset as the search for its encoder looks at."""
    metadata = {"text": {"hash": digest}} if digest else {}
    return types.SimpleNamespace(directory=name, metadata=metadata)


def test_an_encoder_is_the_same_for_all_that_follows(text, tmp_path):
    digest = FrozenText.open(text).hash
    found, known = find_text(text, tmp_path, [dataset("a", digest), dataset("b")])
    assert found.hash == known == digest
    assert find_text(text, tmp_path, [dataset("a", digest)]) == (None, digest)
    gone = dataclasses.replace(text, path=str(tmp_path / "gone"))
    assert find_text(gone, tmp_path, [dataset("a", "abc"), dataset("b", "abc")]) == (None, "abc")
    with pytest.raises(UserError, match="embeddings in a were made by text encoder abc, but"):
        find_text(text, tmp_path, [dataset("a", "abc")])
    with pytest.raises(UserError, match="in b were made by text encoder abc, but a is def"):
        find_text(gone, tmp_path, [dataset("a", "def"), dataset("b", "abc")])
    with pytest.raises(UserError, match="is no folder and no hub id"):
        find_text(gone, tmp_path, [dataset("a", "abc"), dataset("b")])
    keep_text(text, "abc", tmp_path)
    with pytest.raises(UserError, match="was started with abc: start the denoiser in another"):
        find_text(text, tmp_path, [dataset("a")])
    assert open_text(text, digest).hash == digest
    with pytest.raises(UserError, match="but this denoiser was trained with abc"):
        open_text(text, "abc")


def test_another_run_is_started_from_if_it_reads_the_same(text):
    wide = dataclasses.replace(text.model, width=32)
    same = dataclasses.replace(text, path="elsewhere", max_tokens=3)
    half_exact = dataclasses.replace(text.model, dtype="bfloat16")
    assert text.reads_as(same)
    assert text.reads_as(dataclasses.replace(text, model=half_exact))
    assert not text.reads_as(dataclasses.replace(text, model=wide))
    assert not text.reads_as(ByteEncoderConfig()) and not ByteEncoderConfig().reads_as(text)
    clip = small_text.clip("x")
    assert not clip.reads_as(dataclasses.replace(clip, clip_skip=1)) and not clip.reads_as(text)
    assert ByteEncoderConfig().reads_as(ByteEncoderConfig(dtype="float32"))
    assert not ByteEncoderConfig().reads_as(ByteEncoderConfig(max_bytes=7))


def test_a_config_names_the_encoder():
    def built(**text):
        values = config_lib.load("configs/walt_t2v.py:debug")
        if text:
            values["task"]["text"] = text
            values["data"]["caption_bytes"] = values["images"]["caption_bytes"] = 0
        return config_lib.build(Experiment, values)

    old = built().task.text
    assert isinstance(old, ByteEncoderConfig) and config_lib.to_dict(old)["name"] == "bytes"
    narrow = {"model": {"width": 8}}
    assert isinstance(built(name="t5", path="x", **narrow).task.text, T5TextConfig)
    narrow["model"]["num_heads"] = 2
    assert isinstance(built(name="clip", path="x", **narrow).task.text, ClipTextConfig)
    with pytest.raises(UserError, match=r"text\.name must be one of bytes, clip, t5, got 'T5'"):
        built(name="T5")
    with pytest.raises(UserError, match=r"config\.task\.text\.path is missing"):
        built(name="t5")
    values = config_lib.load("configs/walt_t2v.py:debug")
    values["task"]["text"] = {"name": "t5", "path": "x", "model": {"width": 8}}
    with pytest.raises(UserError, match=r"caption_bytes is read by .*'bytes' alone: set it to 0"):
        config_lib.build(Experiment, values)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_a_run_from_records_to_samples(text, sprite_records, tmp_path, cached):
    """Encoded with captions, trained, sampled by prompts; and the encoder in the step instead."""
    pytest.importorskip("tokenizers", reason="pip install '.[text]'")
    text = dataclasses.replace(text, max_tokens=11)
    config = TokenizerConfig(
        channels=8,
        multipliers=(1, 1, 1, 1),
        num_res_blocks=0,
        temporal_downsample=(False, True, True),
        latent_channels=8,
        norm_groups=2,
        dtype="float32",
    )
    params = jax.device_get(network(config).init(jax.random.key(0)))
    mean = np.zeros(8, np.float32)
    tokenizer = tmp_path / "tokenizer_run"
    keep_tokenizer(FrozenTokenizer.create(config, params, mean, mean + 1), tokenizer)
    values = config_lib.load("configs/walt_t2v.py:debug")
    data = {"path": str(sprite_records), "num_frames": 5, "fps": 4.0, "sizes": ((32, 32),)}
    values |= {"images": None, "image_batch_size": 0, "mesh": {"data": 4, "fsdp": 2}}
    values |= {"num_steps": 2, "preview_every": 2, "eval_every": 2, "checkpoint_every": 2}
    values["task"]["tokenizer"] = str(tokenizer)
    values["task"]["text"] = config_lib.to_dict(text)
    values["task"]["model"]["text_features"] = 16
    values["data"] |= data | {"caption_bytes": 0}
    if cached:
        (tokenizer / "config.json").write_text(json.dumps({"data": values["data"]}))
        args = ["--workdir", str(tokenizer), "--output", str(tmp_path / "latents")]
        args += ["--text_encoder", text.path, "--text_tokens", "11"]
        encode.main(args)
        values["data"]["path"] = str(tmp_path / "latents")
        about = open_dataset(tmp_path / "latents").metadata["text"]
        assert about["width"] == 16
    experiment = config_lib.build(Experiment, values)
    train(experiment, str(tmp_path / "run"))
    kept = json.loads((tmp_path / "run" / "text_encoder.json").read_text())
    assert kept["hash"] == FrozenText.open(text).hash
    generator = Generator.load(tmp_path / "run")
    options = {"sampler": Ddim(num_steps=2), "guidance": Constant(5.0), "progress": False}
    prompts = ["a red square moves left", "a green square moves up", ""]
    videos = generator.sample(prompts=prompts, **options)
    assert videos.shape == (3, 5, 32, 32, 3)
    with pytest.raises(UserError, match="has 12 tokens, this model reads 11"):
        generator.sample(prompts=["a " * 11], **options)
    with pytest.raises(UserError, match="acts through guidance, which is 1"):
        generator.sample(
            prompts=prompts, negative_prompts=prompts, **options | {"guidance": Constant(1.0)}
        )
    silent = generator.sample(prompts=prompts, negative_prompts=[""] * 3, **options)
    assert np.abs(silent.astype(int) - videos).max() <= 1
    assert generator.task.text_encoder == text
