"""Measures of an attack, one number for each image of a batch, in NumPy (ADV² §4.1).

images    [N, H, W, 3]  uint8, or floating point in [0, 1]
logits    [N, K]
maps      [N, h, w]     in [0, 1]
objects   [N, H, W]     bool, True on the object
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

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
    from scipy.special import softmax  # takes a sixth of a second: only where it is used

    with np.errstate(invalid="ignore"):  # ∞ - ∞
        return softmax(np.asarray(logits), axis=-1)


def strongest_other(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Return the class with the largest logit of those that are not the label: [N, K], [N] -> [N]."""
    others = np.array(logits)
    np.put_along_axis(others, np.asarray(labels)[:, None], -np.inf, axis=-1)
    return others.argmax(axis=-1).astype(np.int32)


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

    The entries are chosen by rank (`_tops`), k of h w lying above the quantile. Two unrelated maps
    have an IoU of .14 at the 75th percentile.
    """
    n = np.asarray(maps)[0].size
    return _iou(*_tops(maps, target_maps, n - 1 - int(quantile * (n - 1))))


def _tops(maps: ArrayLike, target_maps: ArrayLike, k: int) -> list[np.ndarray]:
    """Return two boolean maps [N, h, w]: the entries of each as large as its k-th largest.

    So a plateau at the top is taken whole, and one at the minimum never counts. k is 1 or more.
    """
    tops, k = [], max(k, 1)
    for m in map(np.asarray, (maps, target_maps)):
        last = np.sort(m.reshape(len(m), -1), axis=-1)[:, -k, None, None]
        # a comparison with the quantile itself would leave nothing of a map with more than a
        # quarter of its entries at the maximum
        tops.append(np.where(last > m.min((1, 2), keepdims=True), m >= last, m > last))
    return tops


def iou_threshold(maps: ArrayLike, target_maps: ArrayLike, threshold: float = 0.5) -> np.ndarray:
    """Return the IoU of the maps binarised at a threshold: [N, h, w], [N, h, w] -> [N]."""
    return _iou(np.asarray(maps) >= threshold, np.asarray(target_maps) >= threshold)


def top_intersection(
    maps: ArrayLike, target_maps: ArrayLike, share: float = 0.1, radius: int = 0
) -> np.ndarray:
    """Return the top-k intersection (Ghorbani et al. 2019): [N, h, w], [N, h, w] -> [N] in [0, 1].

    The number of entries among the k largest of both maps, divided by k. The entries are those of
    `iou_quantile`; where plateaus make them more or less than k, the larger number divides. Two
    empty maps have 1. Two unrelated maps have `share`.

    Args:
        maps, target_maps: to be compared.
        share: k / (h w), k rounded, 1 or more.
        radius: an entry also counts if the other map has one of its k within so many rows and
            columns, and the number of such entries is averaged over both maps: the mean of LENS
            precision and recall at k (Kamath et al. 2024).
    """
    from scipy.ndimage import maximum_filter  # takes a third of a second: only where it is used

    pair, width = _tops(maps, target_maps, round(share * np.asarray(maps)[0].size)), 2 * radius + 1
    # the largest of a window: True within the radius of a True
    near = [maximum_filter(m, size=(1, width, width), mode="constant") for m in pair]
    hits = [(m & other).sum(axis=(1, 2)) for m, other in zip(pair, reversed(near), strict=True)]
    k = np.maximum(*(m.sum(axis=(1, 2)) for m in pair))
    return np.where(k > 0, np.mean(hits, axis=0) / np.maximum(k, 1), 1.0)


def rank_correlation(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return Spearman's ρ along the last axis: [..., n], [..., n] -> [...] in [-1, 1].

    Equal entries share their mean rank. It is NaN where all entries of one are equal.
    """
    from scipy.stats import rankdata  # takes a second: only where it is used

    x, y = (rankdata(values, axis=-1) for values in (a, b))
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
    size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.asarray((x * y).sum(-1) / np.where(size > 0, size, np.nan))


def roc_auc(negatives: ArrayLike, positives: ArrayLike) -> np.ndarray:
    """Return the area under the ROC curve of scores: [..., N], [..., M] -> [...] in [0, 1].

    It is the share of pairs whose positive has the larger score, ties half (Mann-Whitney's U).
    """
    from scipy.stats import rankdata  # as above

    n, m = np.shape(negatives)[-1], np.shape(positives)[-1]
    ranks = rankdata(np.concatenate([negatives, positives], axis=-1), axis=-1)[..., n:]
    return np.asarray((ranks.sum(-1) - m * (m + 1) / 2) / (n * m))


def spearman(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    """Return Spearman's rank correlation of the entries: [N, h, w], [N, h, w] -> [N] in [-1, 1].

    A constant map has no order: 0, and 1 for two constant maps, which agree.
    """
    return _correlation(rank_correlation, maps, target_maps)


def kendall(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    """Return Kendall's τ-b of the entries, which allows for ties: [N, h, w] x 2 -> [N] in [-1, 1].

    Constant maps as in `spearman`. About 2 ms for a map of 56².
    """
    from scipy.stats import kendalltau

    def tau(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([kendalltau(*pair).statistic for pair in zip(a, b, strict=True)])

    return _correlation(tau, maps, target_maps)


def _correlation(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
    maps: ArrayLike,
    target_maps: ArrayLike,
) -> np.ndarray:
    """Return a correlation of the entries of maps, and its value for constant maps."""
    pair = [m.reshape(len(m), -1) for m in map(np.asarray, (maps, target_maps))]
    constant = [m.min(1) == m.max(1) for m in pair]
    both = np.logical_and(*constant).astype(float)
    return np.where(np.logical_or(*constant), both, function(*pair))


def ssim(maps: ArrayLike, target_maps: ArrayLike) -> np.ndarray:
    """Return the structural similarity (Wang et al. 2004): [N, h, w], [N, h, w] -> [N] in [-1, 1].

    The mean over all windows inside the map: 11 x 11, weighted by a Gaussian of σ = 1.5, with
    K1 = .01, K2 = .03 and L = 1. On a map with fewer rows or columns it is the largest odd window
    that fits, its σ in proportion. Two constant maps have 1 if they are equal.
    """
    from scipy.ndimage import gaussian_filter  # as above

    x, y = (np.asarray(m, np.float64) for m in (maps, target_maps))
    window = min(11, *(side - 1 + side % 2 for side in x.shape[1:]))
    edge = window // 2
    inside = slice(edge, -edge or None)
    sigma = 1.5 * window / 11
    # 3.5 σ, rounded, is half of the window whatever its size
    local = [
        gaussian_filter(values, (0, sigma, sigma), truncate=3.5)[:, inside, inside]
        for values in (x, y, x * x, y * y, x * y)
    ]
    mean_x, mean_y, *squares = local
    xx, yy, xy = mean_x**2, mean_y**2, mean_x * mean_y
    var_x, var_y, covariance = (a - b for a, b in zip(squares, (xx, yy, xy), strict=True))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * xy + c1) / (xx + yy + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(axis=(1, 2))


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
