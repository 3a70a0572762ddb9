"""The benchmark of padding: its schemes by hand, and what packing must reach."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import padding
from walt_jax.errors import UserError

ARGS = argparse.Namespace(resolution=256, frames=129, tokens=65_536)


def videos(*sizes):
    return padding.Videos(*np.array(sizes).T)


def test_padding_to_the_largest_by_hand():
    """17 frames of 256 x 256 are 5 x 16 x 16 tokens of 2 x 2 latents; 5 of 128 x 256 2 x 8 x 16."""
    losses = padding.pad_to_max(videos((17, 256, 256), (6, 128, 256)), ARGS)
    assert losses.padding == pytest.approx(1 - (1280 + 256) / 2560)
    assert losses.crop == 0 and losses.waiting == pytest.approx(1 / 23)


def test_one_bucket_by_hand():
    losses = padding.one_bucket(videos(*[(34, 128, 256)] * 16, *[(17, 200, 200)] * 16), ARGS)
    assert (losses.padding, losses.shapes) == (0, 1)
    assert losses.crop == pytest.approx(0.25)
    assert losses.waiting == pytest.approx(1 - 2 * 17 / 51)


def test_packed_windows_by_hand():
    """Blocks of 17 frames of 64 x 64: 256 x 256 has 16, 5 latents of 7 stay; eight rows of 256."""
    scheme = padding.packed_by((5, 8, 8), 256, 64)
    losses = scheme(videos(*[(25, 256, 256)] * 120), ARGS)
    assert losses.padding == pytest.approx(1 - 120 * 16 / (8 * 256))
    assert losses.crop == 0 and losses.waiting == pytest.approx(1 - 17 / 25)


def test_a_stretch_keeps_what_windows_would_cut_off():
    """240 x 426 pixels are 3 x 5 windows: by a cut of 6.1 %, or a stretch of as much."""
    wide = videos(*[(17, 240, 426)] * 64)
    plain, stretched = (padding.packed_by((5, 8, 8), 256, 64, s)(wide, ARGS) for s in (0, 0.07))
    assert plain.crop == pytest.approx(1 - (5 / 3) / (426 / 240)) and stretched.crop == 0
    assert plain.scaled == pytest.approx(1 - 192 * 320 / (256**2 * (1 - plain.crop)))
    assert stretched.scaled == pytest.approx(1 - 192 * 320 / 256**2)


def test_packing_keeps_its_promise_on_the_mixture(tmp_path, monkeypatch, capsys, sprite_records):
    file = tmp_path / "padding.json"
    arguments = ["--data", str(sprite_records), "--videos", "3000", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["padding", *arguments])
    with pytest.raises(UserError, match="lower --resolution"):  # sprites of 32 pixels
        padding.main()
    monkeypatch.setattr("sys.argv", ["padding", *arguments, "--resolution", "256"])
    some = videos(*[(40, 256, 341), (20, 480, 270), (90, 720, 720)] * 1000)
    monkeypatch.setattr(padding, "of_dataset", lambda *_: some)
    padding.main()
    assert "packed windows" in capsys.readouterr().out
    found = json.loads(file.read_text())["Open-Sora's mixture"]
    packed = found["packed tokens"]
    assert packed["padding"] <= 0.02 and packed["padding"] + packed["crop"] <= 0.04
    assert found["pad to the largest"]["padding"] > 0.5
    assert found["packed windows"]["padding"] <= 0.02
    stretched = found["the same, 7% stretch"]
    assert stretched["padding"] + stretched["crop"] <= 0.04
    with pytest.raises(UserError, match="must be positive"):
        monkeypatch.setattr("sys.argv", ["padding", *arguments, "--frames", "0"])
        padding.main()
