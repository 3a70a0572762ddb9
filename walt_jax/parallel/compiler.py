"""Options of XLA that training steps are compiled with, for real chips and in rehearsals.

The place for what `python -m benchmarks.xla_flags` shows to pay, with its reason; figures are in
docs/rehearse.md. Whatever LIBTPU_INIT_ARGS or XLA_FLAGS say of other options holds as well.
"""

from jax.sharding import Mesh

Options = dict[str, bool | int | str]

TPU: Options = {
    # Else a product whose sum is scattered is divided into as many products of a part of the rows,
    # each sent on while the next is computed: less is left to hide, but small products take nearly
    # twice the cycles.
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
    # Gathered weights arrive while matrices are multiplied. On v5e they do so by default, on v5p
    # and v6e products would wait for them.
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}


def compiler_options(mesh: Mesh) -> Options:
    """`compiler_options` of `jax.jit` for a mesh's devices."""
    return dict(TPU) if mesh.devices.flat[0].platform == "tpu" else {}
