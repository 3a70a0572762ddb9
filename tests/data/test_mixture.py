"""Mixtures: proportions by weight, every record in every epoch, one numbering of labels."""

import json
import pickle

import numpy as np
import pytest

from walt_jax import media
from walt_jax.data.pipeline import DataConfig, Pipeline
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import open_dataset
from walt_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for name, count, labels in (("a", 12, "cat dog"), ("b", 3, "dog bird")):
        for i in range(count):
            label = labels.split()[i % 2]
            path = folder / "in" / name / label / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            media.write_mp4(path, np.full((6, 32, 32, 3), 10 * i + 20, np.uint8), 10)
        prepare_dataset(folder / "in" / name, folder / name, label_from_folder=True)
    (folder / "mix.json").write_text(json.dumps({"a": 1, "b": 1.5}))
    return folder


def test_records_come_by_their_weights(folder):
    mixture = open_dataset(folder / "mix.json")
    # 12 of a once; of b 1.5 times as many, each of the three six times.
    assert len(mixture) == 30
    sources = mixture.index["source"].tolist()
    counts = {s: sources.count(s) for s in set(sources)}
    assert {n for s, n in counts.items() if s.startswith("a/")} == {1} and len(counts) == 15
    assert {n for s, n in counts.items() if s.startswith("b/")} == {6}
    (folder / "uneven.json").write_text(json.dumps({"a": 3, "b": 1}))
    sources = open_dataset(folder / "uneven.json").index["source"].tolist()
    assert len([s for s in sources if s.startswith("b/")]) * 3 == 12 == len(sources) - 4


def test_labels_have_one_numbering(folder):
    mixture = open_dataset(folder / "mix.json")
    assert mixture.label_names == ("cat", "dog", "bird")
    for i in range(len(mixture)):
        record = mixture.read(i)
        assert record["source"].split("/")[1] == mixture.label_names[record["label"]]
        for name in ("label", "source", "num_frames"):
            assert record[name] == mixture.index[name][i]


def test_it_trains_as_a_dataset(folder):
    config = DataConfig(str(folder / "mix.json"), num_frames=5, fps=0, sizes=((32, 32),))
    mixture = open_dataset(config.path)
    pipeline = Pipeline(mixture, config, batch_size=5, seed=0)
    held_out = Pipeline(mixture, config, batch_size=5, seed=0, split="eval")
    batches = [batch for batch, _ in zip(pipeline.batches(), range(pipeline.batches_per_epoch))]
    assert all(batch["video"].shape == (5, 5, 32, 32, 3) for batch in batches)
    train, test = (
        {str(mixture.index["source"][r]) for k in range(9) for r in p.plan(k)[1]}
        for p in (pipeline, held_out)
    )
    # A video that is repeated is not on both sides.
    assert test and not train & test
    again = pickle.loads(pickle.dumps(mixture))
    assert again.fingerprint == mixture.fingerprint and len(again) == len(mixture)
    assert again.fingerprint != open_dataset(folder / "a").fingerprint


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"a": 1', "is no mixture"),
        ('["a"]', "is no mixture"),
        ('{"a": 1, "b": 0}', "weights above 0"),
        ("{}", "weights above 0"),
        ('{"a": 1, "c": 1}', "is not a complete dataset"),
    ],
)
def test_bad_mixtures(folder, text, reason):
    (folder / "bad.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        open_dataset(folder / "bad.json")


def test_kinds_do_not_mix(folder):
    for name in ("x", "y"):
        prepare_dataset(folder / "in" / "b", folder / name, overwrite=True)
    path = folder / "y" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "latents"}))
    (folder / "kinds.json").write_text('{"x": 1, "y": 1}')
    with pytest.raises(UserError, match=r"different kind: .*x and .*y"):
        open_dataset(folder / "kinds.json")
    with pytest.raises(UserError, match="does not exist"):
        open_dataset(folder / "absent.json")
