"""Text encoders from folders: what is read of them, by whom, and what is refused."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from small_text import CLIP, T5, WORDS, about, clip, t5, tensors, write

from walt_jax.errors import UserError
from walt_jax.models import count
from walt_jax.models.text import (
    CLIP_SIZES,
    T5_SIZES,
    ByteEncoderConfig,
    ClipTextConfig,
    FrozenText,
    T5TextConfig,
    described,
    hub,
    published,
)
from walt_jax.parallel import Layout, MeshConfig, make_mesh, state_shardings

XXL = 4_762_310_656


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (T5TextConfig("", model=T5_SIZES["t5-v1_1-small"]), 35_332_800),
        (T5TextConfig(""), 1_223_527_424),
        (T5TextConfig("", model=T5_SIZES["t5-v1_1-xxl"]), XXL),
        (T5TextConfig("", model=T5_SIZES["umt5-xxl"]), 5_680_910_336),
        (ClipTextConfig(""), 123_060_480),
        (ClipTextConfig("", model=CLIP_SIZES["openclip-h-14"]), 352_984_064),
        # As Stable Diffusion 2 publishes it, without the last layer.
        (
            ClipTextConfig(
                "", model=dataclasses.replace(CLIP_SIZES["openclip-h-14"], num_layers=23)
            ),
            340_387_840,
        ),
    ],
)
def test_sizes_are_those_of_the_published_files(text, size):
    assert count(text.network.shapes()) == size
    assert set(text.tensors()) >= {"embedding", "layers/q/kernel", "norm/scale"}


def test_a_model_is_read_as_its_folder_describes_it(tmp_path):
    for text in (t5(tmp_path / "a"), clip(tmp_path / "b", clip_skip=1)):
        written = write(text)
        known = dataclasses.replace(text.model, dtype="bfloat16")
        assert described(text.path, max_tokens=6) == type(text)(
            text.path, max_tokens=6, model=known
        )
        frozen = FrozenText.open(text)
        name = [n for n in written if n.endswith(("SelfAttention.k.weight", "k_proj.weight"))][1]
        kernel = frozen.params["layers"]["k"]["kernel"]
        assert kernel.shape == (text.model.num_layers, 16, 16)
        np.testing.assert_array_equal(
            kernel[:, 2:5, 4:][1], written[name].T[2:5, 4:], err_msg="a slice of the second layer"
        )
        half = dataclasses.replace(text, model=dataclasses.replace(text.model, dtype="bfloat16"))
        params = FrozenText.open(half).params
        assert params["layers"]["k"]["kernel"][:, :1, :].dtype == jax.numpy.bfloat16
        assert params["layers"]["norms"][0]["scale"][:, :].dtype == np.float32
        shapes = FrozenText.abstract(half).params
        jax.tree.map(lambda a, b: assert_like(a, b), params, shapes)


def assert_like(stored, shape):
    assert (stored.shape, stored.dtype, stored.size) == (shape.shape, shape.dtype, shape.size)


def test_a_process_reads_its_own_slices_alone(tmp_path, monkeypatch):
    """Of eight devices those of one process: what it reads is what they hold, never a whole."""
    text = t5(tmp_path, model=dataclasses.replace(T5, bias_by_layer=True))
    written = write(text, shards=3)
    mesh, read = make_mesh(MeshConfig(data=1, fsdp=-1)), []
    take = published.Tensor.__getitem__

    def counted(self, index):
        found = take(self, index)
        read.append((self.name, found.size, int(np.prod(self.shape))))
        return found

    frozen = FrozenText.open(text)
    shardings = state_shardings(frozen.params, mesh)
    monkeypatch.setattr(published.Tensor, "__getitem__", counted)
    mine = set(mesh.devices.ravel()[:2])  # the devices of a process that has two of them
    held = 0

    def of_process(stored, sharding):
        nonlocal held
        for device, index in sharding.addressable_devices_indices_map(stored.shape).items():
            if device in mine:
                held += stored[index].size

    jax.tree.map(of_process, frozen.params, shardings)
    total = sum(x.size for x in written.values())
    matrices = {n for n, x in written.items() if x.ndim == 2 and "bias" not in n}
    assert {name for name, *_ in read} == set(written)
    assert sum(size for _, size, _ in read) == held
    assert all(size * 8 == whole for name, size, whole in read if name in matrices)
    assert held < total / 3  # a quarter, and the vectors, which each device has whole
    monkeypatch.undo()
    on_mesh = FrozenText.load(text, mesh)
    found = np.asarray(on_mesh.params["layers"]["down"]["kernel"])
    expected = [written[f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight"].T for i in range(2)]
    np.testing.assert_array_equal(found, expected)


COUNTING = """
import sys
import jax
from small_text import T5, t5
from walt_jax.models.text import FrozenText, published
from walt_jax.parallel import MeshConfig, make_mesh

folder, port, process = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
take, read = published.Tensor.__getitem__, []
mesh, frozen = make_mesh(MeshConfig(data=1, fsdp=-1)), FrozenText.open(t5(folder))


