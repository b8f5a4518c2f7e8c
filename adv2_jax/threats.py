"""Threat models as data: what the adversary may change, as (init, apply, project) on one image.

An attack optimises parameters; a threat model says where they start, which image they make and how they are brought back into
the allowed set. Factories are cached, so equal options give the same object.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from adv2_jax.options import shared
from adv2_jax.types import Image

Params = Any


class Threat(NamedTuple):
    """What an adversary may do to one image.

    Attributes:
        name: as in results.
        init: image [H, W, 3] -> parameters (any pytree) of the unchanged image.
        apply: (parameters, image) -> adversarial image in [0, 1].
        project: (parameters, image) -> the nearest allowed parameters.
    """

    name: str
    init: Callable[[Image], Params]
    apply: Callable[[Params, Image], Image]
    project: Callable[[Params, Image], Params]


@shared
def linf(epsilon: float = 0.031) -> Threat:
    """|| x - x° ||_inf <= epsilon and x in [0, 1] (ADV² eq. 4).

    Args:
        epsilon: radius in units of pixel value, in (0, 1]; the released code uses 0.031, the paper 8/255.

    Raises:
        ValueError: if epsilon is outside (0, 1].
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon = {epsilon} must lie in (0, 1], in units of pixel value (8/255 = 0.0314)")

    def project(delta: Array, image: Image) -> Array:
        low, high = jnp.maximum(-epsilon, -image), jnp.minimum(epsilon, 1 - image)
        return optax.projections.projection_box(delta, low, high)

    return Threat("linf", jnp.zeros_like, lambda delta, image: image + delta, project)
