"""CAM and its kin: the map is a weighted sum of the last convolutional features (ADV² §3.3).

Notation: a the features [h, w, C], k a channel of them, z the logits, c the class, g = ∂z_c/∂a. All
but CAM take the tokens [1 + h w, C] of a transformer too: a and g are then those of the patches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax import maps
from adv2_jax.capabilities import (
    check_features,
    head_of,
    inspected,
    num_classes,
    static_leaves,
)
from adv2_jax.interpreters.base import Context, Explain, Interpreter, Seen, interpreter_factory
from adv2_jax.options import bind
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Features, HasFeatures, Image, Label, Map

Raw = Callable[[HasFeatures, Features, Label], Array]


def positions(features: Features) -> Array:
    """Return features by position, float32 or wider: [h, w, C] as they are.

    Of tokens [1 + h w, C] they are those of the patches.
    """
    # half precision ends here: means are of h w small numbers
    wide = at_least_float32(features)
    return wide if wide.ndim == 3 else maps.of_tokens(wide)


def head_slopes(model: HasFeatures, features: Features, label: Label) -> Array:
    """Return g, the gradient of z_c in the features: [h, w, C]."""
    # z_c, not log-odds: all papers differentiate the logit, and no float32 rounding is at stake
    # since z_c does not saturate
    return positions(jax.grad(lambda a: head_of(model, a)[label])(features))


def head_weights(model: HasFeatures, features: Features, label: Label) -> Array:
    """Return alpha_{k,c} of Grad-CAM, the gradient of z_c in the features averaged over h, w: [C].

    With global average pooling and a linear head it is w_{k,c} / (h w) for all features.
    """
    return head_slopes(model, features, label).mean(axis=(0, 1))


def raw_cam(model: HasFeatures, features: Features, label: Label) -> Array:
    """Return sum_k w_{k,c} a_k, before scaling: [h, w, C] -> [h, w]."""
    h, w, _ = features.shape
    # the weights are read off the gradient of the head: no model has to name its last layer
    return at_least_float32(features) @ (head_weights(model, features, label) * h * w)


def raw_grad_cam(model: HasFeatures, features: Features, label: Label) -> Array:
    """Return ReLU(sum_k alpha_{k,c} a_k), before scaling: [h, w, C] -> [h, w]."""
    # a true ReLU for the attack too: the map is differentiated once, so it needs no curvature
    return jnp.maximum(positions(features) @ head_weights(model, features, label), 0)


def raw_grad_cam_pp(model: HasFeatures, features: Features, label: Label) -> Array:
    """Return ReLU(sum_k w_k a_k) of Grad-CAM++, before scaling: [h, w, C] -> [h, w].

    The weights are w_k = sum_ij alpha_ij ReLU(g_ij) with alpha_ij = g_ij² / (2 g_ij² + s_k g_ij³)
    and s_k = sum_ab a_ab (Chattopadhay et al. 2018, eq. 7 and 19). The class score of the paper is
    exp(z_c): of its first derivative only the factor exp(z_c) is left out, which the min-max map
    does not see; eq. 19 holds it to be linear in the features, as ReLU networks are.
    """
    g, a = jnp.maximum(head_slopes(model, features, label), 0), positions(features)
    # alpha as 1 / (2 + s g), g² divided out: no 0/0 where g = 0, and no g³ that underflows. Where
    # g < 0 alpha does not matter. The denominator is 2 or more after a ReLU; features below 0 may
    # meet a pole, which is the formula's own.
    weights = (g / (2 + a.sum(axis=(0, 1), keepdims=True) * g)).sum(axis=(0, 1))
    return jnp.maximum(a @ weights, 0)


def raw_layer_cam(model: HasFeatures, features: Features, label: Label) -> Array:
    """Return ReLU(sum_k ReLU(g_k) a_k) of LayerCAM, before scaling: [h, w, C] -> [h, w].

    Each position has weights of its own, where Grad-CAM averages them (Jiang et al. 2021).
    """
    g = jnp.maximum(head_slopes(model, features, label), 0)
    return jnp.maximum((g * positions(features)).sum(axis=-1), 0)


def cam(model: HasFeatures, image: Image, label: Label) -> Map:
    """Return the CAM, min-max of sum_k w_{k,c} a_k (Zhou et al. 2016; ADV² §3.3).

    Args:
        model: a classifier whose head is global average pooling and a linear layer.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return _weighted_features(model, image, label, raw=raw_cam).map


def grad_cam(model: HasFeatures, image: Image, label: Label) -> Map:
    """Return the Grad-CAM, min-max of ReLU(sum_k alpha_{k,c} a_k) (Selvaraju et al. 2017).

    Args:
        model: any classifier; the head need not be linear.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return _weighted_features(model, image, label, raw=raw_grad_cam).map


def grad_cam_pp(model: HasFeatures, image: Image, label: Label) -> Map:
    """Return the Grad-CAM++, min-max of `raw_grad_cam_pp` (Chattopadhay et al. 2018).

    Args:
        model: any classifier; its last features should not be negative, as after a ReLU.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return _weighted_features(model, image, label, raw=raw_grad_cam_pp).map