def counted(self, index):
    read.append(take(self, index))
    return read[-1]


published.Tensor.__getitem__ = counted
params = FrozenText.load(t5(folder), mesh).params
half = params["layers"]["up"]["kernel"].addressable_shards
asked = sum(x.size for x in read) - HASHED
print(mesh.size, len(half), asked, max(x.size for x in read))
"""


@pytest.mark.slow
def test_two_processes_read_a_half_each(tmp_path):
    text = t5(tmp_path)
    written = write(text)
    rows = sum(3 * x.shape[1] if x.ndim == 2 else x.size for x in written.values())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    here = Path(__file__).parents[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    command = [sys.executable, "-c", COUNTING.replace("HASHED", str(rows)), str(tmp_path), port]
    processes = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    whole = {n: x for n, x in written.items() if x.ndim == 1 or "bias" in n}
    vectors = sum(x.size for x in whole.values())
    matrices = sum(x.size for n, x in written.items() if n not in whole)
    for out in outs:
        devices, mine, asked, largest = map(int, out.split())
        assert (devices, mine) == (8, 4)
        # Each of four devices is given the small ones whole, and its eighth of a matrix.
        assert asked <= matrices // 2 + 4 * vectors
        assert largest < max(x.size for x in written.values()) / 2


@pytest.mark.parametrize("make", [t5, pytest.param(clip, marks=pytest.mark.slow)])
def test_a_mesh_gives_the_same_embeddings(tmp_path, make):
    ids = np.array([[3, 4, 6, 1, -1, -1], [3, 5, 6, 7, 8, 1]] * 4, np.int32)
    text, found = make(tmp_path), []
    write(text, tokenizer=False)
    for config, devices in ((MeshConfig(data=1), 1), (MeshConfig(data=1, fsdp=4, tensor=2), 8)):
        mesh = make_mesh(config, jax.devices()[:devices])
        frozen = FrozenText.load(text, mesh)
        with jax.set_mesh(mesh):
            run = jax.jit(FrozenText.__call__, static_argnums=2)
            found.append(np.asarray(run(frozen, ids, Layout(mesh)).tokens))
    mask = ids >= 0
    np.testing.assert_allclose(found[0][mask], found[1][mask], atol=2e-5)
    # A text does not depend on its company.
    np.testing.assert_allclose(found[0][0, :4], found[0][2, :4], atol=1e-6)


def test_a_hash_names_weights_and_not_files(tmp_path):
    base = t5(tmp_path / "a")
    write(base)
    digest = FrozenText.open(base).hash
    same = t5(tmp_path / "b", max_tokens=9)
    write(same, shards=2)
    assert FrozenText.open(same).hash == digest
    exact = dataclasses.replace(base, model=dataclasses.replace(T5, dtype="bfloat16"))
    assert FrozenText.open(exact).hash == digest
    pair = [clip(tmp_path / "d"), clip(tmp_path / "d", clip_skip=1)]
    write(pair[0])
    assert len({FrozenText.open(text).hash for text in pair}) == 2
    other = t5(tmp_path / "c")
    write(other, seed=1)
    assert FrozenText.open(other).hash != digest
    changed = tensors(base)
    changed["shared.weight"][-1, 0] += 1
    safetensors.numpy.save_file(changed, tmp_path / "c" / "model.safetensors")
    published._opened.cache_clear()
    assert FrozenText.open(other).hash != digest
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert FrozenText.open(same).hash != digest


def test_texts_become_tokens(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install '.[text]'")
    text = t5(tmp_path)
    write(text)
    ids = text.tokenize(["a red square", "", "a a a a a"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[3, 4, 6, 1, -1, -1], [-1] * 6, [3] * 5 + [1]]
    with pytest.raises(UserError, match=r"'a a a a a a'... has 7 tokens, this model reads 6"):
        text.tokenize(["a", "a a a a a a"])
    assert text.tokenize(["a red " * 5], cut=True).tolist() == [[3, 4, 3, 4, 3, 1]]
    elsewhere = t5(tmp_path / "weights", tokenizer=str(tmp_path))
    write(elsewhere, tokenizer=False)
    assert elsewhere.tokenize(["up"]).tolist() == [[WORDS.index("up"), 1, -1, -1, -1, -1]]
    with pytest.raises(UserError, match=r"weights has no tokenizer\.json and no spiece\.model"):
        t5(tmp_path / "weights").tokenize(["up"])
    (tmp_path / "weights" / "tokenizer.json").write_text("no tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        t5(tmp_path / "weights").tokenize(["up"])


def test_texts_become_tokens_by_sentencepiece(tmp_path):
    package = pytest.importorskip("sentencepiece", reason="pip install '.[text]'")
    sentences = (f"a {c} square moves {d}" for c in ("red", "green") for d in ("left", "up"))
    with open(tmp_path / "spiece.model", "wb") as file:
        package.SentencePieceTrainer.train(
            sentence_iterator=iter(list(sentences) * 9),
            model_writer=file,
            vocab_size=20,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    processor = package.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ids = t5(tmp_path, max_tokens=40).tokenize(["a red square"])[0]
    ids = ids[ids >= 0].tolist()
    assert ids[-1] == 1 and processor.decode(ids[:-1]) == "a red square"


def test_embeddings_are_those_of_any_company(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install '.[text]'")
    text, mesh = t5(tmp_path), make_mesh(MeshConfig(), jax.devices()[:1])
    write(text)
    frozen = FrozenText.load(text, mesh)
    out = frozen.embed(text.tokenize(["a red square", "", "left"]), mesh)
    alone = frozen.embed(text.tokenize(["left"]), mesh)
    assert out.tokens.dtype == np.float16 and out.tokens.shape == (3, 6, 16)
    assert out.mask.sum(1).tolist() == [4, 0, 2] and not out.tokens[~out.mask].any()
    np.testing.assert_array_equal(out.tokens[2], alone.tokens[0])
    assert frozen.embed(text.tokenize([]), mesh).tokens.shape == (0, 6, 16)
    broken = dataclasses.replace(
        frozen, params=frozen.params | {"embedding": frozen.params["embedding"] * np.nan}
    )
    with pytest.raises(UserError, match="gave numbers beyond float16"):
        broken.embed(text.tokenize(["left"]), mesh)


def test_what_is_wrong_with_a_folder_is_one_sentence(tmp_path):
    text = t5(tmp_path / "t5")

    def refused(match, text=text):
        published._opened.cache_clear()
        with pytest.raises(UserError, match=match):
            FrozenText.open(text)

    refused("is no folder and no hub id")
    (tmp_path / "t5").mkdir()
    refused(r"has no config\.json")
    (tmp_path / "t5" / "config.json").write_text("{")
    refused(r"config\.json is damaged")
    (tmp_path / "t5" / "config.json").write_text(json.dumps(about(text)))
    refused(r"neither model\.safetensors nor")
    (tmp_path / "t5" / "pytorch_model.bin").write_bytes(b"\x80")
    refused(r"as \.bin, which is pickle")
    write(text, shards=2)
    wide = dataclasses.replace(T5, width=32, num_layers=3)
    refused("width is 16, not 32, num_layers is 2, not 3", dataclasses.replace(text, model=wide))
    second = tmp_path / "t5" / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    refused("model-00002-of-00002.safetensors is damaged")
    second.unlink()
    refused("model-00002-of-00002.safetensors is missing")
    fewer = safetensors.numpy.load(whole)
    gone = sorted(fewer)[0]
    safetensors.numpy.save_file({n: x for n, x in fewer.items() if n != gone}, second)
    refused(f"has no tensor '{gone}'")
    safetensors.numpy.save_file(fewer | {gone: fewer[gone][:, :3]}, second)
    refused(r"has the shape .* does not go with config\.json")
    safetensors.numpy.save_file({n: x.astype(np.int8) for n, x in fewer.items()}, second)
    refused("as I8: give weights in float32")
    for change, told in (
        ({"feed_forward_proj": "relu"}, "takes t5 .of version 1.1., mt5 and umt5"),
        ({"model_type": "bert"}, "of type 'bert'"),
        ({"d_model": None}, "has no number 'd_model'"),
    ):
        (tmp_path / "t5" / "config.json").write_text(json.dumps(about(text) | change))
        refused(told)
    refused("takes clip and clip_text_model", clip(tmp_path / "t5"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: t5("x", max_tokens=0), "max_tokens must be 1 to"),
        (lambda: clip("x", max_tokens=78), "max_tokens must be 1 to 77"),
        (lambda: clip("x", max_tokens=13), "more than config.task.text.model.places=12"),
        (lambda: clip("x", clip_skip=3), "clip_skip must be 0 to 2"),
        (lambda: dataclasses.replace(T5, buckets=7), "buckets even"),
        (lambda: dataclasses.replace(CLIP, num_heads=3), "a multiple of"),
        (lambda: ByteEncoderConfig(max_bytes=3).tokenize(["four"]), "has 4 bytes, this model"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_hub_id_is_pinned_and_found_in_the_cache(tmp_path, monkeypatch):
    reason = "pip install '.[text]'"
    constants = pytest.importorskip("huggingface_hub.constants", reason=reason)
    commit = "0123456789" * 4
    with pytest.raises(UserError, match=r"has no commit: give .* as config\.task\.text\.revision"):
        hub.folder_of("google/t5-v1_1-xl")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither on this machine nor to be had from the hub"):
        hub.folder_of("some/encoder", commit)
    snapshot = tmp_path / "models--some--encoder" / "snapshots" / commit
    text = t5(snapshot / "text_encoder")
    write(text)
    assert hub.folder_of("some/encoder", commit) == snapshot
    found = FrozenText.open(
        dataclasses.replace(text, path="some/encoder/text_encoder", revision=commit)
    )
    assert found.hash == FrozenText.open(text).hash
    with pytest.raises(UserError, match="has no folder 'other'"):
        hub.folder_of("some/encoder/other", commit)
