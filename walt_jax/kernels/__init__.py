"""Window attention: the one attention primitive of the project."""

from walt_jax.kernels.window_attention import ExtraKv, resolve_window, window_attention

__all__ = ["ExtraKv", "resolve_window", "window_attention"]
