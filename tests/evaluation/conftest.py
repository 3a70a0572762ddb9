"""What the tests of scores share."""

from runs import copied, denoiser_run, denoiser_values, tokenizer_run

__all__ = ["copied", "denoiser_run", "denoiser_values", "tokenizer_run"]
