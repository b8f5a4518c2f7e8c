"""Measures of an attack, one number for each image of a batch, in NumPy (ADV² §4.1).

images    [N, H, W, 3]  uint8, or floating point in [0, 1]
logits    [N, K]
maps      [N, h, w]     in [0, 1]
objects   [N, H, W]     bool, True on the object
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy.special import softmax

from adv2_jax.maps import resize


def success(logits: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Return whether the target is the prediction: [N, K], [N] -> [N] bool.

    Its mean is the attack success rate (ASR).
    """
    return np.asarray(logits).argmax(axis=-1) == np.asarray(targets)


def confidence(logits: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Return f_t, the probability of the target: [N, K], [N] -> [N].

    Its mean over the successes is the misclassification confidence (MC).
    """
    return np.take_along_axis(probabilities(logits), np.asarray(targets)[:, None], axis=-1)[:, 0]


def probabilities(logits: ArrayLike) -> np.ndarray:
    """Return the softmax probabilities: [N, K] -> [N, K]; NaN where a logit is NaN or +∞."""
    with np.errstate(invalid="ignore"):  # ∞ - ∞
        return softmax(np.asarray(logits), axis=-1)


def map_l1(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    """Return the mean absolute difference: [N, h, w], [N, h, w] -> [N] in [0, 1]."""
    return np.abs(_difference(maps, target_maps)).mean(axis=(1, 2))


def map_l2(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    """Return the root mean square difference: [N, h, w], [N, h, w] -> [N] in [0, 1]."""
    return np.sqrt((_difference(maps, target_maps) ** 2).mean(axis=(1, 2)))


def _difference(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    return np.asarray(maps) - np.asarray(target_maps)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of boolean maps; 1 for two empty maps."""
    union = (a | b).sum(axis=(1, 2))
    return np.where(union > 0, (a & b).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def iou_quantile(maps: ArrayLike, target_maps: ArrayLike, quantile: float = 0.75) -> np.ndarray:
    """Return the IoU of the entries above a quantile of each map: [N, h, w], [N, h, w] -> [N].

    The entries are chosen by rank: all that are as large as the k-th largest, where k of h w lie
    above the quantile. So a plateau at the top is taken whole, and one at the minimum never counts.
    Two unrelated maps have an IoU of .14 at the 75th percentile.
    """

    def top(m: np.ndarray) -> np.ndarray:
        n = m[0].size
        k = max(n - 1 - int(quantile * (n - 1)), 1)
        last = np.sort(m.reshape(len(m), n), axis=-1)[:, n - k, None, None]
        # a comparison with the quantile itself would leave nothing of a map with more than a
        # quarter of its entries at the maximum
        return np.where(last > m.min((1, 2), keepdims=True), m >= last, m > last)

    return _iou(top(np.asarray(maps)), top(np.asarray(target_maps)))


def iou_threshold(maps: ArrayLike, target_maps: ArrayLike, threshold: float = 0.5) -> np.ndarray:
    """Return the IoU of the maps binarised at a threshold: [N, h, w], [N, h, w] -> [N]."""
    return _iou(np.asarray(maps) >= threshold, np.asarray(target_maps) >= threshold)


def linf(images: ArrayLike, benign: ArrayLike) -> np.ndarray:
    """Return the largest absolute change of a pixel value, float64 [N] in [0, 1]."""
    return np.abs(_change(images, benign)).max(axis=(1, 2, 3))


def l2(images: ArrayLike, benign: ArrayLike) -> np.ndarray:
    """Return the Euclidean norm of the change, in pixel values in [0, 1], float64 [N]."""
    return np.sqrt((_change(images, benign) ** 2).sum(axis=(1, 2, 3)))


def _change(images: ArrayLike, benign: ArrayLike) -> np.ndarray:
    """Return images - benign as float64 in pixel values in [0, 1].

    Raises:
        ValueError: for integers other than uint8, whose unit is unknown.
    """
    arrays = [np.asarray(values) for values in (images, benign)]
    for array in arrays:
        if array.dtype != np.uint8 and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"images must be uint8, or floating point in [0, 1], got {array.dtype}"
            )
    # in levels first, where 8-bit images are whole numbers: a change by 8 levels is then 8/255 to
    # the last digit, and can be compared with an ε of 8/255
    x, x0 = (array.astype(np.float64) * (1 if array.dtype == np.uint8 else 255) for array in arrays)
    return (x - x0) / 255


def mean_displacement(flows: ArrayLike) -> np.ndarray:
    """Return the mean length of the displacements in pixels: [N, H, W, 2] -> [N]."""
    return np.linalg.norm(np.asarray(flows), axis=-1).mean(axis=(1, 2))


def pointing_game(maps: ArrayLike, objects: ArrayLike) -> np.ndarray:
    """Return whether the map's largest value lies on the object (Zhang et al. 2018), [N] bool.

    The maps [N, h, w] are upsampled bilinearly to the size of the objects [N, H, W] first.
    """
    truth = np.asarray(objects)
    n, h, w = truth.shape
    upsampled = np.asarray(_upsampled(np.asarray(maps), (h, w)))
    peaks = upsampled.reshape(n, -1).argmax(axis=-1)
    return np.take_along_axis(truth.reshape(n, -1), peaks[:, None], axis=-1)[:, 0]


@partial(jax.jit, static_argnums=1)
def _upsampled(maps: Array, size: tuple[int, int]) -> Array:
    return jax.vmap(lambda m: resize(m, size))(maps)
