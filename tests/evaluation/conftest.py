"""What the tests of scores share."""

from i3d_fixture import i3d_file

__all__ = ["i3d_file"]
