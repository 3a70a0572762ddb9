"""Window attention in float32: what the other implementations are held to."""

import jax
import jax.numpy as jnp

from walt_jax.kernels.attention import xla


def attention(
    q: jax.Array,
    *inputs: jax.Array | tuple | None,
    num_heads: int,
    block: tuple[int, int, int],
    causal: bool | int,
) -> jax.Array:
    """`xla.attention` with everything in float32 and exact products; the result has q's dtype."""

    def widened(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.default_matmul_precision("highest"):
        inputs = jax.tree.map(widened, (q, *inputs))
        out = xla.attention(*inputs, num_heads=num_heads, block=block, causal=causal)
    return out.astype(q.dtype)
