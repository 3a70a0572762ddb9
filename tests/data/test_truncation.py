"""Files that end too early are refused; those whose length nobody tells are not."""

import types

import pytest

from walt_jax.data.truncation import check_not_truncated
from walt_jax.errors import UserError

HEAD = b"\x1a\x45\xdf\xa3\x84webm\x18\x53\x80\x67"


def check(path, data, entries=()):
    path.write_bytes(data)
    check_not_truncated(types.SimpleNamespace(index_entries=list(entries)), path)


@pytest.mark.parametrize(
    "length", [b"\x8a", b"\x40\x0a", b"\x01" + bytes(6) + b"\x0a"], ids=["1", "2", "8"]
)
def test_a_matroska_segment_says_how_long_it_is(tmp_path, length):
    whole = HEAD + length + b"0123456789"
    check(tmp_path / "a.mkv", whole)
    check(tmp_path / "a.mkv", whole + b"more")
    with pytest.raises(UserError, match=rf"a\.mkv is truncated: .* {len(whole)} bytes"):
        check(tmp_path / "a.mkv", whole[:-1])


def test_an_index_points_behind_the_end(tmp_path):
    entry = types.SimpleNamespace(pos=90, size=11)
    check(tmp_path / "a.mp4", bytes(101), [entry])
    with pytest.raises(UserError, match="101 bytes belong to it and 100 are there"):
        check(tmp_path / "a.mp4", bytes(100), [entry])


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"\xff" + b"streamed: of unknown length",
        HEAD + b"\x01" + b"\xff" * 7 + b"likewise",
        b"no Matroska " + HEAD[-4:] + b"\xbf",
        HEAD[:4] + b"no segment",
        HEAD,
        b"",
    ],
    ids=range(6),
)
def test_what_says_nothing_is_left_to_ffmpeg(tmp_path, data):
    check(tmp_path / "a.mkv", data)
