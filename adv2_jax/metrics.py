"""Measures of an attack (method: ADV² §4.1); batches of finished, 8-bit images in, one number an image out.

images [N, H, W, 3] in [0, 1]    logits [N, K]    maps [N, h, w] in [0, 1]    masks [N, H, W] bool
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from adv2_jax.maps import resize


def success(logits: ArrayLike, targets: ArrayLike) -> Array:
    """Whether the target is the prediction: [N, K], [N] -> [N] bool. Its mean is the attack success rate (ASR)."""
    return jnp.asarray(logits).argmax(axis=-1) == jnp.asarray(targets)


def confidence(logits: ArrayLike, targets: ArrayLike) -> Array:
    """f_t, the probability of the target: [N, K], [N] -> [N].

    Its mean over the successes is the misclassification confidence (MC).
    """
    return jnp.take_along_axis(jax.nn.softmax(logits), jnp.asarray(targets)[:, None], axis=-1)[:, 0]


def map_l1(maps: ArrayLike, target_maps: ArrayLike) -> Array:
    """Mean absolute difference: [N, h, w] twice -> [N] in [0, 1]."""
    return jnp.abs(_difference(maps, target_maps)).mean(axis=(1, 2))


def map_l2(maps: ArrayLike, target_maps: ArrayLike) -> Array:
    """Root mean square difference: [N, h, w] twice -> [N] in [0, 1]."""
    return jnp.sqrt((_difference(maps, target_maps) ** 2).mean(axis=(1, 2)))


def _difference(a: ArrayLike, b: ArrayLike) -> Array:
    return jnp.asarray(a) - jnp.asarray(b)


def _iou(a: Array, b: Array) -> Array:
    """Intersection over union of boolean maps; two empty maps agree fully."""
    union = (a | b).sum(axis=(1, 2))
    return jnp.where(union > 0, (a & b).sum(axis=(1, 2)) / jnp.maximum(union, 1), 1.0)


def iou_quantile(maps: ArrayLike, target_maps: ArrayLike, quantile: float = 0.75) -> Array:
    """IoU of the maps binarised above their own quantile, a map: [N, h, w] twice -> [N] in [0, 1].

    Two unrelated maps score .14 at the 75th percentile.
    """

    def top(m: Array) -> Array:
        return m > jnp.quantile(m, quantile, axis=(1, 2), keepdims=True)

    return _iou(top(jnp.asarray(maps)), top(jnp.asarray(target_maps)))


def iou_threshold(maps: ArrayLike, target_maps: ArrayLike, threshold: float = 0.5) -> Array:
    """IoU of the maps binarised at a fixed threshold: [N, h, w] twice -> [N] in [0, 1]."""
    return _iou(jnp.asarray(maps) >= threshold, jnp.asarray(target_maps) >= threshold)


def linf(images: ArrayLike, benign: ArrayLike) -> Array:
    """Largest absolute change of a pixel value: [N, H, W, 3] twice -> [N]."""
    return jnp.abs(_difference(images, benign)).max(axis=(1, 2, 3))


def l2(images: ArrayLike, benign: ArrayLike) -> Array:
    """Euclidean norm of the change: [N, H, W, 3] twice -> [N]."""
    return jnp.sqrt((_difference(images, benign) ** 2).sum(axis=(1, 2, 3)))


def mean_displacement(flows: ArrayLike) -> Array:
    """Mean length of the displacements, in pixels: [N, H, W, 2] -> [N]."""
    return jnp.linalg.norm(jnp.asarray(flows), axis=-1).mean(axis=(1, 2))


def pointing_game(maps: ArrayLike, masks: ArrayLike) -> Array:
    """Whether the map's largest value lies on the object (Zhang et al. 2018): [N, h, w], [N, H, W] bool -> [N] bool.

    Maps are upsampled bilinearly to the size of the masks first.
    """
    truth = jnp.asarray(masks)
    n, h, w = truth.shape
    upsampled = jax.vmap(lambda m: resize(m, (h, w)))(jnp.asarray(maps))
    peaks = upsampled.reshape(n, -1).argmax(axis=-1)
    return jnp.take_along_axis(truth.reshape(n, -1), peaks[:, None], axis=-1)[:, 0]
