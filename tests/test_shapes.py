"""The embedded image set: what depends on what, outlines against plain geometry, and no class told by colour."""

import numpy as np
import pytest

from adv2_jax.data import shapes


def shoelace(corners):
    a, b = np.asarray(corners), np.roll(corners, -1)
    return abs(np.sum(a.real * b.imag - b.real * a.imag)) / 2


def lens(r, s, d):
    """Area that discs of radii r and s share when their centres are d apart."""
    corner_r, corner_s = (
        np.arccos((d * d + r * r - s * s) / (2 * d * r)),
        np.arccos((d * d + s * s - r * r) / (2 * d * s)),
    )
    return r * r * (corner_r - np.sin(2 * corner_r) / 2) + s * s * (
        corner_s - np.sin(2 * corner_s) / 2
    )


STAR = [np.exp(2j * np.pi * k / 10) * (1 if k % 2 == 0 else 0.42) for k in range(10)]
ARROW = [1, 0.1 + 0.75j, 0.1 + 0.26j, -0.95 + 0.26j, -0.95 - 0.26j, 0.1 - 0.26j, 0.1 - 0.75j]
HOURGLASS = [0.8 + 0.6j, 0.12j, -0.8 + 0.6j, -0.8 - 0.6j, -0.12j, 0.8 - 0.6j]
AREAS = {
    "disc": np.pi * 0.85**2,
    "ring": np.pi * (0.95**2 - 0.55**2),
    "square": 1.44**2,
    "triangle": 3 * 3**0.5 / 4,
    "star": shoelace(STAR),
    "cross": 2 * 1.9 * 0.56 - 0.56**2,
    "crescent": np.pi - lens(1, 0.8, 0.5),
    "arrow": shoelace(ARROW),
    "heart": 1.08**2 + np.pi * 0.54**2,
    "hourglass": shoelace(HOURGLASS),
}


@pytest.fixture(scope="module")
def scenes():
    return shapes.generate(200, seed=5)


def test_layout(scenes):
    assert scenes.images.shape == (200, 64, 64, 3) and scenes.images.dtype == np.uint8
    assert scenes.objects.shape == (200, 64, 64) and scenes.objects.dtype == np.bool_
    assert scenes.labels.dtype == np.int32
    assert np.bincount(scenes.labels).tolist() == [20] * len(shapes.CLASSES)


def test_a_scene_depends_on_seed_and_index_only(scenes):
    some, every = shapes.generate(12, seed=5, start=13), scenes.take(np.arange(13, 25))
    for key in ("images", "labels", "objects"):
        np.testing.assert_array_equal(getattr(some, key), getattr(every, key))


def test_scenes_and_seeds_differ(scenes):
    other = shapes.generate(10, seed=6)
    images = np.concatenate([scenes.images[:20], other.images]).reshape(30, -1)
    assert len(np.unique(images, axis=0)) == 30
    assert (np.abs(np.diff(images.astype(int), axis=0)).mean(-1) > 10).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", shapes.CLASSES)
def test_outline_has_the_area_of_plain_geometry(name):
    axis = np.linspace(-1.2, 1.2, 301)
    inside = shapes._SHAPES[name](axis + 1j * axis[:, None]) < 0
    assert inside.sum() * 0.008**2 == pytest.approx(AREAS[name], rel=0.02)
    assert not inside[np.hypot(axis, axis[:, None]) > 1.02].any()


def test_polygon_distance_is_that_to_the_nearest_point_of_its_outline():
    axis = np.linspace(-1.2, 1.2, 24)
    z = axis + 1j * axis[:, None]
    t = np.linspace(0, 1, 2000)
    outline = np.concatenate(
        [a + (b - a) * t for a, b in zip(ARROW, np.roll(ARROW, -1), strict=True)]
    )
    nearest = np.abs(z[..., None] - outline).min(-1)
    np.testing.assert_allclose(np.abs(shapes._SHAPES["arrow"](z)), nearest, atol=1e-3)


@pytest.mark.parametrize("index", range(10))
def test_mask_is_one_object_of_its_class_at_any_resolution(index):
    coarse, fine = (
        shapes.generate(1, seed=1, start=index, size=size).objects[0] for size in (64, 128)
    )
    radius = (fine.mean() / AREAS[shapes.CLASSES[index]]) ** 0.5
    assert shapes.RADIUS[0] < radius < shapes.RADIUS[1]
    assert coarse.mean() == pytest.approx(fine.mean(), rel=0.05)


def test_object_stands_out_from_what_surrounds_it(scenes):
    brightness = scenes.images.max(-1) / 255.0
    for value, mask in zip(brightness, scenes.objects, strict=True):
        # the two ranges of values are .05 apart
        assert abs(value[mask].mean() - np.median(value[~mask])) > 0.04


def test_colour_does_not_tell_the_class(scenes):
    colours = np.array(
        [image[mask].mean(0) for image, mask in zip(scenes.images, scenes.objects, strict=True)]
    )
    centres = np.array([colours[:100][scenes.labels[:100] == c].mean(0) for c in range(10)])
    guesses = np.abs(colours[100:, None] - centres).sum(-1).argmin(-1)
    assert (guesses == scenes.labels[100:]).mean() < 0.25


def away_from(pixels):
    """How far every pixel is from the nearest of some."""
    at = np.argwhere(pixels)
    return np.hypot(*(np.indices(pixels.shape)[..., None] - at.T[:, None, None])).min(-1)


@pytest.mark.slow
def test_plain_scenes_show_the_object_and_hide_other_places_under_one_colour(scenes):
    mixed = shapes.generate(60, seed=5, plain=0.3)
    np.testing.assert_array_equal(mixed.objects, scenes.objects[:60])
    changed = np.flatnonzero((mixed.images != scenes.images[:60]).any((1, 2, 3)))
    assert 10 < len(changed) < 30
    shares = []
    for i in changed:
        image, before, mask = mixed.images[i].astype(int), scenes.images[i], mixed.objects[i]
        # beyond a soft edge of 5 pixels about the outline, and one pixel of rounding
        inner = away_from(~mask) > 4
        np.testing.assert_array_equal(image[inner], before[inner])
        far = away_from(mask) > 64 / 8 + 4
        hidden = far & (image != before).any(-1)
        if hidden.sum() > 400:  # of less, most may be edge
            colours = image[hidden]
            spread = np.median(np.abs(colours - np.median(colours, 0)), 0)
            assert (spread < 0.08 * 255).all()  # of noise of .1: .067
        shares.append(hidden.sum() / far.sum())
    assert min(shares) < 0.2 and max(shares) > 0.8  # patches and windows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 1, "seed": -1}, "seed must be at least 0, got -1"),
        ({"n": 1, "size": 16}, "size must be at least 32, got 16"),
        ({"n": 1, "start": -3}, "start must be at least 0, got -3"),
        ({"n": 1, "plain": 1.5}, r"plain must lie in \[0, 1\], got 1.5"),
        ({"n": 1, "plain": float("nan")}, r"plain must lie in \[0, 1\], got nan"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        shapes.generate(**options)
