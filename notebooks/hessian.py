# %% [markdown]
# # The Hessian of a GRAD attack
#
# A gradient map is attacked through a second derivative that a ReLU network does not have: almost
# everywhere it is zero but for a small term of the softmax. **Which second derivative does an attack
# meet instead, and does it say which maps are easily fooled?**

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
N = 2 if SMOKE else 12

# %% [markdown]
# ## One image
# The exact Hessian of the log-odds of K classes has rank K - 2 = 8 and no positive eigenvalue. The
# curvature of a surrogate, a ReLU with a smooth second derivative, is larger and of both signs, and
# its top eigenvector is farther from the gradient.

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


print("exact eigenvalues    ", *(f"{value:.3g}" for value in exact.values))
print("surrogate eigenvalues", *(f"{value:.3g}" for value in top.values))
print("residuals            ", *(f"{value:.2g}" for value in top.residuals))
print(f"cosine with gradient  exact {cosine(exact.vectors[0], slope):.2f}")
print(f"                      surrogate {cosine(top.vectors[0], slope):.2f}")

# %% [markdown]
# ## An attack, and the curvature before and after
# `adv2 attack`, then `adv2 curvature` on its folder. Both can be interrupted and go on with `--resume`.

# %%
run = "hessian-run"
scenes = ["--images", "shapes:20", "--limit", str(N), "--epsilon", "16/255", "--preset", "quick"]
where = ["--out", run, "--overwrite", *(["--steps", "5"] if SMOKE else [])]
attacked = main(["attack", *scenes, "--interpreter", "grad", "--snapshots", "0", *where])

# %%
depth, probes, compare = (4, 2, 1) if SMOKE else (16, 32, 4)
effort = ["--depth", str(depth), "--probes", str(probes), "--compare", str(compare)]
measured = main(["curvature", run, "--overwrite", *effort])
laboratory = report.curvature.read(run)

# %% [markdown]
# ## Three pictures
# 1. **How true is the surrogate?** Products of surrogate Hessians with a step, against the change of
#    the true gradient over that step. The best width grows with the step; the path is that of the
#    default preset.
# 2. **Where is the curvature?** Spectra before and after the attack, at one image.
# 3. **Does curvature predict fragility?** One point an image: curvature at the benign image against
#    what the attack leaves of its map.

# %%
adv2.show_curvature(laboratory)

# %% [markdown]
# ## The answer

# %%
fidelity = laboratory.summary["fidelity"]
pixel = min(range(len(fidelity["steps"])), key=lambda j: abs(fidelity["steps"][j] - 1))
cosines = {
    name: values[pixel]
    for name, values in zip(fidelity["surrogates"], fidelity["cosine"], strict=True)
}
best = max(cosines, key=cosines.get)
print(
    f"Cosine with the change of the true gradient, at a step of one pixel value: exact Hessian "
    f"{cosines['exact']:.2f}, best surrogate ({best}) {cosines[best]:.2f}."
)
for row in laboratory.summary["correlation"]:
    if row["attack"] == "adv2" and row["ci"]:  # of two images there is none
        low, high = row["ci"]
        verdict = "predicts" if low > 0 else "does not predict"
        print(
            f"{report.curvature.PREDICTORS[row['measure']]} {verdict} what ADV² leaves: Spearman {row['spearman']:.2f} "
            f"[{low:.2f}, {high:.2f}], n = {row['n']}."
        )
