"""CAM and Grad-CAM: the map weights the last convolutional features by what the head makes of them (ADV² §3.3)."""

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax import maps
from adv2_jax.types import Classifier, Features, Image, Label, Logits, Map


def head_weights(model: Classifier, features: Features, label: Label) -> Array:
    """Gradient of z_c with respect to the features, averaged over positions: alpha_{k,c} of Grad-CAM, [C].

    With global average pooling and a linear head this is w_{k,c} / (h w), whatever the features.
    """
    return jax.grad(lambda a: model.head(a)[label])(features).mean(axis=(0, 1))


def raw_cam(model: Classifier, features: Features, label: Label) -> Array:
    """sum_k w_{k,c} a_k, before scaling: [h, w, C] -> [h, w]; w_{k,c} is read off the gradient of the head."""
    h, w, _ = features.shape
    return features @ (head_weights(model, features, label) * h * w)


def raw_grad_cam(model: Classifier, features: Features, label: Label) -> Array:
    """ReLU(sum_k alpha_{k,c} a_k), before scaling: [h, w, C] -> [h, w]."""
    return jnp.maximum(features @ head_weights(model, features, label), 0)


def cam(model: Classifier, image: Image, label: Label) -> Map:
    """Class activation map, min-max of sum_k w_{k,c} a_k (Zhou et al. 2016; ADV² §3.3).

    Args:
        model: a classifier whose head is global average pooling and a linear layer.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return cam_with_logits(model, image, label)[1]


def grad_cam(model: Classifier, image: Image, label: Label) -> Map:
    """Grad-CAM, min-max of ReLU(sum_k alpha_{k,c} a_k) (Selvaraju et al. 2017; ADV² §3.3).

    Args:
        model: any classifier; the head need not be linear.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.

    Returns:
        [h, w] in [0, 1], of the size of the last features.
    """
    return grad_cam_with_logits(model, image, label)[1]


def cam_with_logits(model: Classifier, image: Image, label: Label) -> tuple[Logits, Map]:
    """Logits [K] and CAM [h, w] from one set of features."""
    features = model.features(image)
    return model.head(features), maps.min_max(raw_cam(model, features, label))


def grad_cam_with_logits(model: Classifier, image: Image, label: Label) -> tuple[Logits, Map]:
    """Logits [K] and Grad-CAM [h, w] from one set of features."""
    features = model.features(image)
    return model.head(features), maps.min_max(raw_grad_cam(model, features, label))
