"""Bootstrap intervals against a plain loop, the normal approximation, and what 95 % promises."""

import numpy as np
import pytest

from adv2_jax.runs.schema import interval, paired


def values(n, seed=0):
    return np.random.default_rng(seed).gamma(2.0, size=n)


def plain_loop(numbers, resamples=4000, seed=1):
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = [numbers[rng.integers(len(numbers))] for _ in numbers]
        means.append(sum(drawn) / len(drawn))
    return np.percentile(means, [2.5, 97.5])


def test_plain_loop_agrees():
    numbers = values(25)
    expected = plain_loop(numbers)
    # the ends are quantiles of 2000 and 4000 draws: their own errors are 3 % and 2 % of the width
    np.testing.assert_allclose(interval(numbers), expected, atol=0.12 * np.ptp(expected))


def test_many_images_give_the_normal_interval():
    numbers = values(4000)
    error = 1.96 * numbers.std() / np.sqrt(4000)
    np.testing.assert_allclose(
        interval(numbers), [numbers.mean() - error, numbers.mean() + error], atol=0.2 * error
    )


def test_most_intervals_hold_the_true_mean():
    intervals = [interval(values(40, seed), seed=seed) for seed in range(200)]
    # the mean of the distribution is 2
    share = np.mean([low <= 2.0 <= high for low, high in intervals])
    # 95 % in the limit, a little less at 40 skewed values; 200 trials: standard error 1.5 %
    assert 0.88 <= share <= 0.99


def test_equal_seeds_give_equal_intervals():
    assert interval(values(9), seed=3) == interval(values(9), seed=3) != interval(values(9), seed=4)


@pytest.mark.parametrize(("hits", "n"), [(16, 16), (8, 8), (0, 5), (3, 40), (1, 1)])
def test_a_proportion_has_wilsons_interval(hits, n):
    """It holds all p with |hits / n - p| <= 1.96 sqrt(p (1 - p) / n): try them all (Wilson 1927)."""
    p = np.linspace(0, 1, 200_001)
    inside = p[np.abs(hits / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n) + 1e-9]
    ends = interval(np.arange(n) < hits)
    # the step of the grid, and 1e-9 at its end
    np.testing.assert_allclose(ends, [inside[0], inside[-1]], atol=1e-4)


def test_a_proportion_of_nothing_has_no_interval():
    assert interval(np.zeros(0, bool)) is None


@pytest.mark.parametrize("numbers", [np.ones(5), np.full(7, 0.25, np.float32)])
def test_equal_values_have_an_interval_of_no_width(numbers):
    assert interval(numbers) == [numbers[0], numbers[0]]


@pytest.mark.parametrize("numbers", [np.zeros(0), np.ones(1)])
def test_less_than_two_values_have_no_interval(numbers):
    assert interval(numbers) is None


def test_pairs_are_compared_image_by_image():
    level = np.linspace(0, 1, 20)  # images differ much more than the attacks do
    sound = np.zeros(20, bool)
    pgd, adv2 = (
        {"map_l1": level + shift, "map_iou75": level, "failed": sound} for shift in (0.0, -0.01)
    )
    l1, iou = paired(pgd, adv2, seed=0)
    assert l1["difference"] == pytest.approx(-0.01) and l1["n"] == 20
    assert l1["ci"] == pytest.approx([-0.01, -0.01]) and iou["ci"] == [0.0, 0.0]