def layer_cam(model: HasFeatures, image: Image, label: Label) -> Map:
    """Return the LayerCAM of the last features, min-max of `raw_layer_cam` (Jiang et al. 2021).

    Args:
        model: any classifier; the head need not be linear.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return _weighted_features(model, image, label, raw=raw_layer_cam).map


def _weighted_features(
    model: HasFeatures,
    image: Image,
    label: Label,
    context: Context | None = None,
    *,
    raw: Raw,
) -> Seen:
    # one set of features for both: the head is a small part of the work, so a step costs one PGD
    # gradient
    features = model.features(image)
    return Seen(head_of(model, features), maps.min_max(raw(model, features, label)))


def check_pooling(model: HasFeatures, shape: tuple[int, ...]) -> None:
    """Refuse heads without a CAM: all but global average pooling followed by a linear layer.

    The gradient of such a head is the same for all features and all positions; it is compared for
    three random features.

    Args:
        model: a classifier.
        shape: of the images, [H, W, 3].

    Raises:
        ValueError: if it differs; the message recommends Grad-CAM.
    """
    features = check_features(model, shape)
    sizes = (num_classes(model, shape), features.shape, features.shape)
    # by NumPy: to compile JAX's generator takes longer than all the rest
    normal = np.random.default_rng(0).standard_normal
    weights, *samples = jax.device_put([normal(size, np.float32) for size in sizes])
    # a head that is to be refused, not debugged, may have no finite gradient at random features
    with jax.debug_nans(False):
        departure = jax.device_get(
            _departure(static_leaves(model), weights, samples, features.dtype)
        )
    # A linear head departs by rounding errors only, others by about 1. √ε lies between with room on
    # both sides: 3e-4 in float32, .09 in bfloat16.
    if departure > float(jnp.finfo(features.dtype).eps) ** 0.5:
        raise ValueError(
            "cam needs a head of global average pooling and a linear layer: "
            f"the gradient of {type(model).__name__}.head depends on the position "
            "or on the features; grad_cam takes any head"
        )


def check_positions(model: HasFeatures, shape: tuple[int, ...]) -> None:
    """Refuse features that are neither [h, w, C] nor a class token and a square of patches.

    Raises:
        ValueError: says what they are.
    """
    tokens = inspected(model, shape).features
    if not isinstance(tokens, jax.ShapeDtypeStruct) or tokens.ndim != 2:
        check_features(model, shape)
    elif not maps.are_tokens(len(tokens)):
        raise ValueError(
            f"{type(model).__name__}.features are {len(tokens)} tokens, not a class token and a "
            "square of patches"
        )


@partial(jax.jit, static_argnums=3)
def _departure(
    model: HasFeatures, weights: Array, samples: list[Features], dtype: jnp.dtype
) -> Array:
    """Return the largest change of the head's gradient between features and positions, relative.

    The gradient is that of a random mixture of the logits, so that one pass tests all classes; the
    change is divided by its largest entry.
    """

    def gradient(a: Features) -> Array:
        mixture, slope = jax.value_and_grad(lambda a: weights @ head_of(model, a))(a.astype(dtype))
        # where the head has no value its gradient means nothing; NaN is left out below
        return jnp.where(jnp.isfinite(mixture), at_least_float32(slope), jnp.nan)

    # the first features are not negative, so that heads with roots or logarithms have some value
    gradients = jnp.stack([gradient(a) for a in (jnp.abs(samples[0]), *samples)])
    # `tiny` for a head that ignores its features: 0 / tiny is 0, which passes
    return jnp.nanmax(jnp.abs(gradients - gradients[:1, :1, :1])) / jnp.maximum(
        jnp.nanmax(jnp.abs(gradients)), jnp.finfo(gradients.dtype).tiny
    )


def _interpreter(
    name: str,
    explain: Explain,
    raw: Raw,
    check: Callable[[Any, tuple[int, ...]], object] = check_positions,
) -> Interpreter:
    surrogate = bind(_weighted_features, raw=raw)
    return Interpreter(name, explain, surrogate, check=check, needs=("features", "head"))


@interpreter_factory
def cam_interpreter() -> Interpreter:
    """CAM; analyst and adversary use the same function, since the map has a gradient as it is."""
    return _interpreter("cam", cam, raw_cam, check_pooling)


@interpreter_factory
def grad_cam_interpreter() -> Interpreter:
    """Grad-CAM; analyst and adversary use the same function, as for CAM."""
    return _interpreter("grad_cam", grad_cam, raw_grad_cam)


@interpreter_factory
def grad_cam_pp_interpreter() -> Interpreter:
    """Grad-CAM++; one function for both. Through a head that is not linear g varies with a too."""
    return _interpreter("grad_cam_pp", grad_cam_pp, raw_grad_cam_pp)


@interpreter_factory
def layer_cam_interpreter() -> Interpreter:
    """LayerCAM; one function for both, as for Grad-CAM++."""
    return _interpreter("layer_cam", layer_cam, raw_layer_cam)
