"""Your own interpreter in fifteen lines: Integrated Gradients (Sundararajan et al. 2017), from black to the image.

adv2 attack --interpreter notebooks/integrated_gradients.py:interpreter grad --images shapes:20 --limit 4 --out run
"""

import jax
import jax.numpy as jnp

import adv2_jax as adv2

POINTS = 8


# `act` is for the attack: its maps need a second derivative
def integrated_gradients(model, image, label, act=None):
    def gradient(share):
        return adv2.interpreters.input_gradient(model, share * image, label, act=act)[0]

    mean = jax.vmap(gradient)((jnp.arange(POINTS) + 0.5) / POINTS).mean(axis=0)
    return adv2.maps.min_max(jnp.abs(image * mean).sum(axis=-1))


interpreter = adv2.interpreters.from_explain("integrated_gradients", integrated_gradients)
