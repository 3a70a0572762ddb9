"""Model FLOPs: what a step has to compute, counted from the traced program.

The compiler's own count takes the body of a `lax.scan` once, and recomputation (remat) for work.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def forward_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matrix products and convolutions of `fn(*args)`; args may be shapes."""
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def gradient_flops(loss: Callable[..., Any], params: Any, *args: Any) -> float:
    """FLOPs of the gradient of `loss(params, *args)`, a scalar and an aux, with its forward pass.

    About three times the forward pass of what is trained, twice that of a frozen network that the
    gradient passes through, once that of one it does not.
    """

    def gradient(params: Any, *args: Any) -> Any:
        return jax.grad(loss, has_aux=True)(params, *args)[0]

    jaxpr = jax.make_jaxpr(gradient)(params, *args).jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: core.Jaxpr) -> float:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out) * math.prod(kernel) / features
    if name == "cond":  # the branches of platform_dependent: one is taken
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = sum(_count(j) for j in map(_jaxpr, params.values()) if j is not None)
    return inner * params["length"] if name == "scan" else inner


def _jaxpr(value: Any) -> core.Jaxpr | None:
    if isinstance(value, core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, core.Jaxpr) else None
