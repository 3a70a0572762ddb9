"""Implementations of window attention; `walt_jax.kernels.window_attention` chooses among them."""
