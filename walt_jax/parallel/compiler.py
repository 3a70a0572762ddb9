"""Options of XLA that training steps are compiled with, for real chips and in rehearsals.

The place for what `python -m benchmarks.xla_flags` shows to pay; none has been chosen yet. Whatever
LIBTPU_INIT_ARGS or XLA_FLAGS say of other options holds as well.
"""

from jax.sharding import Mesh

TPU: dict[str, bool | int | str] = {}


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str]:
    """`compiler_options` of `jax.jit` for a mesh's devices."""
    return dict(TPU) if mesh.devices.flat[0].platform == "tpu" else {}
