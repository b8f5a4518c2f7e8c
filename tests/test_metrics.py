"""Measures against plain loops over images and pixels."""

from functools import partial
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from adv2_jax import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4)).astype(np.float32)
MAPS, TARGET_MAPS = RNG.random((2, 5, 6, 8)).astype(np.float32)
IMAGES, BENIGN = RNG.random((2, 5, 6, 8, 3)).astype(np.float32)
OBJECTS = RNG.random((5, 12, 16)) < 0.3


def iou(a, b):
    return len(a & b) / len(a | b)


def pixels_above(m, threshold, inclusive):
    return {p for p in np.ndindex(m.shape) if m[p] > threshold or (inclusive and m[p] == threshold)}


def top_quarter(m):
    """The 12 brightest of 48 pixels."""
    return set(sorted(np.ndindex(m.shape), key=lambda p: -m[p])[: m.size // 4])


MEASURES = {
    metrics.map_l1: lambda m, t: sum(abs(m[p] - t[p]) for p in np.ndindex(m.shape)) / m.size,
    metrics.map_l2: lambda m, t: (
        (sum((m[p] - t[p]) ** 2 for p in np.ndindex(m.shape)) / m.size) ** 0.5
    ),
    metrics.iou_quantile: lambda m, t: iou(top_quarter(m), top_quarter(t)),
    metrics.iou_threshold: lambda m, t: iou(pixels_above(m, 0.5, True), pixels_above(t, 0.5, True)),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_map_measures(measure):
    expected = [MEASURES[measure](m, t) for m, t in zip(MAPS, TARGET_MAPS, strict=True)]
    np.testing.assert_allclose(measure(MAPS, TARGET_MAPS), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("measure", "norm"),
    [
        (metrics.linf, lambda d: max(map(abs, d))),
        (metrics.l2, lambda d: sum(x * x for x in d) ** 0.5),
    ],
)
def test_perturbation_norms(measure, norm):
    expected = [norm((x - b).ravel()) for x, b in zip(IMAGES, BENIGN, strict=True)]
    np.testing.assert_allclose(measure(IMAGES, BENIGN), expected, rtol=1e-5)


@pytest.mark.parametrize("measure", [*MEASURES, metrics.linf, metrics.l2])
def test_same_against_same(measure):
    batch = IMAGES if measure in (metrics.linf, metrics.l2) else MAPS
    np.testing.assert_array_equal(
        measure(batch, batch), np.full(5, float(measure.__name__.startswith("iou")))
    )


def test_success_and_confidence():
    targets = jnp.array([0, 1, 2, 3, 0])
    for i, t in enumerate(np.asarray(targets)):
        probabilities = np.exp(LOGITS[i]) / np.exp(LOGITS[i]).sum()
        assert metrics.success(LOGITS, targets)[i] == (probabilities[t] == probabilities.max())
        assert metrics.confidence(LOGITS, targets)[i] == pytest.approx(probabilities[t], rel=1e-5)


def test_two_empty_maps_agree_fully():
    empty = np.zeros((1, 4, 4), np.float32)
    assert metrics.iou_threshold(empty, empty) == 1
    assert metrics.iou_threshold(empty, empty + 1) == 0
    assert metrics.iou_quantile(empty, empty) == 1


@pytest.mark.parametrize(("quantile", "expected"), [(0.75, 0.0), (0.5, 0.25 / 0.75), (0.25, 0.5)])
def test_quantile_is_an_option(quantile, expected):
    rising = np.arange(16, dtype=np.float32).reshape(1, 4, 4) / 16
    shifted = np.roll(rising.ravel(), 4).reshape(1, 4, 4)
    assert metrics.iou_quantile(rising, shifted, quantile) == pytest.approx(expected)


def test_pixels_at_the_quantile_itself_are_left_out():
    rising = np.arange(5, dtype=np.float32).reshape(1, 1, 5)
    assert metrics.iou_quantile(rising, rising[:, :, ::-1], 0.5) == 0


def test_threshold_is_an_option_and_belongs_to_the_object():
    a, b = np.full((1, 2, 2), 0.25, np.float32), np.full((1, 2, 2), 1.0, np.float32)
    assert metrics.iou_threshold(a, b) == 0
    assert metrics.iou_threshold(a, b, 0.25) == 1


@pytest.mark.parametrize(("place", "hit"), [((1, 6), True), ((1, 2), False), ((4, 6), False)])
def test_pointing_game_asks_where_the_peak_lies(place, hit):
    maps = np.zeros((1, 6, 8), np.float32)
    maps[0][place] = 1
    objects = np.zeros((1, 12, 16), bool)
    objects[0, :6, 8:] = True
    assert metrics.pointing_game(maps, objects)[0] == hit


def test_mean_displacement_is_that_of_a_loop():
    flows = RNG.normal(size=(3, 4, 5, 2)).astype(np.float32)
    expected = [np.mean([np.hypot(*flow[p]) for p in np.ndindex(4, 5)]) for flow in flows]
    np.testing.assert_allclose(metrics.mean_displacement(flows), expected, rtol=1e-5)


@pytest.mark.parametrize("measure", [metrics.linf, metrics.l2])
@pytest.mark.parametrize("kinds", ["uu", "uf", "fu", "ff"])
def test_perturbations_of_8_bit_images_and_of_float_ones_have_one_unit(measure, kinds):
    x, x0 = np.random.default_rng(1).integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    given = [
        v if kind == "u" else v / np.float32(255) for v, kind in zip((x, x0), kinds, strict=True)
    ]
    expected = [LEVELS[measure](a, b) for a, b in zip(x, x0, strict=True)]
    # float32 holds k / 255 to 6e-8
    np.testing.assert_allclose(measure(*given), expected, rtol=1e-6)


LEVELS = {
    metrics.linf: lambda x, x0: (
        max(abs(int(a) - int(b)) for a, b in zip(x.ravel(), x0.ravel(), strict=True)) / 255
    ),
    metrics.l2: lambda x, x0: (
        sum((int(a) - int(b)) ** 2 for a, b in zip(x.ravel(), x0.ravel(), strict=True)) ** 0.5 / 255
    ),
}


@pytest.mark.parametrize("level", range(1, 256))
def test_a_change_by_whole_levels_is_exact(level):
    x0 = np.full((1, 1, 1, 3), 255 - level, np.uint8)
    assert metrics.linf(x0 + np.uint8(level), x0)[0] == level / 255


def test_images_of_unknown_unit_are_refused():
    with pytest.raises(ValueError, match="uint8, or floating point in"):
        metrics.linf(np.zeros((1, 2, 2, 3), np.int64), np.zeros((1, 2, 2, 3), np.uint8))


def plateau(*places):
    m = np.linspace(0, 0.5, 16, dtype=np.float32).reshape(1, 4, 4)
    m.ravel()[list(places)] = 1
    return m


def test_a_plateau_at_the_top_does_not_empty_a_map():
    """More than a quarter at the maximum: nothing lies above the 75th percentile."""
    left, right = plateau(*range(6)), plateau(*range(10, 16))
    assert metrics.iou_quantile(left, left**2) == 1  # a monotone copy
    assert metrics.iou_quantile(left, right) == 0
    assert metrics.iou_quantile(left, plateau(*range(3, 9))) == pytest.approx(3 / 9)


def test_what_a_map_leaves_at_its_minimum_is_not_marked():
    """Sparse maps, as MASK draws them: fewer than a quarter of the entries are above zero."""
    one, other = np.zeros((2, 1, 4, 4), np.float32)
    one[0, 0, :2], other[0, 3, :2] = 1, 1
    assert metrics.iou_quantile(one, other) == 0
    assert metrics.iou_quantile(one, one) == 1


# Measures of the literature.

NEAR = partial(metrics.top_intersection, radius=1)
SIMILARITIES = {
    "top": metrics.top_intersection,
    "near": NEAR,
    "spearman": metrics.spearman,
    "kendall": metrics.kendall,
    "ssim": metrics.ssim,
}
PAIRS = [(8, 8), (7, 7), (4, 4), (28, 28), (12, 9)]


def alike(shape, n=4, levels=None):
    """Return maps and noisy copies of them, [n, h, w] each; with so many levels, many ties."""
    x, noise = np.random.default_rng(3).random((2, n, *shape))
    pair = x, 0.6 * x + 0.4 * noise
    return [m if levels is None else np.round(m * levels) / levels for m in pair]


def largest(m, k):
    return set(sorted(np.ndindex(m.shape), key=lambda p: -m[p])[:k])


@pytest.mark.parametrize("shape", PAIRS)
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_top_intersection_is_that_of_loops_over_pixels(shape, radius):
    def covered(a, b):
        return sum(any(max(abs(y - v), abs(x - w)) <= radius for v, w in b) for y, x in a)

    x, y = alike(shape)
    k = round(0.1 * x[0].size)
    tops = [(largest(a, k), largest(b, k)) for a, b in zip(x, y, strict=True)]
    expected = [(covered(a, b) + covered(b, a)) / (2 * k) for a, b in tops]
    if radius == 0:
        assert expected == [len(a & b) / k for a, b in tops]
    np.testing.assert_allclose(metrics.top_intersection(x, y, radius=radius), expected)


def test_a_shift_by_one_pixel_is_tolerated_and_one_by_two_is_not():
    m = np.zeros((1, 10, 10))
    m[0, 4, ::2] = 1
    for shift, expected in ((0, (1, 1)), (1, (0, 1)), (2, (0, 0))):
        moved = np.roll(m, shift, axis=1)
        assert (metrics.top_intersection(m, moved)[0], NEAR(m, moved)[0]) == expected


def test_the_tolerance_does_not_wrap_around_the_border():
    a, b = np.zeros((2, 1, 6, 6))
    a[0, 0, 0] = b[0, 5, 5] = 1
    assert NEAR(a, b) == 0


def test_plateaus_are_taken_whole_at_the_top_and_never_at_the_minimum():
    a, b = np.zeros((2, 1, 10, 10))
    a[0, :4] = 1  # 40 entries of a top 10
    b[0, :2] = 1
    assert metrics.top_intersection(a, b) == 20 / 40
    a[0], b[0] = np.eye(10) > 2, 0
    a[0, 0, :3] = b[0, 9, :3] = 1  # three entries above the minimum: the other seven do not agree
    assert metrics.top_intersection(a, b) == NEAR(a, b) == 0


@pytest.mark.parametrize("levels", [None, 3, 1])
@pytest.mark.parametrize("shape", PAIRS)
def test_rank_correlations_are_those_of_scipy(shape, levels):
    x, y = alike(shape, levels=levels)
    for measure, oracle in (
        (metrics.spearman, stats.spearmanr),
        (metrics.kendall, stats.kendalltau),
    ):
        pairs = zip(x, y, strict=True)
        expected = [oracle(a.ravel(), b.ravel()).statistic for a, b in pairs]
        np.testing.assert_allclose(measure(x, y), expected, atol=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_kendall_counts_pairs(levels):
    x, y = (m.reshape(4, -1) for m in alike((4, 5), levels=levels))
    for value, a, b in zip(metrics.kendall(x[:, None], y[:, None]), x, y, strict=True):
        signs = np.array(
            [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in product(range(20), repeat=2)]
        )
        expected = signs.prod(1).sum() / np.sqrt(np.prod(np.abs(signs).sum(0)))
        assert value == pytest.approx(expected, abs=1e-12)


def plain_ssim(a, b, window, sigma):
    """Wang et al. 2004, eq. 13, window by window."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    values = []
    for i, j in np.ndindex(a.shape[0] - window + 1, a.shape[1] - window + 1):
        u, v = (m[i : i + window, j : j + window] for m in (a, b))
        mu, mv = ((weights * m).sum() for m in (u, v))
        var_u, var_v = ((weights * (m - c) ** 2).sum() for m, c in ((u, mu), (v, mv)))
        covariance = (weights * (u - mu) * (v - mv)).sum()
        values.append(
            (2 * mu * mv + 1e-4)
            * (2 * covariance + 9e-4)
            / ((mu**2 + mv**2 + 1e-4) * (var_u + var_v + 9e-4))
        )
    return np.mean(values)


@pytest.mark.parametrize(
    ("shape", "window"), [*zip(PAIRS, (7, 7, 3, 11, 9), strict=True), ((2, 2), 1), ((1, 5), 1)]
)
def test_ssim_is_that_of_loops_over_windows(shape, window):
    x, y = alike(shape)
    expected = [plain_ssim(a, b, window, 1.5 * window / 11) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(metrics.ssim(x, y), expected, atol=1e-9)


# scikit-image 0.26: structural_similarity(x, y, gaussian_weights=True, sigma=1.5 * window / 11,
# use_sample_covariance=False, data_range=1.0) of the first pair of `alike(shape, n=1)`
SCIKIT_IMAGE = {
    (56, 56): 0.7814558374027426,
    (12, 9): 0.8159429762549091,
    (8, 8): 0.7420934582851644,
    (7, 7): 0.831475769199289,
    (4, 4): 0.7666543700793668,
}


@pytest.mark.parametrize("shape", SCIKIT_IMAGE)
def test_ssim_is_that_of_scikit_image(shape):
    np.testing.assert_allclose(metrics.ssim(*alike(shape, n=1)), SCIKIT_IMAGE[shape], rtol=1e-9)


@pytest.mark.parametrize("shape", [*PAIRS, (1, 4), (2, 2)])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_map_is_most_like_itself(name, shape):
    x, y = alike(shape, levels=7)
    measure = SIMILARITIES[name]
    np.testing.assert_allclose(measure(x, x), 1, rtol=1e-12)
    assert measure(x, x).dtype == float and (measure(x, y) <= 1).all()
    np.testing.assert_allclose(measure(x, y), measure(y, x), rtol=1e-12)


def test_a_reversed_order_is_minus_one():
    x, _ = alike((8, 8))
    for measure in (metrics.spearman, metrics.kendall):
        np.testing.assert_allclose(measure(x, 1 - x), -1, rtol=1e-12)
    assert (metrics.top_intersection(x, 1 - x) == 0).all()


def test_constant_maps_have_a_defined_likeness():
    x, _ = alike((8, 8))
    flat = np.zeros_like(x)
    for measure in SIMILARITIES.values():
        np.testing.assert_allclose(measure(flat, flat), 1)
        # the two constants of SSIM keep it a little above 0
        np.testing.assert_allclose(measure(flat, x), 0, atol=1e-3)
    for measure in (metrics.spearman, metrics.kendall):  # no order on either side: they agree
        assert (measure(flat, flat + 1) == 1).all()


def test_a_map_that_is_nan_spoils_no_other():
    x, y = alike((8, 8))
    expected = {name: measure(x, y)[1:] for name, measure in SIMILARITIES.items()}
    x[0] = np.nan
    for name, measure in SIMILARITIES.items():
        np.testing.assert_array_equal(measure(x, y)[1:], expected[name])


def test_unrelated_maps_score_what_the_documentation_says():
    x, y = np.random.default_rng(0).random((2, 60, 56, 56))
    means = {name: measure(x, y).mean() for name, measure in SIMILARITIES.items()}
    # of 3136 entries and 60 maps: standard errors below .004
    expected = {"top": 0.1, "near": 0.61, "spearman": 0, "kendall": 0, "ssim": 0}
    assert means == pytest.approx(expected, abs=0.01)
