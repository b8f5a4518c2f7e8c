"""Sources and target classes. Refused files are in test_cli.py."""

import numpy as np
import pytest

from adv2_jax.data import load, shapes
from adv2_jax.data.targets import random_targets
from adv2_jax.files import write_arrays


def test_shapes_are_the_held_out_scenes():
    images = load("shapes:3")
    scenes = shapes.generate(3, seed=1)
    np.testing.assert_array_equal(images.images, scenes.images)
    np.testing.assert_array_equal(images.objects, scenes.objects)
    assert images.classes == shapes.CLASSES


def test_npz_round_trip_and_take(tmp_path):
    arrays = {
        "images": np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3),
        "labels": np.array([1, 0], np.int64),
        "targets": np.array([0, 1], np.uint8),
        "something": np.zeros(3),
    }
    write_arrays(tmp_path / "set.npz", arrays)
    images = load(str(tmp_path / "set.npz"))
    np.testing.assert_array_equal(images.images, arrays["images"])
    assert images.labels.dtype == images.targets.dtype == np.int32
    assert images.objects is None and images.target_maps is None
    second = images.take(np.array([1]))
    np.testing.assert_array_equal(second.images, arrays["images"][1:])
    np.testing.assert_array_equal(second.targets, [1])


def test_random_targets_are_uniform_over_the_other_classes():
    labels = np.repeat(np.arange(4), 3000)
    targets = random_targets(labels, 4)
    counts = np.array(
        [[np.sum((labels == y) & (targets == t)) for t in range(4)] for y in range(4)]
    )
    assert (np.diag(counts) == 0).all()
    off = counts[~np.eye(4, dtype=bool)]
    assert (
        abs(off - 1000) < 5 * np.sqrt(1000 * 2 / 3)
    ).all()  # five standard deviations of a binomial count


def test_a_target_depends_on_seed_and_position_alone():
    labels = np.array([3, 1, 4, 1, 5])
    every = random_targets(labels, 10, seed=7)
    some = np.array([1, 4])
    np.testing.assert_array_equal(
        random_targets(labels[some], 10, seed=7, indices=some), every[some]
    )
    assert (
        random_targets(np.zeros(50, int), 10, seed=8)
        != random_targets(np.zeros(50, int), 10, seed=7)
    ).any()


def test_one_class_leaves_no_target():
    with pytest.raises(ValueError, match="num_classes = 1 must be at least 2"):
        random_targets(np.zeros(1, int), 1)
