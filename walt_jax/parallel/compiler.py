"""Options of XLA that training steps are compiled with, for real chips and in rehearsals.

The place for what `python -m benchmarks.xla_flags` shows to pay, with its reason; figures are in
docs/rehearse.md. Whatever LIBTPU_INIT_ARGS or XLA_FLAGS say of other options holds as well.
"""

from jax.sharding import Mesh

Options = dict[str, bool | int | str]

TPU: Options = {
    # Else a product whose sum is scattered is divided into as many products of a part of the rows,
    # each sent on while the next is computed: nothing is left to hide, but small products take
    # nearly twice the cycles.
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}
# Weights of the next layer arrive while matrices are multiplied: by themselves on v5e and v6e, on
# v5p products would wait for them.
_WHILE_MULTIPLYING: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
V5P = ("TPU v5", "TPU v5p")  # as its chips call themselves; a v5e is a "TPU v5 lite"


def compiler_options(mesh: Mesh) -> Options:
    """`compiler_options` of `jax.jit` for a mesh's devices."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return {}
    return TPU | _WHILE_MULTIPLYING if device.device_kind in V5P else dict(TPU)
