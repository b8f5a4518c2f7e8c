"""Types: a network may compute in half precision; losses and maps are float32 or wider."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

P = ParamSpec("P")
T = TypeVar("T")


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
