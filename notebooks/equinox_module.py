"""Your own network as an Equinox module.

It is a pytree already; its leaves that are not arrays, functions and strings, are static.

adv2 attack --model notebooks/equinox_module.py:network --weights network.eqx --images images.npz --out run
"""

import equinox as eqx
import jax
import jax.numpy as jnp


class Net(eqx.Module):
    convs: list
    linear: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.convs = [
            eqx.nn.Conv2d(3, 16, 3, 2, 1, key=one),
            eqx.nn.Conv2d(16, 32, 3, 2, 1, key=two),
        ]
        self.linear = eqx.nn.Linear(32, 10, key=three)

    def features(self, image, act=jax.nn.relu):  # Equinox has the channels first
        x = jnp.moveaxis(image - 0.5, -1, 0)
        for conv in self.convs:
            x = act(conv(x))
        return jnp.moveaxis(x, 0, -1)

    def head(self, features):
        return self.linear(features.mean(axis=(0, 1)))


def network(path=None):
    """Return the network with the weights of eqx.tree_serialise_leaves, or initialise it anew."""
    fresh = Net(jax.random.key(0))
    return fresh if path is None else eqx.tree_deserialise_leaves(path, fresh)
