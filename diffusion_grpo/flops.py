"""Floating-point operations of a program, counted in its matrix products and convolutions.

Counted in the traced program, not the compiled one: so the number is the model's, the same on every
device, and neither a fused kernel nor a library call hides from it. Multiplications and additions
count one each; everything else (norms, activations, softmax) is left out, as is usual for MFU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *args: Any, **kw: Any) -> int:
    """Count the operations of a call; nothing is computed or compiled.

    Args:
        function: traceable by JAX.
        *args: arrays or `jax.ShapeDtypeStruct`s.
        **kw: static arguments of a function that is jitted with them.

    Returns:
        2 for every multiply-add of products and convolutions, those with an inserted zero not
        counted. A loop counts as often as it runs; of a branch the larger side counts.
    """
    return _of_jaxpr(jax.make_jaxpr(lambda *inner: function(*inner, **kw))(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(equation_flops(equation) for equation in jaxpr.eqns)


def equation_flops(equation: Any) -> int:
    """Count the operations of one traced equation, with what is inside it."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        inner = math.prod(left[i] for i in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * inner
    if name == "conv_general_dilated":
        spec = params["dimension_numbers"]
        kernel = equation.invars[1].aval.shape
        window = math.prod(kernel[i] for i in spec.rhs_spec[1:])  # inputs of a group, and pixels
        zeros = math.prod(params["lhs_dilation"]) * params["batch_group_count"]
        return 2 * math.prod(equation.outvars[0].aval.shape) * window // zeros
    if name.startswith("dot_product_attention"):
        return _of_attention(name, equation)
    inner = [_of_jaxpr(part) for part in inner_programs(params)]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _of_attention(name: str, equation: Any) -> int:
    """Count cuDNN's fused attention: two products forward, five backward with one recomputed.

    The recomputed one is the kernel's own affair and does not count as the model's.
    """
    b, n, heads, d = equation.invars[0].aval.shape
    m = equation.invars[1].aval.shape[1]
    return (4 if "bwd" in name or "backward" in name else 2) * 2 * b * heads * n * m * d


def inner_programs(params: dict[str, Any]) -> list[Any]:
    """Return the programs inside an equation: of a call, a loop or a branch."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found
