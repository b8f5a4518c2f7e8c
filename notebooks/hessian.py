# %% [markdown]
# # The Hessian of a GRAD attack
#
# A gradient map is attacked through a second derivative that a ReLU network does not have: almost
# everywhere it is zero but for a small term of the softmax. What does an attack meet instead, which
# surrogate knows it best, and does curvature say which maps are easily fooled? Three pictures, on
# the embedded network. On a 2-core CPU it takes ten minutes; `ADV2_SMOKE=1` makes it two.

# %%
import os

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

import adv2_jax as adv2
from adv2_jax import curvature, report
from adv2_jax.activations import relu_curved
from adv2_jax.cli.entry import main

SMOKE = "ADV2_SMOKE" in os.environ
N = 2 if SMOKE else 16
print(jax.devices(), jax.__version__)

# %% [markdown]
# ## One image
# The exact Hessian of the log-odds has rank K - 2 = 8 and no positive eigenvalue. The surrogate's
# curvature is larger and of both signs, and its top eigenvector is farther from the gradient.

# %%
model = adv2.models.embedded()
scene = adv2.data.load("shapes:1")
image, label = jnp.float32(scene.images[0] / 255), jnp.int32(scene.labels[0])
key = jax.random.key(0)

exact = curvature.softmax_spectrum(model, image, label)
surrogate = curvature.hessian(model, image, label, act=Partial(relu_curved, tau=0.01))
top = curvature.eigenpairs(surrogate, image, 3, depth=10 if SMOKE else 30, key=key)
slope = curvature.gradient(model, image, label)


def cosine(a: jax.Array, b: jax.Array) -> float:
    """Return the absolute cosine of two images."""
    return float(jnp.abs(jnp.vdot(a, b)) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


print("exact eigenvalues    ", exact.values)
print("surrogate eigenvalues", top.values, "residuals", top.residuals)
print("cosine with gradient ", cosine(exact.vectors[0], slope), cosine(top.vectors[0], slope))

# %% [markdown]
# ## An attack, and the curvature before and after
# `adv2 attack`, then `adv2 curvature` on its folder; both resume with `--resume`.

# %%
run = "hessian-run"
where = ["--out", run, "--overwrite", *(["--steps", "5"] if SMOKE else [])]
scenes = ["--images", "shapes:20", "--limit", str(N), "--epsilon", "16/255"]
main(["attack", *scenes, "--interpreter", "grad", "--snapshots", "0", *where])
effort = ["--depth", "4", "--probes", "2", "--compare", "1"] if SMOKE else []
main(["curvature", run, "--overwrite", *effort])
laboratory = report.curvature.read(run)

# %% [markdown]
# ## How true is the surrogate?
# Products of surrogate Hessians with a step, against the change of the true gradient over that step.
# The best width grows with the step; the path is that of the default preset.

# %%
report.curvature.agreement(laboratory.summary["fidelity"])

# %% [markdown]
# ## Where is the curvature?
# Before and after the attack, at one image.

# %%
report.curvature.spectra(laboratory)

# %% [markdown]
# ## Does curvature predict fragility?
# One point an image: curvature at the benign image against what the attack leaves of its map.

# %%
report.curvature.fragility({"embedded": laboratory})
