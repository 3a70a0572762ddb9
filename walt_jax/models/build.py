"""From nnx modules to plain dicts of parameters, and back."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

Params = dict[str, Any]
M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Network(Generic[M]):
    """A module's structure, apart from its parameters.

    `bind(params)` gives the module inside a loss; `init(key)` makes parameters; both are cheap to
    trace. The parameters are nested plain dicts of float32 arrays.
    """

    make: Callable[[nnx.Rngs], M]
    graphdef: nnx.GraphDef

    @classmethod
    def of(cls, make: Callable[[nnx.Rngs], M]) -> "Network[M]":
        """Traces `make(rngs)` abstractly: no array is allocated."""
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        return cls(make, graphdef)

    def init(self, key: jax.Array) -> Params:
        """Parameters drawn from `key`; pure, so that it can be jitted with out_shardings."""
        return nnx.to_pure_dict(nnx.split(self.make(nnx.Rngs(key)))[1])

    def shapes(self) -> Params:
        """ShapeDtypeStructs of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def bind(self, params: Params) -> M:
        """The module with these parameters."""
        return nnx.merge(self.graphdef, params)


def stack(make: Callable[[nnx.Rngs], M], num: int, rngs: nnx.Rngs) -> M:
    """`num` equal blocks as one module whose parameters have a leading axis of that length."""
    structures = []  # filled by the one trace, which takes longer than all else here

    def one(key: jax.Array) -> Params:
        graphdef, state = nnx.split(make(nnx.Rngs(key)))
        structures.append(graphdef)
        return nnx.to_pure_dict(state)

    params = jax.vmap(one)(jax.random.split(rngs.params(), num))
    return nnx.merge(structures[0], params)


def count(params: Params) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
