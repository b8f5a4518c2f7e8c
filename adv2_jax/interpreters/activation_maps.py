"""CAM and Grad-CAM: the map weights the last convolutional features by what the head makes of them (ADV² §3.3)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax import maps
from adv2_jax.capabilities import check_features, head_of, num_classes, static_leaves
from adv2_jax.interpreters.base import Context, Interpreter, Seen, recorded
from adv2_jax.options import bind
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Features, HasFeatures, Image, Label, Logits, Map


def head_weights(model: HasFeatures, features: Features, label: Label) -> Array:
    """Gradient of z_c with respect to the features, averaged over positions: alpha_{k,c} of
    Grad-CAM, [C].

    With global average pooling and a linear head this is w_{k,c} / (h w), whatever the features.
    """
    return at_least_float32(jax.grad(lambda a: head_of(model, a)[label])(features)).mean(
        axis=(0, 1)
    )


def raw_cam(model: HasFeatures, features: Features, label: Label) -> Array:
    """sum_k w_{k,c} a_k, before scaling: [h, w, C] -> [h, w]; w_{k,c} is read off the gradient of the head."""
    h, w, _ = features.shape
    return at_least_float32(features) @ (head_weights(model, features, label) * h * w)


def raw_grad_cam(model: HasFeatures, features: Features, label: Label) -> Array:
    """ReLU(sum_k alpha_{k,c} a_k), before scaling: [h, w, C] -> [h, w]."""
    return jnp.maximum(at_least_float32(features) @ head_weights(model, features, label), 0)


def cam(model: HasFeatures, image: Image, label: Label) -> Map:
    """Class activation map, min-max of sum_k w_{k,c} a_k (Zhou et al. 2016; ADV² §3.3).

    Args:
        model: a classifier whose head is global average pooling and a linear layer.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return cam_with_logits(model, image, label)[1]


def grad_cam(model: HasFeatures, image: Image, label: Label) -> Map:
    """Grad-CAM, min-max of ReLU(sum_k alpha_{k,c} a_k) (Selvaraju et al. 2017; ADV² §3.3).

    Args:
        model: any classifier; the head need not be linear.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return grad_cam_with_logits(model, image, label)[1]


def cam_with_logits(model: HasFeatures, image: Image, label: Label) -> tuple[Logits, Map]:
    """Logits [K] and CAM [h, w] from one set of features."""
    features = model.features(image)
    return head_of(model, features), maps.min_max(raw_cam(model, features, label))


def grad_cam_with_logits(model: HasFeatures, image: Image, label: Label) -> tuple[Logits, Map]:
    """Logits [K] and Grad-CAM [h, w] from one set of features."""
    features = model.features(image)
    return head_of(model, features), maps.min_max(raw_grad_cam(model, features, label))


def check_pooling(model: HasFeatures, shape: tuple[int, ...]) -> None:
    """Refuse a head that is not global average pooling and a linear layer: CAM is not defined for
    it.

    The gradient of such a head is the same at all features and all positions; it is compared at two
    random ones.

    Args:
        model: a classifier.
        shape: of the images, [H, W, 3].

    Raises:
        ValueError: says that Grad-CAM needs no such head.
    """
    features = check_features(model, shape)
    # a head that is refused may well have no gradient at random features
    with jax.debug_nans(False):
        departure = jax.device_get(
            _departure(
                static_leaves(model), features.shape, features.dtype, num_classes(model, shape)
            )
        )
    # a linear head has one gradient but for rounding: the bound is 3e-4 in float32 and .09 in
    # bfloat16; others depart by 1
    if departure > float(jnp.finfo(features.dtype).eps) ** 0.5:
        raise ValueError(
            f"cam needs a head of global average pooling and a linear layer: the gradient of {type(model).__name__}.head "
            "depends on the position or on the features; grad_cam takes any head"
        )


@partial(jax.jit, static_argnums=(1, 2, 3))
def _departure(model: HasFeatures, shape: tuple[int, ...], dtype: jnp.dtype, k: int) -> Array:
    """How far the gradient of a random mixture of the logits departs from one that is constant, as a part of its largest entry."""
    weights, *features = (
        jax.random.normal(jax.random.key(i), size) for i, size in enumerate(((k,), shape, shape))
    )

    def gradient(a: Features) -> Array:
        mixture, slope = jax.value_and_grad(lambda a: weights @ head_of(model, a))(a.astype(dtype))
        return jnp.where(jnp.isfinite(mixture), at_least_float32(slope), jnp.nan)

    # the first features are not negative: roots and logarithms are NaN, and so left out, elsewhere
    found = jnp.stack([gradient(a) for a in (jnp.abs(features[0]), *features)])
    return jnp.nanmax(jnp.abs(found - found[:1, :1, :1])) / jnp.maximum(
        jnp.nanmax(jnp.abs(found)), jnp.finfo(found.dtype).tiny
    )


@recorded
def cam_interpreter() -> Interpreter:
    """CAM; analyst and adversary use the same function, there is nothing to smooth."""
    return Interpreter(
        "cam",
        cam,
        bind(_exact, draw=cam_with_logits),
        check=check_pooling,
        needs=("features", "head"),
    )


@recorded
def grad_cam_interpreter() -> Interpreter:
    """Grad-CAM; analyst and adversary use the same function, there is nothing to smooth."""
    surrogate = bind(_exact, draw=grad_cam_with_logits)
    return Interpreter(
        "grad_cam", grad_cam, surrogate, check=check_features, needs=("features", "head")
    )


def _exact(
    model: HasFeatures,
    image: Image,
    label: Label,
    context: Context,
    *,
    draw: Callable[..., tuple[Logits, Map]],
) -> Seen:
    return Seen(*draw(model, image, label))
