"""Precision: of products in attack steps, and of what is reported.

A network may compute in half precision; losses and maps are float32 or wider. Accelerators round
the factors of float32 products: to TF32 on GPUs, to bfloat16 on TPUs. That moves a GRAD map as much
as a good attack leaves of it, so what is reported is computed at "highest" (`highest`), and only
the steps of an attack at less (`at`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

P = ParamSpec("P")
T = TypeVar("T")

# the last computes in bfloat16 what the network computes, with weights and images in float32
PRECISIONS = ("highest", "high", "default", "bfloat16")


def at_least_float32(values: ArrayLike) -> Array:
    """Return the values as float32, or unchanged if wider; gradients return in their own type."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def highest(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: float32 products inside are float32, not the bfloat16 or TF32 of accelerators."""

    @wraps(function)
    def exact(*args: P.args, **options: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **options)

    return exact


def at(precision: str) -> AbstractContextManager[object]:
    """Return the context in which float32 products have a precision.

    Args:
        precision: one of `PRECISIONS`. The products of "bfloat16" have no more than JAX's default.

    Raises:
        ValueError: for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    # on a CPU all are the same, and under each context every function would be traced again
    if jax.default_backend() == "cpu":
        return nullcontext()
    return jax.default_matmul_precision("default" if precision == "bfloat16" else precision)


def computing(model: T, precision: str) -> T:
    """Return the network as attack steps compute it: with weights in bfloat16 if that is asked for.

    A network computes in bfloat16 if it casts what it takes to the type of its weights, as those of
    `adv2_jax.models` do, after the normalisation: an image in bfloat16 would have only 128 values
    between .5 and 1.
    """
    if precision != "bfloat16":
        return model

    def narrow(leaf: Any) -> Any:
        return leaf.astype(jnp.bfloat16) if getattr(leaf, "dtype", None) == jnp.float32 else leaf

    return jax.tree.map(narrow, model)
