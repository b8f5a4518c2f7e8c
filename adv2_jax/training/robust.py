"""Robust training: attacks on what a network is trained on, and penalties on its loss in the image.

    pgd, adv2    adversarial images in place of benign ones: of plain PGD (Madry et al. 2018), of ADV²
    gradient     w ‖∇ℓ‖² (Ross & Doshi-Velez 2018)
    curvature    w ‖∇ℓ(x + ε sign ∇ℓ) - ∇ℓ(x)‖² (CURE, Moosavi-Dezfooli et al. 2019)
    ssr          w λ_max, the largest eigenvalue of ∇²ℓ = Jᵀ A J (smooth surface, Wang et al. 2020)

ℓ(x) is the cross-entropy of the true class. The attacks are `crafting.craft`, on the network in
inference mode and under L∞.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from adv2_jax import losses, threats
from adv2_jax.attacks import attack
from adv2_jax.crafting import craft, images_of, look
from adv2_jax.curvature import softmax_spectrum
from adv2_jax.descent import Problem
from adv2_jax.presets import Preset, constant, resolve
from adv2_jax.training.loop import Images, Labels, Range, Recipe
from adv2_jax.types import Classifier

# batch of images [B, H, W, 3] -> logits [B, K], of the network in training
Network = Callable[[Array], Array]
# (logits, network in inference mode, images, labels [B], ε) -> [B] >= 0
Penalty = Callable[[Network, Any, Array, Array, float], Array]

EVALUATED, EVALUATION_STEPS = 200, 20  # images and steps by which robust accuracy is measured


def gradient_penalty(
    logits: Network, model: Any, images: Array, labels: Array, epsilon: float
) -> Array:
    """Return ‖∇ℓ(x)‖² of each image, [B] >= 0. Costs a second derivative."""
    return _squares(_slopes(logits, images, labels))


def curvature_penalty(
    logits: Network, model: Any, images: Array, labels: Array, epsilon: float
) -> Array:
    """Return ‖∇ℓ(x + ε s) - ∇ℓ(x)‖² of each image, s = sign ∇ℓ(x), [B] >= 0.

    The paper's step is 1.5 along s / ‖s‖; ε s is as long at ε = 7/255 on CIFAR. Costs two second
    derivatives.
    """
    here = _slopes(logits, images, labels)
    away = images + epsilon * jnp.sign(jax.lax.stop_gradient(here))
    return _squares(_slopes(logits, away, labels) - here)


def ssr_penalty(logits: Network, model: Any, images: Array, labels: Array, epsilon: float) -> Array:
    """Return the largest eigenvalue of Jᵀ A J of each image, [B] >= 0.

    With its eigenvector v, found in inference mode, it is the variance of J v under the softmax.
    The derivative in the weights needs none of v (envelope theorem). Costs K gradients and a
    forward-mode pass.
    """
    spectrum = partial(softmax_spectrum, score=losses.cross_entropy, k=1)
    v = jax.vmap(spectrum, (None, 0, 0))(model, images, labels).vectors[:, 0]
    z, pushed = jax.jvp(logits, (images,), (jax.lax.stop_gradient(v),))
    f = jax.nn.softmax(z)
    return (f * (pushed - (f * pushed).sum(-1, keepdims=True)) ** 2).sum(-1)


# name -> the penalty, and its weight unless another one is given
PENALTIES: dict[str, tuple[Penalty, float]] = {
    "gradient": (gradient_penalty, 0.1),
    "curvature": (curvature_penalty, 0.01),
    "ssr": (ssr_penalty, 0.01),
}
ATTACKS = "pgd", "adv2"
RANGES: dict[str, Range] = {
    "epsilon": ("lie in [1/255, 1]", lambda value: 1 / 255 <= value <= 1),
    "attack_steps": Recipe.RANGES["epochs"],
}
ROBUST = *ATTACKS, *PENALTIES


def _slopes(logits: Network, images: Array, labels: Array) -> Array:
    """Return ∇ℓ of each image, [B, H, W, 3]."""
    # of the sum: under BatchNorm of the batch, an image moves the losses of others a little too
    total = lambda x: jax.vmap(losses.cross_entropy)(logits(x), labels).sum()  # noqa: E731
    return jax.grad(total)(images)


def _squares(values: Array) -> Array:
    return (values**2).sum(axis=(1, 2, 3))


def at_inference(model: nnx.Module) -> Any:
    """Return a copy of a network with running statistics, and no derivative in its weights."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.lax.stop_gradient(state))
    copy.eval()
    return copy


def inner_attack(interpreter: str | None, steps: int, epsilon: float) -> Preset:
    """Return the preset of an attack inside a training, which leaves the true class.

    Args:
        interpreter: the one under attack; None is plain PGD. Half of the steps on it are a warm
            start by plain PGD.
        steps: 1 or more; gradients of plain PGD, each of the joint steps costs more.
        epsilon: together the steps are 2.5 ε long, those of Madry et al. (2018).

    Raises:
        ValueError: for an interpreter that is unknown, or that has a solver: its map takes too
            many gradients.
    """
    warm = math.ceil(steps / 2) if interpreter else 0
    preset = resolve("quick", interpreter, warm_steps=warm, steps=steps - warm, goal="untargeted")
    if any(one.solver for one in preset.interpreters):
        raise ValueError(
            f"a training cannot attack {interpreter}: each map is a descent of its own"
        )
    size = 2.5 * epsilon / steps
    return replace(preset, warm_step_size=size, step_size=constant(size), score_every=0)


def adversarial(
    model: Classifier,
    key: Array,
    images: Array,
    labels: Array,
    preset: Preset,
    epsilon: float,
    move: Callable[[Array], Array] = lambda maps: maps,
) -> Array:
    """Return adversarial images of a batch, from a random start in the ball.

    Args:
        model: in inference mode.
        key: of the start.
        images: [B, H, W, 3] in [0, 1].
        labels: [B], the classes to be left.
        preset: of `inner_attack`.
        epsilon: radius of the L∞ ball, in pixel values.
        move: from the benign maps [B, h, w] to those that the attack aims at.

    Returns:
        [B, H, W, 3] in [0, 1].
    """
    threat, n = threats.linf(epsilon), len(labels)
    first, second = jax.random.split(key)
    maps: Any = np.zeros((n, 1, 1), np.float32)
    if preset.interpreter is not None:
        explain = preset.interpreter.explain
        maps = move(look(model, images, labels, explain, None, "auto")[1])
    keys = jax.random.key_data(jax.random.split(second, n))
    start = _scattered(first, images, epsilon, threat)
    crafted = craft(model, Problem(images, labels, maps, keys), preset, threat, start=start)
    return images_of(images, crafted.params, threat)


@partial(jax.jit, static_argnames="threat")
def _scattered(key: Array, images: Array, epsilon: float, threat: threats.Threat) -> Any:
    drawn = epsilon * jax.random.uniform(key, images.shape, images.dtype, -1, 1)
    return jax.vmap(threat.project)(drawn, images)


def robust_accuracy(model: Classifier, images: Images, labels: Labels, epsilon: float) -> float:
    """Return the share of images that plain PGD within ε leaves right, in [0, 1].

    Twenty untargeted steps on the first 200 images.
    """
    some, classes = images[:EVALUATED], labels[:EVALUATED]
    result = attack(
        model,
        some,
        classes,
        interpreter=None,
        threat=threats.linf(epsilon),
        preset=inner_attack(None, EVALUATION_STEPS, epsilon),
        all_may_fail=True,
    )
    return float((result.logits.argmax(-1) == classes).mean())
