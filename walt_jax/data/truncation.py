"""Files that end too early: FFmpeg would decode what is there and say nothing."""

from pathlib import Path

import av

from walt_jax.errors import UserError

_SEGMENT = b"\x18\x53\x80\x67"  # Matroska's element that holds all the rest
_HEAD = 4096  # bytes within which it begins


def check_not_truncated(stream: av.VideoStream, path: Path) -> None:
    """Refuses a file whose index, or whose Matroska segment, points behind its end.

    Raises:
      UserError: it does.
    """
    entries = stream.index_entries
    needed = max((e.pos + e.size for e in (entries[i] for i in range(len(entries)))), default=0)
    needed = max(needed, _end_of_segment(path))
    size = path.stat().st_size
    if needed > size:
        raise UserError(
            f"{path} is truncated: by its index {needed} bytes belong to it and {size} are there; "
            "fetch it again or leave it out."
        )


def _end_of_segment(path: Path) -> int:
    """Where the segment of a Matroska or WebM file ends; 0 in other files, or if none is told."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    at = head.find(_SEGMENT) + len(_SEGMENT)
    if not head.startswith(b"\x1a\x45\xdf\xa3") or not len(_SEGMENT) <= at < len(head):
        return 0
    # The leading zeros of the first byte say how many follow; all ones is a size unknown.
    length = 9 - head[at].bit_length()
    bits = 7 * length
    value = int.from_bytes(head[at : at + length], "big") & ((1 << bits) - 1)
    return 0 if value == (1 << bits) - 1 else at + length + value
