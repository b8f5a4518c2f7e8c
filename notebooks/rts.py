# %% [markdown]
# # Train and attack RTS
#
# The map of real-time saliency (RTS, Dabkowski & Gal 2017) is drawn by a second network, the masker,
# which is trained to explain the first. **Is a map that a network has learnt to draw harder to fool?**
# Here a masker is trained, its maps are measured, and both networks are attacked at once.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import adv2_jax as adv2
from adv2_jax.runs.faithfulness import quality
from adv2_jax.training.masker import train_masker

SMOKE = "ADV2_SMOKE" in os.environ
N = 2 if SMOKE else 8
SCENES, BATCH = (4, 2) if SMOKE else (2000, 16)

classifier = adv2.models.embedded()
scenes = adv2.select(classifier, adv2.data.load("shapes:4" if SMOKE else "shapes:100")).images

# %% [markdown]
# ## Train
# The encoder is the classifier itself, whose weights stay as they are. A map should mark a small and
# smooth region that is enough for the class, and without which the class is gone.

# %%
training = adv2.data.shapes.generate(SCENES, seed=1)
masker, losses = train_masker(
    adv2.models.Masker(classifier, rngs=nnx.Rngs(0)),
    classifier,
    training.images,
    training.labels,
    epochs=1,
    batch_size=BATCH,
)
model = adv2.models.ClassifierWithMasker(classifier, masker)

window = min(20, len(losses))
means = np.convolve(losses, np.ones(window) / window, mode="valid")
_, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.plot(losses, color="#0072B2", alpha=0.3, label="each step")
axis.plot(np.arange(window - 1, len(losses)), means, color="#0072B2", label=f"mean of {window}")
axis.set(
    title="Training the masker", xlabel=f"step ({BATCH} images)", ylabel="loss, eq. 8 of the paper"
)
axis.legend()
plt.show()

# %% [markdown]
# ## Does the map explain?
# *kept*: the share of the confidence that is left where only the marked region is shown. *removed*:
# the confidence where it is hidden. *pointing*: how often the largest value lies on the object.

# %%
print(f"{'':4}  kept  removed  pointing")
for name in ("rts", "cam"):
    _, maps = adv2.explain(model, scenes.images, scenes.labels, interpreter=name)
    of = quality(classifier, scenes.images, scenes.labels, maps, scenes.objects)
    print(
        f"{name:4}  {of.confidence_kept:.2f}  {of.confidence_removed:7.2f}  {of.pointing_game:8.0%}"
    )

# %% [markdown]
# ## Attack
# The attack differentiates through the masker. CAM, whose map is made of the same features without
# any training, is attacked beside it; plain PGD gets the work of each.

# %%
images, labels, targets = scenes.images[:N], scenes.labels[:N], (scenes.labels[:N] + 3) % 10
options = {"threat": adv2.threats.linf(16 / 255), "preset": "quick"}
benign, joint, success, share = {}, {}, {}, {}
for name in ("rts", "cam"):
    _, benign[name] = adv2.explain(model, images, labels, interpreter=name)
    joint[name] = adv2.attack(model, images, targets, benign[name], interpreter=name, **options)
    work = round(joint[name].gradient_evaluations)
    plain = adv2.attack(model, images, targets, interpreter=None, steps=work, **options)
    _, plain_maps = adv2.explain(model, plain.images, targets, interpreter=name)
    before, after = (
        adv2.metrics.map_l1(maps, benign[name]).mean() for maps in (plain_maps, joint[name].maps)
    )
    success[name] = adv2.metrics.success(joint[name].logits, targets).mean()
    share[name] = after / before
    print(f"{name:4} fooled {success[name]:4.0%}  map L1 of PGD {before:.3f}, of ADV² {after:.3f}")

# %%
adv2.show(
    joint["rts"], images, targets, benign["rts"], titles=["RTS"], classes=scenes.classes, limit=2
)

# %% [markdown]
# ## The answer

# %%
verdict = "Harder than CAM's" if share["rts"] > 1.5 * share["cam"] else "No harder than CAM's"
print(
    f"{verdict}, here: ADV² fools the classifier on {success['rts']:.0%} of {N} images, and leaves "
    f"{share['rts']:.0%} of the distance at which PGD leaves the maps of RTS. Of CAM's it leaves "
    f"{share['cam']:.0%}."
)
