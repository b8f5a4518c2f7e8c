"""Target maps: patches that are figures, and images of the right class. Random streams of the seed."""

import numpy as np
import pytest

from adv2_jax.data import shapes, targets

SIZES = [(7, 7), (8, 8), (14, 10), (32, 32), (56, 56)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("index", range(12))
def test_patches_are_one_filled_convex_figure(shape, index):
    m = targets.patch(shape, seed=5, index=index)
    assert m.dtype == np.float32 and m.shape == shape and set(np.unique(m)) == {0, 1}
    for lines in (m, m.T):  # convex: what is inside of a line hangs together
        for line in lines:
            inside = np.flatnonzero(line)
            assert len(inside) == 0 or np.ptp(inside) + 1 == len(inside)
    np.testing.assert_array_equal(m, targets.patch(shape, seed=5, index=index))


def test_patches_are_the_same_figure_at_every_size():
    for index in range(12):
        large, small = (targets.patch((size, size), seed=1, index=index) for size in (96, 24))
        share = large.reshape(24, 4, 24, 4).mean((1, 3))
        assert (small[share == 1] == 1).all() and (small[share == 0] == 0).all()


def test_patches_differ_by_seed_and_image_and_are_circles_and_rectangles():
    patches = {
        (seed, i): targets.patch((64, 64), seed=seed, index=i) for seed in (0, 1) for i in range(20)
    }
    assert len({m.tobytes() for m in patches.values()}) == 40

    def round_(m):
        y, x = np.nonzero(m)
        radius = np.sqrt(len(x) / np.pi)
        return np.hypot(y - y.mean(), x - x.mean()).max() < 1.08 * radius

    # a square's corner is at 1.25 radii of the circle of its area
    assert 8 <= sum(map(round_, patches.values())) <= 32


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 5)])
def test_the_smallest_maps_still_show_something(shape):
    assert all(targets.patch(shape, seed=0, index=i).max() == 1 for i in range(20))


LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])


def test_donors_have_the_target_class_and_do_not_depend_on_who_else_is_attacked():
    classes = (LABELS + 1) % 3
    indices = np.arange(10)
    donors = targets.donors(LABELS, classes, indices, seed=7)
    np.testing.assert_array_equal(LABELS[donors], classes)
    assert (donors != indices).all()
    some = np.array([1, 4, 9])
    np.testing.assert_array_equal(targets.donors(LABELS, classes[some], some, seed=7), donors[some])
    drawn = np.array([targets.donors(LABELS, classes, indices, seed=seed)[0] for seed in range(40)])
    assert set(drawn) == {1, 4, 7}  # every image of class 1


def test_a_class_without_images_is_named():
    with pytest.raises(
        ValueError,
        match=r"^no image of target class 3 \(cat\) among the 10 images read: it has no map to show$",
    ):
        targets.donors(LABELS, np.array([3]), np.array([0]), classes=("ant", "bee", "cow", "cat"))


def test_every_use_of_a_seed_has_a_stream_of_its_own(monkeypatch):
    """Scene i of the embedded set, the target class, the donor and the patch of image i begin with different numbers."""
    made, default_rng = [], np.random.default_rng

    def noted(entropy):
        made.append(tuple(np.random.SeedSequence(entropy).generate_state(4)))
        return default_rng(entropy)

    monkeypatch.setattr(np.random, "default_rng", noted)
    shapes.generate(2, seed=1, size=32)
    targets.random_targets(np.zeros(2, int), 10, seed=1)
    targets.donors(LABELS, np.array([0, 0]), np.array([0, 1]), seed=1)
    for index in (0, 1):
        targets.patch((4, 4), seed=1, index=index)
    assert len(made) == len(set(made)) == 8
