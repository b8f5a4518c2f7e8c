"""Measures of an attack (method: ADV² §4.1); batches of finished, 8-bit images in, one number an
image out, in NumPy.

images [N, H, W, 3], uint8 or in [0, 1]    logits [N, K]    maps [N, h, w] in [0, 1]    masks [N, H,
W] bool
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from adv2_jax.maps import resize


def success(logits: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Whether the target is the prediction: [N, K], [N] -> [N] bool. Its mean is the attack success rate (ASR)."""
    return np.asarray(logits).argmax(axis=-1) == np.asarray(targets)


def confidence(logits: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """f_t, the probability of the target: [N, K], [N] -> [N].

    Its mean over the successes is the misclassification confidence (MC).
    """
    return np.take_along_axis(probabilities(logits), np.asarray(targets)[:, None], axis=-1)[:, 0]


def probabilities(logits: ArrayLike) -> np.ndarray:
    """Softmax: [N, K] -> [N, K]; where one of the logits is not finite, some are not a number."""
    z = np.asarray(logits)
    with np.errstate(invalid="ignore"):  # ∞ - ∞
        odds = np.exp(z - z.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def map_l1(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    """Mean absolute difference: [N, h, w] twice -> [N] in [0, 1]."""
    return np.abs(_difference(maps, target_maps)).mean(axis=(1, 2))


def map_l2(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    """Root mean square difference: [N, h, w] twice -> [N] in [0, 1]."""
    return np.sqrt((_difference(maps, target_maps) ** 2).mean(axis=(1, 2)))


def _difference(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    return np.asarray(maps) - np.asarray(target_maps)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boolean maps; two empty maps agree fully."""
    union = (a | b).sum(axis=(1, 2))
    return np.where(union > 0, (a & b).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def iou_quantile(maps: ArrayLike, target_maps: ArrayLike, quantile: float = 0.75) -> np.ndarray:
    """IoU of the largest entries of two maps, those above the quantile of each: [N, h, w] twice ->
    [N] in [0, 1].

    The entries are chosen by rank: all that are as large as the k-th largest, where k of h w lie
    above the quantile. So a plateau at the top is taken whole. One at the bottom is not: what a map
    leaves at its minimum, it does not mark. Two unrelated maps score .14 at the 75th percentile.
    """

    def top(m: np.ndarray) -> np.ndarray:
        n = m[0].size
        k = max(n - 1 - int(quantile * (n - 1)), 1)
        last = np.sort(m.reshape(len(m), n), axis=-1)[:, n - k, None, None]
        return np.where(last > m.min((1, 2), keepdims=True), m >= last, m > last)

    return _iou(top(np.asarray(maps)), top(np.asarray(target_maps)))


def iou_threshold(maps: ArrayLike, target_maps: ArrayLike, threshold: float = 0.5) -> np.ndarray:
    """IoU of the maps binarised at a fixed threshold: [N, h, w] twice -> [N] in [0, 1]."""
    return _iou(np.asarray(maps) >= threshold, np.asarray(target_maps) >= threshold)


def linf(images: ArrayLike, benign: ArrayLike) -> np.ndarray:
    """Largest absolute change of a pixel value: [N, H, W, 3] twice -> float64 [N] in [0, 1]."""
    return np.abs(_change(images, benign)).max(axis=(1, 2, 3))


def l2(images: ArrayLike, benign: ArrayLike) -> np.ndarray:
    """Euclidean norm of the change, in units of pixel value: [N, H, W, 3] twice -> float64 [N]."""
    return np.sqrt((_change(images, benign) ** 2).sum(axis=(1, 2, 3)))


def _change(images: ArrayLike, benign: ArrayLike) -> np.ndarray:
    """images - benign as float64, in units of pixel value, each of them uint8 or in [0, 1].

    8-bit images are subtracted as whole numbers, so that a change by 8 levels is 8/255 to the last
    digit.

    Raises:
        ValueError: for other integers, whose unit is unknown.
    """
    arrays = [np.asarray(values) for values in (images, benign)]
    for array in arrays:
        if array.dtype != np.uint8 and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"images must be uint8, or floating point in [0, 1], got {array.dtype}"
            )
    x, x0 = (array.astype(np.float64) * (1 if array.dtype == np.uint8 else 255) for array in arrays)
    return (x - x0) / 255


def mean_displacement(flows: ArrayLike) -> np.ndarray:
    """Mean length of the displacements, in pixels: [N, H, W, 2] -> [N]."""
    return np.linalg.norm(np.asarray(flows), axis=-1).mean(axis=(1, 2))


def pointing_game(maps: ArrayLike, masks: ArrayLike) -> np.ndarray:
    """Whether the map's largest value lies on the object (Zhang et al. 2018): [N, h, w], [N, H, W]
    bool -> [N] bool.

    Maps are upsampled bilinearly to the size of the masks first.
    """
    truth = np.asarray(masks)
    n, h, w = truth.shape
    upsampled = np.asarray(_upsampled(np.asarray(maps), (h, w)))
    peaks = upsampled.reshape(n, -1).argmax(axis=-1)
    return np.take_along_axis(truth.reshape(n, -1), peaks[:, None], axis=-1)[:, 0]


@partial(jax.jit, static_argnums=1)
def _upsampled(maps: Array, size: tuple[int, int]) -> Array:
    return jax.vmap(lambda m: resize(m, size))(maps)
