"""Sums on disk: nothing is counted twice or lost, whoever was killed when."""

import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.evaluation import partial
from walt_jax.evaluation.measures import Measure

TOTAL = 23


class Squares(Measure):
    """The sum of the squares of what comes."""

    def __init__(self):
        self.sum, self.record = np.zeros(1), {}

    def add(self, numbers, videos, real=None):
        self.sum = self.sum + np.square(videos, dtype=np.float64).sum()

    def state(self):
        return {"sum": self.sum}

    def absorb(self, state):
        self.sum = self.sum + state["sum"]

    def results(self):
        return {"squares": (float(self.sum[0]),)}


def gather(folder, stop=None, batch=4, **options):
    """The sum of the squares of all numbers; stops after `stop` of them as by kill -9."""
    asked = []

    def produce(numbers):
        asked.extend(numbers)
        for i in range(0, len(numbers), batch):
            if stop is not None and i >= stop:
                raise KeyboardInterrupt
            part = numbers[i : i + batch]
            yield part, part[:, None, None, None, None]

    measure = Squares()
    options = {"progress": False, "save_every": 0.0} | options
    try:
        partial.gather(folder, TOTAL, {"squares": measure}, produce, **options)
    except KeyboardInterrupt:
        return None, asked
    return measure.results()["squares"][0], asked


WHOLE = float(np.sum(np.arange(TOTAL) ** 2))


def test_all_at_once(tmp_path):
    assert gather(tmp_path / "sums") == (WHOLE, list(range(TOTAL)))


@pytest.mark.parametrize("batch", [1, 3, 23])
def test_cut_off_again_and_again(any_folder, batch):
    done, folder = 0, any_folder / "sums"
    for _ in range(30):
        result, asked = gather(folder, stop=batch, batch=batch)
        assert asked == list(range(done, TOTAL))
        if result is not None:
            break
        done += batch
    assert result == WHOLE
    assert gather(folder) == (WHOLE, [])
    partial.remove(folder)
    assert not folder.exists()


def test_saves_are_as_rare_as_asked_for(tmp_path):
    gather(tmp_path / "sums", stop=8, save_every=100.0)
    assert not list((tmp_path / "sums").iterdir())
    assert gather(tmp_path / "sums")[1] == list(range(TOTAL))


def left_by(folder, process, numbers):
    """The file of another process that counted these numbers."""
    measure = Squares()
    sums = partial._Sums(folder, TOTAL, {"squares": measure})
    sums._file = f"sums-{process}.npz" if process else "sums.npz"
    measure.add(numbers, np.asarray(numbers))
    sums.done[numbers] = True
    folder.mkdir(exist_ok=True)
    sums.save()


def test_one_process_goes_on_with_what_three_left(any_folder):
    for process, numbers in enumerate(([0, 1, 2], [9, 10], [20])):
        left_by(any_folder, process, numbers)
    result, asked = gather(any_folder)
    assert result == WHOLE and len(asked) == TOTAL - 6
    assert [f.name for f in any_folder.iterdir()] == ["sums.npz"]


def test_killed_between_joining_and_removing(any_folder):
    """The base holds what the other file holds too."""
    left_by(any_folder, 0, [0, 1, 2, 9, 10])
    left_by(any_folder, 1, [9, 10])
    result, asked = gather(any_folder)
    assert result == WHOLE and len(asked) == TOTAL - 5


def test_a_damaged_file_is_counted_again(any_folder, caplog):
    left_by(any_folder, 0, [0, 1, 2])
    (any_folder / "sums-1.npz").write_bytes(b"PK broken")
    result, asked = gather(any_folder)
    assert result == WHOLE and asked == list(range(3, TOTAL))
    assert "is damaged" in caplog.text


def test_a_folder_that_is_not_shared(tmp_path, monkeypatch):
    """Two processes of which one sees nothing of the other."""
    monkeypatch.setattr(partial.jax, "process_count", lambda: 2)
    monkeypatch.setattr(partial, "barrier", lambda name: None)
    monkeypatch.setattr(partial.multihost_utils, "broadcast_one_to_all", lambda x: x, raising=False)
    with pytest.raises(UserError, match=r"holds 12 of 23 videos.*all processes share"):
        gather(tmp_path / "sums")
