"""Meshes, sharding rules and multi-host set-up: every PartitionSpec of the project lives here."""

from walt_jax.parallel.attention import sharded_attention
from walt_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from walt_jax.parallel.sharding import Layout, describe, state_shardings

__all__ = [
    "AXES",
    "Layout",
    "MeshConfig",
    "describe",
    "make_mesh",
    "sharded_attention",
    "state_shardings",
]
