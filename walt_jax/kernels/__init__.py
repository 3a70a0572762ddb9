"""Window attention: the one attention primitive of the project."""

from walt_jax.kernels.window_attention import resolve_window, window_attention

__all__ = ["resolve_window", "window_attention"]
