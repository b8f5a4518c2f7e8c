"""Your own interpreter in fifteen lines: Integrated Gradients (Sundararajan et al. 2017).

The map is |image · mean gradient| on the straight path from black to the image.

adv2 attack --interpreter notebooks/integrated_gradients.py:interpreter grad --images shapes:20 --limit 4 --out run
"""

import jax
import jax.numpy as jnp

import adv2_jax as adv2

POINTS = 8  # of the path, where the gradient is taken; more are exacter, and cost as much more


# `act` is for the attack, which needs a second derivative of the network
def integrated_gradients(model, image, label, act=None):
    def gradient(share):
        return adv2.interpreters.input_gradient(model, share * image, label, act=act)[0]

    # midpoints: the error of the mean falls with the square of their number
    mean = jax.vmap(gradient)((jnp.arange(POINTS) + 0.5) / POINTS).mean(axis=0)
    return adv2.maps.min_max(jnp.abs(image * mean).sum(axis=-1))


# a name of its own: "integrated_gradients" is that of the built-in one, which has more options
interpreter = adv2.interpreters.from_explain("mine", integrated_gradients)
