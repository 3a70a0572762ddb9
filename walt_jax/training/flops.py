"""Model FLOPs: what a step has to compute, counted from the traced program.

The compiler's own count takes the body of a `lax.scan` once, and recomputation (remat) for work.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
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
        return _convolution(eqn)
    if str(params.get("name", "")).startswith("uncounted_"):  # sums that are written as products
        return 0.0
    if name == "cond":
        branches = [branch.jaxpr for branch in params["branches"]]
        if params.get("branches_platforms"):  # the last is the plain one, others may do more
            return _count(branches[-1])
        return max(map(_count, branches))
    inner = sum(_count(j) for j in map(_jaxpr, params.values()) if j is not None)
    return inner * params["length"] if name == "scan" else inner


def _convolution(eqn: core.JaxprEqn) -> float:
    """Products of values: those with padding and with the holes of dilation are left out.

    A gradient at a convolution's input runs over a padded grid; its products are as many as those
    of the convolution.
    """
    x, kernel = (v.aval.shape for v in eqn.invars)
    out, params = eqn.outvars[0].aval.shape, eqn.params
    of_x, of_kernel, of_out = params["dimension_numbers"]
    pairs = 1.0
    for i, (low, _) in enumerate(params["padding"]):
        dilation = params["lhs_dilation"][i]
        starts = np.arange(out[of_out[2 + i]]) * params["window_strides"][i] - low
        places = starts[:, None] + np.arange(kernel[of_kernel[2 + i]]) * params["rhs_dilation"][i]
        inside = (places >= 0) & (places <= (x[of_x[2 + i]] - 1) * dilation)
        pairs *= np.count_nonzero(inside & (places % dilation == 0))
    return 2.0 * out[of_out[0]] * out[of_out[1]] * kernel[of_kernel[1]] * pairs


def _jaxpr(value: Any) -> core.Jaxpr | None:
    if isinstance(value, core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, core.Jaxpr) else None
