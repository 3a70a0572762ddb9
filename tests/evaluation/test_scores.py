"""The file of scores: whole lines, and a record that says when two are the same."""

import pytest

from walt_jax.errors import UserError
from walt_jax.evaluation import scores
from walt_jax.evaluation.scores import Score

RECORD = {"protocol": {"name": "custom", "size": (8, 8)}, "samples": {"step": 3}, "code": {"v": 1}}
SCORE = Score("fvd", (1.0, 3.0), RECORD, 3)


def test_a_score_is_the_mean_of_its_folds():
    assert (SCORE.value, SCORE.std) == (2.0, 1.0)
    assert str(SCORE) == "fvd 2 +- 1 over 2 folds"
    assert str(Score("fvd", (2.0,), RECORD)) == "fvd 2"


def test_scores_come_back(any_folder):
    scores.append(any_folder / "run", [SCORE, Score("kvd", (0.5,), RECORD)])
    scores.append(any_folder / "run", [Score("fvd", (4.0,), RECORD | {"samples": {"step": 4}}, 4)])
    found = scores.read_scores(any_folder / "run")
    assert [(s.name, s.folds, s.step) for s in found] == [
        *(("fvd", (1.0, 3.0), 3), ("kvd", (0.5,), None), ("fvd", (4.0,), 4))
    ]
    assert all(s.time.endswith("+00:00") for s in found)
    assert scores.read_scores(any_folder / "run" / "scores.jsonl") == found


def test_another_version_of_the_code_makes_the_same_score(any_folder):
    scores.append(any_folder, [SCORE])
    assert len(scores.find(any_folder, RECORD | {"code": {"v": 2}})) == 1
    assert not scores.find(any_folder, RECORD | {"samples": {"step": 4}})
    assert not scores.find(any_folder / "none", RECORD)


def test_half_a_line_is_passed_over(any_folder):
    scores.append(any_folder, [SCORE])
    path = any_folder / "scores.jsonl"
    path.write_text(path.read_text() + '{"name": "fvd", "val')
    assert len(scores.read_scores(any_folder)) == 1
    scores.append(any_folder, [SCORE])
    assert len(scores.read_scores(any_folder)) == 2


def test_no_scores_yet(any_folder):
    with pytest.raises(UserError, match="does not exist: score a checkpoint first"):
        scores.read_scores(any_folder)


def test_a_mismatch_names_the_fields():
    theirs = {"protocol": {"name": "custom", "size": [4, 4]}, "samples": {"step": 3}}
    with pytest.raises(UserError) as error:
        scores.check_same(
            {k: v for k, v in RECORD.items() if k != "code"}, theirs, "F", "make it anew"
        )
    assert str(error.value) == (
        "F was made in another way (protocol.size: [4, 4] -> [8, 8]): make it anew."
    )


def test_the_code_is_named():
    code = scores.code()
    assert code["version"] and code["jax"] and isinstance(code["changed"], bool)
