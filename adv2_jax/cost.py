"""Count the work of a traced program: multiply-adds of its convolutions and dots.

Nothing is computed. An attack is charged by it, so that no cost is declared by hand.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def multiply_adds(f: Callable[..., Any], *arguments: Any) -> int:
    """Return the number of multiply-adds in the convolutions and dots of f(*arguments).

    The body of a `scan` (and of a `fori_loop` of fixed length) counts once for each iteration. That
    of a `while_loop` counts as often as the largest integer literal in its condition, which is the
    bound of loops that count up (such as conjugate gradients), else once. Of a `cond` the most
    expensive branch counts. What nothing reads does not count; work that XLA merges does.

    Args:
        f: any traceable function.
        arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    return _count(jax.make_jaxpr(f)(*arguments))


def _count(jaxpr: Any) -> int:
    program, total = getattr(jaxpr, "jaxpr", jaxpr), 0
    read = {v for v in program.outvars if not is_literal(v)}
    # backwards: what nothing reads is never computed, as values in a gradient that is linear
    for equation in reversed(program.eqns):
        if equation.effects or not read.isdisjoint(equation.outvars):
            total += _of_equation(equation)
            read.update(v for v in equation.invars if not is_literal(v))
    return total


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
        # an input dilated by k, as in the gradient of a strided convolution, is all zeros but one
        # value in k, and a good implementation skips them
        return (
            _size(equation.outvars[0])
            * math.prod(kernel)
            // outputs
            // math.prod(parameters["lhs_dilation"])
        )
    # its parameters also hold the transposed solver and the operator, which do not run
    if name == "custom_linear_solve":
        return _count(parameters["jaxprs"].solve)
    inner = [_count(jaxpr) for jaxpr in subprograms(parameters)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "while":
        return _iterations(parameters["cond_jaxpr"].jaxpr) * sum(inner)
    return sum(inner)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def is_literal(variable: Any) -> bool:
    """Return whether an input or output of an equation is a number, not a variable."""
    return hasattr(variable, "val")


def subprograms(parameters: dict[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation, alone or in tuples and lists."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item


def _iterations(condition: Any) -> int:
    """Return the largest integer that the condition of a loop compares with, 1 if there is none."""
    literals = [v.val for equation in condition.eqns for v in equation.invars if is_literal(v)]
    return max(
        (
            int(value)
            for value in literals
            if isinstance(value, int) or getattr(value, "dtype", None) == "int32"
        ),
        default=1,
    )
