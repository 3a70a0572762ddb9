"""What the tests of scores share."""

from i3d_fixture import i3d_file
from runs import copied, denoiser_run, denoiser_values, tokenizer_run

__all__ = ["copied", "denoiser_run", "denoiser_values", "i3d_file", "tokenizer_run"]
