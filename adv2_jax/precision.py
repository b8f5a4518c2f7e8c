"""Types: a network may compute in half precision; losses and maps are float32 or wider."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def at_least_float32(values: ArrayLike) -> Array:
    """Return the values as float32, or unchanged if wider; gradients return in their own type."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
