# %% [markdown]
# # Detectors, and an attack that knows them
#
# Where a map cannot be trusted, a detector may still tell that an image was changed. **Can a detector
# see an attack on classifier and map, and does it still see one that knows it?** Detectors are shown
# noise and two attacks. Then each is attacked itself, together with the classifier and the map.

# %%
import os
from functools import partial

import jax
import matplotlib.pyplot as plt
import numpy as np

import adv2_jax as adv2
from adv2_jax.attacks import noise
from adv2_jax.detectors import DETECTORS, Guarded
from adv2_jax.runs.detection import CLOSE, fit_detector
from adv2_jax.runs.schema import interval

SMOKE = "ADV2_SMOKE" in os.environ
N = 2 if SMOKE else 16
KINDS = ("squeezing",) if SMOKE else ("squeezing", "lid", "agreement")

model = adv2.models.embedded()
scenes = adv2.select(model, adv2.data.load("shapes:48" if SMOKE else "shapes:200")).images
images, labels, targets = scenes.images[:N], scenes.labels[:N], (scenes.labels[:N] + 3) % 10

# %% [markdown]
# ## Attacks that know of no detector
# On the classifier alone (PGD), and on the classifier and its CAM map (ADV²), at the same number of
# gradients. Noise of the same size is the control.

# %%
options = {"threat": adv2.threats.linf(16 / 255), "preset": "quick"}
_, benign_maps = adv2.explain(model, images, labels, interpreter="cam")
joint = adv2.attack(model, images, targets, benign_maps, interpreter="cam", **options)
work = round(joint.gradient_evaluations)
blind = {
    "noise": noise(model, images, targets, threat=options["threat"]),
    "PGD": adv2.attack(model, images, targets, interpreter=None, steps=work, **options),
    "ADV²": joint,
}
for name, result in blind.items():
    _, maps = adv2.explain(model, result.images, targets, interpreter="cam")
    blind[name] = result._replace(maps=maps)

# %% [markdown]
# ## Detectors
# `squeezing` is suspicious of a softmax that changes with fewer colours or a median filter (Xu et al.
# 2018), `lid` of activations whose neighbourhood has many dimensions (Ma et al. 2018), `agreement` of
# maps that disagree, here GRAD's and CAM's (a defence that the ADV² paper proposes). Each is fitted on
# other benign images: half are its reference, and of the other half at most 5 % score above the
# threshold.

# %%
others = scenes.take(np.arange(N, len(scenes.labels)))
fitted = {name: fit_detector(model, DETECTORS[name](), others)[0] for name in KINDS}


@jax.jit
def scores(detector, images):
    """Return scores minus the threshold, in standard deviations of benign scores."""
    of = jax.vmap(partial(detector.score, model))(images / np.float32(255))
    return (of - detector.threshold) / detector.spread


def measures(detector, result):
    benign, attacked = scores(detector, images), scores(detector, result.images)
    fooled = adv2.metrics.success(result.logits, targets)
    close = adv2.metrics.iou_quantile(result.maps, benign_maps) >= CLOSE
    return {
        "AUC": float(adv2.metrics.roc_auc(benign, attacked)),
        "detected": attacked > 0,
        "evades": fooled & close & (attacked <= 0),
    }


# %% [markdown]
# *AUC*: the area under the ROC curve against the benign images, 0.5 by chance. *detected*: the share
# above the threshold. *evades*: the share below it that has the target class, and a map close to the
# benign one (IoU of the largest quarters 0.5 or more).

# %%
table = {}
for name, detector in fitted.items():
    print(f"{name}, benign: detected {np.mean(scores(detector, images) > 0):.2f}")
    table[name] = {key: measures(detector, result) for key, result in blind.items()}
    for key, row in table[name].items():
        print(f"    {key:5}" + "".join(f"  {what} {np.mean(of):.2f}" for what, of in row.items()))

# %% [markdown]
# ## An attack that knows the detector
# `Guarded` is a classifier with its detector. An attack on it differentiates both, and prefers images
# below the threshold to all others. It takes as many steps, each of more gradients. Left of each arrow:
# the ADV² that knows of none. In a terminal: `adv2 attack --evade run/squeezing.npz …`, with a detector
# that `adv2 detect run …` has fitted.

# %%
adaptive = {}
print(f"{'':10}  {'AUC':^11}  {'detected':^11}  {'evades':^11}  {'map L1':^13}  gradients")
for name, detector in fitted.items():
    guarded = Guarded(model, detector)
    result = adv2.attack(guarded, images, targets, benign_maps, interpreter="cam", **options)
    adaptive[name], table[name]["adaptive"] = result, measures(detector, result)
    before, after = table[name]["ADV²"], table[name]["adaptive"]
    pairs = "".join(f"  {np.mean(before[of]):.2f} → {np.mean(after[of]):.2f}" for of in before)
    off = [adv2.metrics.map_l1(one.maps, benign_maps).mean() for one in (joint, result)]
    cost = f"{work:3} → {result.gradient_evaluations:.0f}"
    print(f"{name:10}{pairs}  {off[0]:.3f} → {off[1]:.3f}  {cost}")

# %%
look = {"titles": ["CAM"], "classes": scenes.classes, "limit": 1}
adv2.show(adaptive["squeezing"], images, targets, benign_maps, **look)

# %% [markdown]
# Where a curve crosses the threshold, it shows the share that is detected. The adaptive attack stops
# just below: its scores may still be larger than those of benign images, and the AUC large.

# %%
size = {"figsize": (6, 2 * len(fitted) + 1), "layout": "constrained"}
_, axes = plt.subplots(len(fitted), sharex=True, squeeze=False, **size)
names = ("benign", *blind, "ADV², adaptive")
colours = ("black", "0.6", "#D55E00", "#0072B2", "#009E73")
for axis, (name, detector) in zip(axes.flat, fitted.items(), strict=True):
    results = (*blind.values(), adaptive[name])
    shown = [scores(detector, some) for some in (images, *(result.images for result in results))]
    for values, label, colour in zip(shown, names, colours, strict=True):
        axis.ecdf(values, complementary=True, label=label, color=colour)
    axis.axvline(0, color="0.3", linestyle=":", label="threshold")
    axis.set(title=f"{name}: scores of {N} images", ylabel="share with more")
axes[-1, 0].set_xlabel("score minus threshold, in standard deviations of benign scores")
axes[-1, 0].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## The answer

# %%
best = max(table, key=lambda name: table[name]["ADV²"]["detected"].mean())
seen, evaded = table[best]["ADV²"]["detected"], table[best]["adaptive"]["evades"]
verdict = f"{'Yes' if seen.mean() > 0.5 else 'No'}, and {'no' if evaded.mean() > 0.5 else 'yes'}"
shares = [
    "{:.0%} [{:.0%}, {:.0%}]".format(values.mean(), *interval(values)) for values in (seen, evaded)
]
print(
    f"{verdict}, here: {best} sees ADV² best, on {shares[0]} of {N} images. The ADV² that\n"
    f"knows {best} evades it on {shares[1]}. In brackets: 95 % intervals."
)
