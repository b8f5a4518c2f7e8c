"""Measures against plain loops over images and pixels."""

import jax.numpy as jnp
import numpy as np
import pytest

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
