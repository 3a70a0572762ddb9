"""Embeddings of captions beside cached latents, with the hash of what made them."""

import dataclasses

import jax
import numpy as np
import pytest
import small_text

from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.records import open_dataset
from walt_jax.data.writer import write_dataset
from walt_jax.errors import UserError
from walt_jax.models.text import FrozenText
from walt_jax.parallel import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a tiny T5, which reads eleven tokens."""
    text = small_text.t5(tmp_path_factory.mktemp("t5"), max_tokens=11)
    small_text.write(text)
    return text


@pytest.fixture(scope="module")
def with_text(encode, text, tmp_path_factory):
    pytest.importorskip("tokenizers", reason="pip install '.[text]'")
    return encode(tmp_path_factory.mktemp("text") / "latents", text=text, epochs=1)


def test_embeddings_of_captions_lie_in_the_records(with_text, straight, text):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    frozen = FrozenText.load(text, mesh)
    records = [with_text.read(i) for i in range(len(with_text))]
    captions = [record["caption"] for record in records]
    assert len(set(captions)) > 5 and max(len(c.split()) for c in captions) < 11
    expected = frozen.embed(text.tokenize(captions), mesh)
    for i, record in enumerate(records):
        tokens = expected.tokens[i][expected.mask[i]]
        assert record["text_embeddings"].dtype == np.float16 and record["text_hash"] == frozen.hash
        np.testing.assert_allclose(record["text_embeddings"], tokens, atol=2e-3)
        np.testing.assert_array_equal(record["latents"], straight.read(i)["latents"])
    about = {"hash": frozen.hash, "width": 16, "max_tokens": 11}
    assert with_text.metadata["text"] == about


def test_embeddings_come_to_batches(with_text, text):
    wider = dataclasses.replace(text, max_tokens=13)
    config, options = DataConfig(str(with_text.directory)), {"batch_size": 24, "split": "all"}
    options |= {"seed": 0, "shuffle": False}
    pipeline = Pipeline(with_text, config, text_encoder=wider, **options)
    batch = next(pipeline.batches())
    (shapes,) = pipeline.shapes()
    names = ("latents", "label", "fps", "text_embeddings", "text_length")
    assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {
        k: (batch[k].shape, batch[k].dtype) for k in names
    }
    record, length = with_text.read(3), batch["text_length"][3]
    assert batch["text_embeddings"].shape == (24, 13, 16) and 3 < length < 11
    np.testing.assert_array_equal(batch["text_embeddings"][3, :length], record["text_embeddings"])
    assert not batch["text_embeddings"][3, length:].any()
    # A model that reads bytes, or no text, does without.
    plain = Pipeline(with_text, dataclasses.replace(config, caption_bytes=8), **options)
    assert "text_embeddings" not in plain.shapes()[0] and "text" in plain.shapes()[0]
    for change in ({"max_tokens": 10}, {"model": dataclasses.replace(text.model, width=8)}):
        with pytest.raises(UserError, match="holds text embeddings of 16 features of up to 11"):
            Pipeline(with_text, config, text_encoder=dataclasses.replace(text, **change), **options)


def test_a_caption_that_says_nothing_has_no_tokens(encode, data, text, sprite_records, tmp_path):
    pytest.importorskip("tokenizers", reason="pip install '.[text]'")
    videos = open_dataset(sprite_records)
    examples = [videos.read(i) | {"caption": "up" if i else ""} for i in range(2)]
    write_dataset(tmp_path / "videos", videos.features, examples, metadata=videos.metadata)
    quiet = dataclasses.replace(data, path=str(tmp_path / "videos"))
    latents = encode(tmp_path / "latents", data=quiet, text=text, epochs=1, batch_size=2)
    config = DataConfig(str(latents.directory))
    options = {"batch_size": 2, "seed": 0, "split": "all", "shuffle": False}
    batch = next(Pipeline(latents, config, text_encoder=text, **options).batches())
    assert batch["text_length"].tolist() == [0, 2]
    rows = np.abs(batch["text_embeddings"]).sum(-1)
    assert not rows[0].any() and rows[1, :2].all() and not rows[1, 2:].any()


def test_tokens_come_to_batches_without_embeddings(straight, text):
    config = DataConfig(str(straight.directory))
    options = {"batch_size": 4, "seed": 0, "split": "all", "shuffle": False}
    pipeline = Pipeline(straight, config, text_encoder=text, **options)
    batch = next(pipeline.batches())
    expected = text.tokenize([straight.read(i)["caption"] for i in range(4)])
    np.testing.assert_array_equal(batch["text"], expected)
    assert pipeline.shapes()[0]["text"].shape == (4, 11)


def test_a_record_of_a_foreign_text_encoder_is_refused(with_text, text, tmp_path):
    examples = [with_text.read(i) for i in range(4)]
    examples[2]["text_hash"] = "somebody else's"
    mixed = write_dataset(
        tmp_path / "mixed", with_text.features, examples, metadata=with_text.metadata
    )
    batches = Pipeline(
        mixed,
        DataConfig(str(mixed.directory)),
        batch_size=2,
        seed=0,
        split="all",
        shuffle=False,
        text_encoder=text,
    ).batches()
    next(batches)
    with pytest.raises(UserError, match=r"mixed has text embeddings by encoder somebody"):
        next(batches)
