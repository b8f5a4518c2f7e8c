"""Count the work of a program: multiply-adds of convolutions and dots in what JAX traces. Nothing is computed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def multiply_adds(f: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds of the convolutions and dots of f(*arguments).

    The body of a `scan` (and of a `fori_loop` of fixed length) counts once a turn. A `while_loop`
    counts as many turns as the largest whole number that its condition compares with, which is the
    bound of those that count up (conjugate gradients, say), else one. Of a `cond` the dearest
    branch counts. What XLA merges or drops afterwards is counted all the same.

    Args:
        f: any traceable function.
        arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    return _count(jax.make_jaxpr(f)(*arguments))


def _count(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of_equation(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted, _ = parameters["dimension_numbers"]
        return _size(equation.outvars[0]) * math.prod(
            equation.invars[0].aval.shape[axis] for axis in contracted[0]
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        # a dilated input, as in the gradient of a strided convolution, holds zeros, which cost
        # nothing
        return (
            _size(equation.outvars[0])
            * math.prod(kernel)
            // outputs
            // math.prod(parameters["lhs_dilation"])
        )
    # beside the solver it holds its transpose and the operator, which do not run
    if name == "custom_linear_solve":
        return _count(parameters["jaxprs"].solve)
    inner = [_count(jaxpr) for jaxpr in subprograms(parameters)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "while":
        return _turns(parameters["cond_jaxpr"].jaxpr) * sum(inner)
    return sum(inner)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def subprograms(parameters: dict[str, Any]) -> Iterator[Any]:
    """Jaxprs among the parameters of an equation, each once."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item


def _turns(condition: Any) -> int:
    literals = [v.val for equation in condition.eqns for v in equation.invars if hasattr(v, "val")]
    return max(
        (
            int(value)
            for value in literals
            if isinstance(value, int) or getattr(value, "dtype", None) == "int32"
        ),
        default=1,
    )
