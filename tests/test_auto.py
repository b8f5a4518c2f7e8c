"""The preset `auto`: thresholds of each image, images that are done, and what it falls back to."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_descent import CAM, NUMBERS

from adv2_jax import attack, descent, explain, metrics, threats
from adv2_jax.crafting import thresholds
from adv2_jax.data import ImageSet
from adv2_jax.descent import Options, Problem
from adv2_jax.interpreters import joint
from adv2_jax.presets import PRESETS, resolve
from adv2_jax.runs.run import Settings, run

WIDE = threats.linf(0.3)


@pytest.fixture(scope="module")
def small(make_small):
    known = make_small()
    return replace(known, weights=3 * known.weights)  # sure of some images, and not of others


@pytest.fixture(scope="module")
def aims(small, images):
    """Six images, target classes, and their benign maps."""
    x = images[:6]
    labels = explain(small, x, np.zeros(6, int), interpreter="cam")[0].argmax(1)
    return x, (labels + 1) % 3, explain(small, x, labels, interpreter="cam")[1]


def attack_cam(small, aims, *, enough, **options):
    """An attack of 40 steps, with one threshold of f_t for all images."""
    x, targets, maps = aims
    preset = replace(resolve("auto", "cam", steps=40), enough=enough, calibrated=False)
    options = {"threat": WIDE, "batch_size": 6, "snapshots": 6, **options}
    return attack(small, x, targets, maps, interpreter="cam", preset=preset, **options)


@pytest.fixture(scope="module")
def whole(small, aims):
    """The attack that never ends early."""
    return attack_cam(small, aims, enough=0.0)


def confident_distances(result):
    """The smallest map L1 so far, [6, 40], of iterates that reach .8."""
    reached = np.where(result.curves.confidence >= 0.8, result.curves.map_l1, 1)
    return np.minimum.accumulate(reached, axis=1)


@pytest.fixture(scope="module")
def enough(whole):
    """A distance that half of the images reach on the way."""
    return float(np.median(confident_distances(whole)[:, 25]))


@pytest.mark.parametrize(("driver", "batch_size"), [("host", 6), ("fori", 6), ("host", 2)])
def test_an_image_is_done_at_its_first_iterate_that_is_near_enough(
    small, aims, whole, enough, driver, batch_size
):
    near = confident_distances(whole) <= enough
    # the step that finds it is spent; chunks of ten end a batch, but cost an image nothing
    steps = np.where(near.any(1), near.argmax(1) + 1, 40)
    assert len(set(steps)) > 2 and steps.min() < 30  # or the test would not tell
    told = []
    found = attack_cam(
        small, aims, enough=enough, driver=driver, batch_size=batch_size, on_step=told.append
    )
    assert sum(told) == 40 * 6 // batch_size  # progress reaches its total
    np.testing.assert_allclose(found.work, steps, rtol=0.02)
    for i, n in enumerate(steps):
        expected = whole.curves.map_l1[i, np.minimum(np.arange(40), n - 1)]
        # signs of gradients near 0 are left to rounding
        np.testing.assert_allclose(found.curves.map_l1[i], expected, atol=2e-3)
    distance, before = (metrics.map_l1(result.maps, aims[2]) for result in (found, whole))
    assert (distance[steps < 40] <= enough + 1e-5).all()
    # that iterate and no later one, however long the others of the batch go on
    last = found.curves.map_l1[steps < 40, -1]
    np.testing.assert_allclose(distance[steps < 40], last, atol=1e-5)
    np.testing.assert_allclose(distance[steps == 40], before[steps == 40], atol=2e-3)


def test_pictures_after_the_end_are_no_black_ones(small, aims):
    found = attack_cam(small, aims, enough=1.0)
    assert found.work.max() < 40
    np.testing.assert_array_equal(found.snapshots[:, -1], found.images)
    assert (
        np.abs(found.snapshots[:, 1:-1].astype(int) - aims[0][:, None]).max((2, 3, 4)) <= 77
    ).all()


def test_without_it_every_step_is_taken(whole):
    assert len(set(whole.work)) == 1


def test_the_threshold_of_an_image_is_its_own_confidence(small, aims):
    logits, _ = explain(small, aims[0], aims[1], interpreter="cam")
    own = metrics.probabilities(logits).max(axis=1)
    found = thresholds(small, jnp.asarray(aims[0] / np.float32(255)))
    np.testing.assert_allclose(found, np.minimum(own, 0.8), rtol=1e-5)
    assert (own < 0.8).any() and (own > 0.8).any()  # or the test would not tell


@pytest.mark.parametrize(
    ("logits", "threshold", "reached"),
    [
        ([2.0, 0.0, 0.0], 0.7, True),  # f_t = .79
        ([2.0, 0.0, 0.0], 0.8, False),
        ([1.0, 0.9, 0.0], 0.4, True),  # .43
        ([0.9, 1.0, 0.0], 0.3, False),  # .39, and another class is above
    ],
)
def test_below_a_half_the_target_must_be_the_strongest_too(logits, threshold, reached):
    problem = Problem(None, jnp.int32(0), None, confidence=jnp.float32(threshold))
    assert descent.reaches(jnp.asarray(logits), problem, Options(WIDE)) == reached


def test_an_unsure_network_gets_its_maps_back(small, aims):
    """Of flat logits no f_t reaches .8: `default` then minds the class alone, and leaves the map."""
    unsure = replace(small, weights=small.weights / 10)
    x, targets, maps = aims
    default, auto = (
        attack(unsure, x, targets, maps, interpreter="cam", preset=preset, threat=WIDE, steps=60)
        for preset in ("default", "auto")
    )
    assert metrics.confidence(auto.logits, targets).max() < 0.8
    hits = [metrics.success(one.logits, targets).sum() for one in (default, auto)]
    far, near = (metrics.map_l1(one.maps, maps).mean() for one in (default, auto))
    assert hits[1] >= hits[0] and near < 0.7 * far


def test_the_weight_has_its_own_bound(linear, pixels):
    options = Options(threats.linf(0.1), CAM, yielding=0.1, least_weight=1e-3, confidence=1.0)
    problem = Problem(pixels, jnp.int32(1), jnp.zeros((4, 4)))
    state = descent.init(pixels, options)._replace(weight=jnp.float32(1.05e-3))
    step = jax.jit(partial(descent.step, options=options))
    for _ in range(2):
        state, _ = step(linear, problem, state, NUMBERS)
    assert state.weight == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "threat", [threats.l2(), threats.flow(), threats.linf()._replace(stride=None)]
)
@pytest.mark.parametrize("name", ["grad", "cam", "mask"])
def test_threat_models_without_a_stride_keep_the_pace_of_default(threat, name):
    plain, found = (resolve(preset, name, threat=threat) for preset in ("default", "auto"))
    assert (found.steps, found.step_size, found.second_moment) == (plain.steps, plain.step_size, 0)
    assert found.calibrated and found.enough


def test_numbers_of_ones_own_are_kept_under_every_threat_model():
    own = {"cam": replace(PRESETS["auto"]["cam"], steps=7)}
    assert resolve(own, "cam", threat=threats.l2()) == own["cam"]


def test_one_image_for_several_interpreters(small, aims):
    x, targets, _ = aims
    both = joint("cam", "grad_cam")
    goals = explain(small, x, targets, interpreter=both)[1]
    found = attack(small, x, targets, goals, interpreter=both, preset="auto", threat=WIDE, steps=30)
    assert metrics.success(found.logits, targets).all()
    preset = resolve("auto", both, threat=WIDE)
    assert preset.second_moment and preset.calibrated and preset.enough


def test_a_row_has_the_mean_work_of_its_images(small, aims, tmp_path):
    preset = {
        "cam": replace(resolve("auto", "cam", steps=40), enough=0.2),
        "pgd": PRESETS["auto"]["pgd"],
    }
    settings = Settings(threat=WIDE, preset=preset, interpreters=("cam",), batch_size=4)
    rows = run(small, ImageSet(aims[0]), settings, tmp_path).rows
    plain, adv2 = (next(row for row in rows if row["attack"] == kind) for kind in ("pgd", "adv2"))
    assert plain["gradient_evaluations"] == 40 and 1 < adv2["gradient_evaluations"] < 35


def test_restarts_add_up(small, aims):
    x, targets, maps = aims
    once, twice = (
        attack(
            small,
            x,
            targets,
            maps,
            interpreter="cam",
            preset="auto",
            threat=WIDE,
            steps=20,
            restarts=n,
        )
        for n in (1, 2)
    )
    assert (twice.work >= once.work + 1).all()
    near = [metrics.map_l1(one.maps, maps) for one in (once, twice)]
    assert (near[1] <= near[0] + 1e-6).all()
