"""Your own network as a Flax Linen module: `clone(act=...)` gives its smoothed twin.

adv2 attack --model notebooks/linen.py:network --weights parameters.safetensors --images images.npz --out run
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from safetensors.flax import load_file


class Net(nn.Module):
    """A convolutional network whose ReLU is an attribute."""

    act: Callable[[jax.Array], jax.Array] = nn.relu

    def setup(self):
        self.convs = [nn.Conv(channels, (3, 3), strides=2) for channels in (16, 32)]
        self.norms = [nn.BatchNorm(use_running_average=True) for _ in self.convs]
        self.linear = nn.Dense(10)

    def features(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x)))
        return x

    def head(self, x):
        return self.linear(x.mean(axis=(-3, -2)))

    def __call__(self, x):
        return self.head(self.features(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classifier:
    """The module with its variables: what the attack takes."""

    variables: Any
    module: nn.Module = dataclasses.field(metadata={"static": True})

    def features(self, image, act=jax.nn.relu):
        return self.module.clone(act=act).apply(self.variables, image - 0.5, method="features")

    def head(self, features):
        return self.module.apply(self.variables, features, method="head")


def network(path=None):
    """Return the network with the weights of a file, or initialise it anew.

    The keys of the file are paths such as params/linear/kernel.
    """
    if path is None:
        return Classifier(Net().init(jax.random.key(0), jnp.zeros((32, 32, 3))), Net())
    return Classifier(unflatten_dict(load_file(path), sep="/"), Net())
