# %% [markdown]
# # Your own network in ten lines
#
# **What does a network need to be attacked together with its map?** Two pure methods on one image:
# `features(image, act)` gives the last convolutional features, `head(features)` the logits. Here they
# are written by hand, around plain functions and a dict of weights.

# %%
import dataclasses
import os
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np

import adv2_jax as adv2

SMOKE = "ADV2_SMOKE" in os.environ
N = 2 if SMOKE else 8

# %% [markdown]
# ## What you have
# A function, and weights by name: a ResNet-20, with PyTorch's names and layout. Only one thing
# matters: every ReLU is the argument `act`.


# %%
def conv(x, kernel, stride=1):
    layout = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(
        x[None], kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layout
    )[0]


def norm(x, weights, name):  # BatchNorm with its running statistics
    mean, var, scale, bias = (
        weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def resnet20(weights, image, act):
    # the image comes in [0, 1], and is scaled here
    x = (image - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
    x = act(norm(conv(x, weights["conv1.weight"]), weights, "bn1"))
    for name in (f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)):
        stride = 2 if name in ("layer2.0", "layer3.0") else 1
        y = act(norm(conv(x, weights[f"{name}.conv1.weight"], stride), weights, f"{name}.bn1"))
        y = norm(conv(y, weights[f"{name}.conv2.weight"]), weights, f"{name}.bn2")
        widening = (y.shape[-1] - x.shape[-1]) // 2
        x = act(y + jnp.pad(x[::stride, ::stride], ((0, 0), (0, 0), (widening, widening))))
    return x


with (
    resources.as_file(resources.files("adv2_jax") / "weights" / "shapes_resnet20.npz") as path,
    np.load(path) as arrays,
):
    weights = {name: jnp.asarray(arrays[name]) for name in arrays.files}

# %% [markdown]
# ## The ten lines
# Weights are leaves of the pytree, so they enter `jit` as arguments.


# %%
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mine:
    weights: dict

    def features(self, image, act=jax.nn.relu):
        return resnet20(self.weights, image, act)

    def head(self, features):
        return features.mean((0, 1)) @ self.weights["linear.weight"].T + self.weights["linear.bias"]


model = Mine(weights)

# %% [markdown]
# ## Explain and attack
# `select` leaves out the images that the network gets wrong, and refuses a network that is given
# images of another range than [0, 1]. Plain PGD gets as many gradients as ADV².

# %%
scenes = adv2.select(model, adv2.data.load("shapes:40"), limit=N).images
images, labels, targets = scenes.images, scenes.labels, (scenes.labels + 3) % 10
_, benign_maps = adv2.explain(model, images, labels, interpreter="cam")

options = {"threat": adv2.threats.linf(16 / 255), "preset": "quick"}
joint = adv2.attack(model, images, targets, benign_maps, interpreter="cam", **options)
work = round(joint.gradient_evaluations)
plain = adv2.attack(model, images, targets, interpreter=None, steps=work, **options)
_, plain_maps = adv2.explain(model, plain.images, targets, interpreter="cam")
adv2.show(joint, images, targets, benign_maps, titles=["CAM"], classes=scenes.classes, limit=2)

# %% [markdown]
# ## The answer

# %%
for name, result, maps in (("PGD", plain, plain_maps), ("ADV²", joint, joint.maps)):
    success = adv2.metrics.success(result.logits, targets).mean()
    distance = adv2.metrics.map_l1(maps, benign_maps).mean()
    print(f"{name:4}  fooled {success:4.0%}  map L1 {distance:.3f}")
print(
    f"\nTwo methods, features and head, and act in place of every ReLU. With them this network was "
    f"fooled on {success:.0%} of {N} images, with maps {distance:.3f} away from the benign ones."
)

# %% [markdown]
# ## The same from the command line
# Put the class and a function that makes it into a file, and give it your pictures: a folder with a
# sub-folder for each class, an `.npz`, or a set of TensorFlow Datasets.
#
#     adv2 attack --model my_network.py:network --weights weights.npz --images photos/ --size 64 --out run
#
# `mobilenet.py`, `linen.py` and `equinox_module.py` beside this notebook are complete files of that kind.
