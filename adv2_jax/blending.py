"""φ(x; m): an image blended into an alternative that shows nothing of it (ADV² eq. 8; Dabkowski & Gal 2017)."""

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax.maps import blur, resize
from adv2_jax.types import Image, Map

BLUR = 11 / 224  # standard deviation, in sides of the image
NOISE = 0.1  # standard deviation about the constant colour


def blend(image: Image, mask: Map, alternative: Image) -> Image:
    """φ(x; m): the image where m = 1, the alternative where m = 0, a mixture between; linear in all
    three.

    Args:
        image: [H, W, 3] in [0, 1].
        mask: [h, w] in [0, 1], upsampled bilinearly.
        alternative: [H, W, 3] in [0, 1].

    Returns:
        [H, W, 3] in [0, 1].
    """
    height, width, _ = image.shape
    return alternative + resize(mask, (height, width))[..., None] * (image - alternative)


def blurred(image: Image) -> Image:
    """The image under a Gaussian blur of 11 pixels at 224², as many parts of the shorter side at other sizes."""
    return blur(image, BLUR * min(image.shape[:2]))


def coloured(key: Array, image: Image) -> Image:
    """A random constant colour with Gaussian noise on it, of the size of the image."""
    colour_key, noise_key = jax.random.split(key)
    noise = NOISE * jax.random.normal(noise_key, image.shape, image.dtype)
    return jnp.clip(jax.random.uniform(colour_key, (3,), image.dtype) + noise, 0, 1)


def alternative(key: Array, image: Image) -> Image:
    """`blurred` or `coloured`, as likely one as the other.

    Args:
        key: of the choice, the colour and the noise.
        image: [H, W, 3] in [0, 1].

    Returns:
        [H, W, 3] in [0, 1].
    """
    choice_key, colour_key = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(choice_key), blurred(image), coloured(colour_key, image))
