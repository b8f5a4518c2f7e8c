# %% [markdown]
# # Interpreters, threats and one image for all
#
# **Is there an interpreter, or a limit on what may be changed, under which the map can be trusted?**
# And if an analyst draws several maps of an image, is one of them left to give the attack away? The
# same images are attacked under several interpreters, under four threat models, and under several
# interpreters at once.

# %%
import os

import matplotlib.pyplot as plt

import adv2_jax as adv2
from adv2_jax import threats

SMOKE = "ADV2_SMOKE" in os.environ
N = 2 if SMOKE else 8
INTERPRETERS = ("grad", "cam") if SMOKE else ("grad", "guided_backprop", "lrp", "cam", "layer_cam")
LINF = threats.linf(16 / 255)
THREATS = {"linf, ε = 16/255": LINF, "flow": threats.flow()}
if not SMOKE:
    THREATS |= {"l2, ε = 2": threats.l2(2.0), "linf+flow, ε = 8/255": threats.linf_flow(8 / 255)}
TOGETHER = ("grad", "cam") if SMOKE else ("grad", "cam", "lrp")

model = adv2.models.embedded()
scenes = adv2.select(model, adv2.data.load("shapes:40"), limit=N).images
images, labels, targets = scenes.images, scenes.labels, (scenes.labels + 3) % 10


def explain(images, classes, interpreter):
    return adv2.explain(model, images, classes, interpreter=interpreter)[1]


def attack(interpreter, threat, maps=None, **options):
    return adv2.attack(
        model,
        images,
        targets,
        maps,
        interpreter=interpreter,
        threat=threat,
        preset="quick",
        **options,
    )


def distance(result, interpreter):
    """Map L1 from the benign maps, mean over the images."""
    return adv2.metrics.map_l1(
        explain(result.images, targets, interpreter), benign[interpreter]
    ).mean()


benign = {name: explain(images, labels, name) for name in INTERPRETERS}

# %% [markdown]
# ## Interpreters
# Each has its own attack. Plain PGD, which knows nothing of maps, gets the work of the costliest. The
# preset `quick` takes few steps; others, such as SmoothGrad and occlusion, need those of `default`.

# %%
own = {name: attack(name, LINF, benign[name]) for name in INTERPRETERS}
work = round(max(result.gradient_evaluations for result in own.values()))
plain = attack(None, LINF, steps=work)
table = {name: (distance(plain, name), distance(own[name], name)) for name in INTERPRETERS}
success = {}
print(f"{'':18} gradients  fooled  map L1 of PGD  of ADV²")
for name, (of_plain, of_own) in table.items():
    cost = own[name].gradient_evaluations
    success[name] = adv2.metrics.success(own[name].logits, targets).mean()
    print(f"{name:18} {cost:9.0f}  {success[name]:6.0%}  {of_plain:13.3f}  {of_own:7.3f}")


# %%
def bars(table, title):
    _, axis = plt.subplots(figsize=(5, 0.5 * len(table) + 1.4), layout="constrained")
    for k, (name, colour) in enumerate((("PGD", "#D55E00"), ("ADV²", "#0072B2"))):
        places = [place + 0.4 * k for place in range(len(table))]
        axis.barh(places, [pair[k] for pair in table.values()], 0.4, color=colour, label=name)
    axis.set_yticks([place + 0.2 for place in range(len(table))], table)
    axis.invert_yaxis()
    axis.set_xlabel("map L1: mean distance from the benign map, in [0, 1]")
    axis.set_title(title)
    axis.legend()
    plt.show()


bars(table, f"By interpreter, linf, ε = 16/255, {N} images")

# %% [markdown]
# ## Threat models
# A bound on each pixel value, on the Euclidean norm, pixels that move, and both. The map is CAM's.

# %%
by_threat = {}
for name, threat in THREATS.items():
    pair = attack(None, threat), attack("cam", threat, benign["cam"])
    by_threat[name] = tuple(distance(result, "cam") for result in pair)
    rates = [adv2.metrics.success(result.logits, targets).mean() for result in pair]
    print(f"{name:21} fooled by PGD {rates[0]:4.0%}, by ADV² {rates[1]:4.0%}")
bars(by_threat, f"By threat model, CAM, {N} images")

# %% [markdown]
# ## One image for all
# `joint` asks one image for several maps at once.

# %%
both = attack(adv2.interpreters.joint(*TOGETHER), LINF, [benign[name] for name in TOGETHER])
wanted = [benign[name] for name in TOGETHER]
adv2.show(both, images, targets, wanted, titles=TOGETHER, classes=scenes.classes, limit=2)

# %% [markdown]
# ## Does an attack on one interpreter fool another?
# Rows: the attack. Columns: the map, its L1 distance from the benign one.

# %%
print(f"{'':12}" + "".join(f"{name:>12}" for name in TOGETHER))
attacks = {"PGD": plain, **{name: own[name] for name in TOGETHER}, "joint": both}
transfer = {key: [distance(result, name) for name in TOGETHER] for key, result in attacks.items()}
for key, values in transfer.items():
    print(f"{key:12}" + "".join(f"{value:12.3f}" for value in values))

# %% [markdown]
# ## The answer

# %%
shares = {name: after / before for name, (before, after) in table.items()}
fooled = [name for name, share in shares.items() if share < 0.5 and success[name] > 0.5]
hardest = max(shares, key=shares.get)
worst = max(
    after / before for after, before in zip(transfer["joint"], transfer["PGD"], strict=True)
)
print(
    f"{len(fooled)} of {len(shares)} interpreters are fooled: ADV² leaves less than half of PGD's "
    f"distance. The hardest is {hardest}, with {shares[hardest]:.0%}.\n"
    f"One image for {', '.join(TOGETHER)} leaves at most {worst:.0%} on each of its maps."
)
