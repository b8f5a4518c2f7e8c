"""φ(x; m): an image blended into an alternative without its contents (ADV² eq. 8).

The alternatives are those of Dabkowski & Gal (2017): a blur, or a random colour.
"""

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax.maps import blur, resize
from adv2_jax.types import Image, Map

BLUR = 11 / 224  # standard deviation, in sides of the image
NOISE = 0.1  # standard deviation about the constant colour


def blend(image: Image, m: Map, alternative: Image) -> Image:
    """Return φ(x; m): the image where m = 1, the alternative where m = 0; linear in all three.

    Args:
        image: [H, W, 3] in [0, 1].
        m: [h, w] in [0, 1], upsampled bilinearly.
        alternative: [H, W, 3] in [0, 1].

    Returns:
        [H, W, 3] in [0, 1].
    """
    height, width, _ = image.shape
    return alternative + resize(m, (height, width))[..., None] * (image - alternative)


def blurred(image: Image) -> Image:
    """Return the image under a Gaussian blur of 11/224 of the shorter side."""
    return blur(image, BLUR * min(image.shape[:2]))


def coloured(key: Array, image: Image) -> Image:
    """Draw a constant colour with Gaussian noise, clipped to [0, 1], as large as the image."""
    colour_key, noise_key = jax.random.split(key)
    noise = NOISE * jax.random.normal(noise_key, image.shape, image.dtype)
    return jnp.clip(jax.random.uniform(colour_key, (3,), image.dtype) + noise, 0, 1)


def alternative(key: Array, image: Image) -> Image:
    """Draw `blurred` or `coloured`, with probability 1/2 each.

    Args:
        key: PRNG key of the choice, the colour and the noise.
        image: [H, W, 3] in [0, 1].

    Returns:
        [H, W, 3] in [0, 1].
    """
    choice_key, colour_key = jax.random.split(key)
    # both are drawn and one is chosen: under `vmap` a `cond` would do the same
    return jnp.where(jax.random.bernoulli(choice_key), blurred(image), coloured(colour_key, image))
