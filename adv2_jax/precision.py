"""Networks may compute in half precision; losses and maps do not."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def at_least_float32(values: ArrayLike) -> Array:
    """The values as float32, or as they are where that is wider; the gradient goes back to their own type."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
