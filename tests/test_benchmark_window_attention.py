"""The benchmark of window attention, and its record of what the kernels cost."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import window_attention as benchmark

SMALL = benchmark.Shape((1, 2, 4, 8), (2, 2, 4), 2, 64, bias=True)


def test_windows_are_split_and_joined():
    x = np.arange(64 * 128).reshape(1, 2, 4, 8, 128)
    windows = SMALL.split(x)
    assert windows.shape == (4, 16, 2, 64)
    np.testing.assert_array_equal(windows[1, 4], x[0, 0, 1, 4].reshape(2, 64))
    np.testing.assert_array_equal(SMALL.join(windows), x)


def test_the_floor_pads_to_the_matrix_unit():
    shape = benchmark.SPATIAL
    assert shape.name == "20x256x16x64"
    assert shape.floor("forward", "v5e") == 2 * shape.floor("forward", "v5p") == 81_920
    assert shape.floor("forward", "v6e") == 40_960
    assert 2 * shape.floor("forward + backward", "v5e") == 7 * 81_920


def test_every_way_takes_every_shape():
    for shape in benchmark.SHAPES:
        for way, functions in benchmark.WAYS.items():
            found = list(functions(shape))
            assert found or (way == "splash" and shape.bias)
            if way == "xla":
                out = jax.eval_shape(found[0][1], *shape.arguments)
                assert out.shape == shape.arguments[0].shape


def test_the_line_of_a_row():
    row = {"chip": "v5e", "shape": "a", "passes": "forward", "floor": 100}
    for way, cycles in {"ours": 120, "xla": 240, "splash": None, "flash": 600}.items():
        row |= {way: cycles, f"{way}_block": ""}
    line = benchmark._line(row)
    assert "1.20 x floor" in line and "2.0 x xla" in line and "x splash" not in line


def _recorded():
    if importlib.util.find_spec("libtpu") is None or not benchmark.record_file().exists():
        return []
    records = json.loads(benchmark.record_file().read_text())
    return [(c, s, p) for c, shapes in records.items() for s in shapes for p in shapes[s]]


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "name", "passes"), _recorded())
def test_no_kernel_grew(chip, name, passes):
    """By more than 5 % since `python -m benchmarks.window_attention --record`."""
    (shape,) = (s for s in benchmark.SHAPES if s.name == name)
    records = json.loads(benchmark.record_file().read_text())
    cycles, _ = benchmark.price("ours", shape, passes, chip)
    assert cycles is not None and cycles <= 1.05 * records[chip][name][passes]
