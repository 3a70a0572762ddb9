"""Aesthetics and image-text match by a toy CLIP whose answers are known."""

import hashlib

import numpy as np
import pytest
import tiny_onnx
from safetensors.numpy import save_file

from walt_jax.data.curation import scores
from walt_jax.data.curation.config import ClipModel, CutConfig, ModelFile, ScoreConfig
from walt_jax.data.curation.cutting import cut_clips
from walt_jax.errors import UserError

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (the extra `data`)")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (the extra `text`)")

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
WORDS = {"[UNK]": 0, "red": 1, "green": 2, "blue": 3}


def embedding(colour):
    x = (np.array(colour) / 255 - MEAN) / STD
    return x / np.linalg.norm(x)


@pytest.fixture
def model(tmp_path):
    vectors = [[1, 1, 1], embedding((255, 0, 0)), embedding((0, 255, 0)), embedding((0, 0, 255))]
    (tmp_path / "image.onnx").write_bytes(tiny_onnx.image_tower())
    (tmp_path / "text.onnx").write_bytes(tiny_onnx.text_tower(vectors))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    head = {"weight": np.array([[2, 0, 0]], np.float32), "bias": np.array([5], np.float32)}
    save_file(head, tmp_path / "head.safetensors")

    def file(name):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        return ModelFile(str(tmp_path / name), digest)

    files = ("image.onnx", "text.onnx", "tokenizer.json", "head.safetensors")
    return ClipModel(*map(file, files), size=8, context=4)


def score(colour, caption, model, size=(16, 24)):
    frames = [(i / 10, np.full((*size, 3), colour, np.uint8)) for i in range(4)]
    (clip,) = cut_clips(frames, 0.0, CutConfig())
    return scores.score(clip, caption, ScoreConfig(clip=model))


def test_both_scores(model):
    for colour in ((255, 0, 0), (0, 0, 255)):
        found = score(colour, "red", model)
        cosine = embedding(colour) @ embedding((255, 0, 0))
        assert found["text_match"] == pytest.approx(cosine, abs=0.02)
        assert found["aesthetic"] == pytest.approx(2 * embedding(colour)[0] + 5, abs=0.02)
    assert set(scores.columns(ScoreConfig(clip=model))) == {"aesthetic", "text_match"}
    assert score((255, 0, 0), "", model)["text_match"] == 0.0
    # More words than the tower takes are cut.
    assert score((255, 0, 0), "red " * 9, model) == score((255, 0, 0), "red " * 4, model)


def test_the_crop_is_central(model):
    frames = np.zeros((16, 48, 3), np.uint8)
    frames[:, 16:32, 0] = 255
    (clip,) = cut_clips([(0.0, frames)], 0.0, CutConfig())
    found = scores.score(clip, "red", ScoreConfig(clip=model))
    assert found["text_match"] > 0.95


def test_without_head_or_text(model, tmp_path):
    alone = ClipModel(model.image, size=8)
    assert scores.columns(ScoreConfig(clip=alone)) == {}
    only = ClipModel(model.image, aesthetic_head=model.aesthetic_head, size=8)
    assert set(score((1, 2, 3), "red", only)) == {"aesthetic"}
    with pytest.raises(UserError, match=r"needs config\.scores\.clip\.tokenizer"):
        scores.check(ScoreConfig(clip=ClipModel(model.image, model.text)))
    save_file(
        {"weight": np.zeros(5, np.float32), "bias": np.zeros(1, np.float32)},
        tmp_path / "other.safetensors",
    )
    other = ModelFile(str(tmp_path / "other.safetensors"))
    wrong = ClipModel(model.image, aesthetic_head=other, size=8)
    with pytest.raises(UserError, match="a head for embeddings of 5 numbers"):
        score((1, 2, 3), "red", wrong)
