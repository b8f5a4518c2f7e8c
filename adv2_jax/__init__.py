"""ADV²: adversarial inputs that fool a classifier and its interpreter at once, in JAX.

    import adv2_jax as adv2

    model = adv2.models.load("cifar_resnet20", "weights.npz")
    m = adv2.interpreters.cam(model, image, label)
    result = adv2.attack(model, images, targets, target_maps, interpreter="cam")

The method is that of Zhang, Wang, Shen, Ji, Luo and Wang, "Interpretable Deep Learning under Fire",
USENIX Security 2020.
"""

from typing import Any

from adv2_jax import (
    activations,
    curvature,
    data,
    detectors,
    interpreters,
    losses,
    maps,
    metrics,
    models,
    presets,
    threats,
)
from adv2_jax.attacks import Result, attack, explain
from adv2_jax.crafting import Crafted, craft
from adv2_jax.runs.select import select
from adv2_jax.types import Classifier

__all__ = [
    "Classifier",
    "Crafted",
    "Result",
    "activations",
    "attack",
    "craft",
    "curvature",
    "data",
    "detectors",
    "explain",
    "interpreters",
    "losses",
    "maps",
    "metrics",
    "models",
    "presets",
    "select",
    "show",
    "show_curvature",
    "threats",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # pages and figures are drawn at the end, if at all
    if name in ("show", "show_curvature"):
        from adv2_jax.report import figures

        return getattr(figures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
