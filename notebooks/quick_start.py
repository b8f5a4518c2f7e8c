# %% [markdown]
# # Fool a classifier and its explanation
#
# An attribution map beside a prediction is meant to let a person check it. **Can a small change of an
# image give it another class, and leave its map as it was?** That is the attack of Zhang et al.,
# *Interpretable Deep Learning under Fire* (ADV²). Network and images are embedded in the package.

# %%
import os

import numpy as np

import adv2_jax as adv2

SMOKE = "ADV2_SMOKE" in os.environ
N = 2 if SMOKE else 8

# %%
# @title Settings: change them, then run the cells below again
EPSILON = 16  # @param {type: "slider", min: 1, max: 32, step: 1}
INTERPRETER = "cam"  # @param ["grad", "cam", "grad_cam", "lrp", "smooth_grad", "integrated_gradients", "occlusion", "mask"]
TARGET_MAP = "benign"  # @param ["benign", "image", "patch"]
PRESET = "quick"  # @param ["quick", "auto", "default", "paper"]

# %% [markdown]
# `EPSILON`: no pixel value, 0 to 255, changes by more. `INTERPRETER`: who draws the map. `TARGET_MAP`:
# what the map is to show afterwards, the map of the unchanged image, that of another image of the
# target class, or a random figure. `PRESET`: `quick` takes as few steps as will do, `default` more.
#
# ## Images, target classes, target maps

# %%
model = adv2.models.embedded()
scenes = adv2.select(model, adv2.data.load("shapes:40")).images  # those that the network gets right
images, labels = scenes.images[:N], scenes.labels[:N]
targets = adv2.data.targets.random_targets(labels, num_classes=10)
_, target_maps = adv2.explain(model, images, labels, interpreter=INTERPRETER)
if TARGET_MAP == "image":
    others = adv2.data.targets.donors(scenes.labels, targets, np.arange(N))
    _, target_maps = adv2.explain(model, scenes.images[others], targets, interpreter=INTERPRETER)
elif TARGET_MAP == "patch":
    size = target_maps.shape[1:]
    figures = [adv2.data.targets.patch(size, seed=0, index=i) for i in range(N)]
    target_maps = np.stack(figures)

# %% [markdown]
# ## Two attacks of equal cost
# Plain PGD knows nothing of the map. ADV² minimises the loss of the class and the distance of the map.

# %%
options = {"threat": adv2.threats.linf(EPSILON / 255), "preset": PRESET}
joint = adv2.attack(model, images, targets, target_maps, interpreter=INTERPRETER, **options)
work = round(joint.gradient_evaluations)
plain = adv2.attack(model, images, targets, interpreter=None, steps=work, **options)
_, plain_maps = adv2.explain(model, plain.images, targets, interpreter=INTERPRETER)

# %% [markdown]
# Plain PGD: the network is fooled, and the map is another.

# %%
look = {"titles": [INTERPRETER], "classes": scenes.classes, "limit": 2}
adv2.show(plain._replace(maps=plain_maps), images, targets, target_maps, **look)

# %% [markdown]
# ADV²: the network is fooled, and the map is what was wanted.

# %%
adv2.show(joint, images, targets, target_maps, **look)

# %% [markdown]
# ## The answer

# %%
success, distance = {}, {}
for name, result, maps in (("PGD", plain, plain_maps), ("ADV²", joint, joint.maps)):
    success[name] = adv2.metrics.success(result.logits, targets).mean()
    distance[name] = adv2.metrics.map_l1(maps, target_maps).mean()
    print(f"{name:4}  fooled {success[name]:4.0%}  map L1 {distance[name]:.3f}")
share = distance["ADV²"] / distance["PGD"]
fooled = success["ADV²"] > 0.5 and share < 0.5
print(
    f"\n{'Yes' if fooled else 'No'}, at {EPSILON}/255 with {INTERPRETER}: {success['ADV²']:.0%} of {N} "
    f"images get the target class, and their maps are {share:.0%} as far from the target map as PGD's."
)
