"""Which images a run takes, and which networks it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adv2_jax.data import ImageSet
from adv2_jax.runs.select import _p_value, select


class Mean(nnx.Module):
    """Logits are the mean red, green and blue of the image: what it gets right is known."""

    def features(self, image, act=None):
        return image

    def head(self, features):
        return 10 * features.mean(axis=(0, 1))


def coloured(channels, labels=None):
    """Images of which one colour channel is a little brighter."""
    images = np.full((len(channels), 4, 4, 3), 100, np.uint8)
    images[range(len(channels)), :2, :2, channels] = 140
    return ImageSet(images, None if labels is None else np.array(labels, np.int32))


def test_images_the_network_gets_wrong_are_left_out_and_counted():
    images = coloured([0, 1, 2, 0, 1], [0, 2, 2, 0, 1])
    selection = select(Mean(), images)
    np.testing.assert_array_equal(selection.indices, [0, 2, 3, 4])
    assert (selection.left_out, selection.num_classes) == (1, 3)
    limited = select(Mean(), images, limit=2)
    np.testing.assert_array_equal(limited.indices, [0, 2])
    assert limited.left_out == 1
    np.testing.assert_array_equal(limited.images.labels, [0, 2])


def test_nothing_right_is_refused():
    with pytest.raises(
        ValueError,
        match=r"none of the 2 images right: nothing to attack; the order of its classes may be another",
    ):
        select(Mean(), coloured([0, 1], [1, 0]))
    with pytest.raises(
        ValueError, match=r"none of the 2 images right: nothing to attack; sort the classes$"
    ):
        select(Mean(), coloured([0, 1], [1, 0])._replace(advice="sort the classes"))


def test_a_network_that_cannot_take_the_images_is_refused():
    class Flat(Mean):
        def head(self, features):
            return features.reshape(7, -1) @ jnp.zeros((3, 2))

    with pytest.raises(ValueError, match=r"Flat\.head cannot take features of \[4, 4, 3\]"):
        select(Flat(), coloured([0], [0]))


def test_logits_that_are_not_finite_are_refused():
    class Broken(Mean):
        def head(self, features):
            return jnp.log(-1 - features).mean(axis=(0, 1))

    with pytest.raises(ValueError, match="not finite"):
        select(Broken(), coloured([0], [0]))


def test_probabilities_in_place_of_logits_are_refused():
    class Softmax(Mean):
        def head(self, features):
            return jax.nn.softmax(super().head(features))

    with pytest.raises(ValueError, match="head gives probabilities"):
        select(Softmax(), coloured([0, 1], [0, 1]))


def test_unlabelled_images_get_the_network_s_own_prediction():
    selection = select(Mean(), coloured([2, 0, 1, 1]), limit=3)
    np.testing.assert_array_equal(selection.images.labels, [2, 0, 1])
    assert selection.left_out == 0


class Trained(Mean):
    """Right on images that lie within a range; all others are of class 0."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def head(self, features):
        fits = (abs(features.min() - self.low) < 0.3) & (abs(features.max() - self.high) < 0.3)
        return jnp.where(fits, super().head(features), jnp.array([2.0, 0.0, 0.0]))


def extreme(channels):
    """Colours from 0 to 255, so that the range of the pixels is known."""
    image_set = coloured(channels, channels)
    image_set.images[:, 2:, 2:] = 0
    image_set.images[range(len(channels)), :2, :2, channels] = 255
    return image_set


@pytest.mark.parametrize(
    ("low", "high", "name"),
    [
        (0, 255, "0..255"),
        (-1, 1, "-1..1"),
        (-2.12, 2.43, "ImageNet's mean 0 and standard deviation 1"),
    ],
)
def test_a_network_trained_on_another_range_is_refused(low, high, name):
    # few: none right, a majority with the other range; many: a sign test
    few, many = ([1, 2, 1, 2], [0, 0, 0] + [1, 2] * 6)
    with pytest.raises(
        ValueError,
        match=f"4 of 4 images right when they are scaled to {name}, 0 in .0, 1.: features must",
    ):
        select(Trained(low, high), extreme(few))
    with pytest.raises(
        ValueError, match=f"15 of 15 images right when they are scaled to {name}, 3 in .0, 1."
    ):
        select(Trained(low, high), extreme(many))


class Two(Mean):
    """Two classes, red and green."""

    def head(self, features):
        return super().head(features)[:2]


def swapped(labels):
    return 1 - np.array(labels)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 1], [0, 1] * 12, [0] * 9 + [1] * 14])
def test_two_classes_in_the_other_order_are_told(labels):
    n = len(labels)
    with pytest.raises(
        ValueError,
        match=f"none of the {n} images right, but {n} with the two classes swapped: .* order",
    ):
        select(Two(), coloured(labels, swapped(labels)))


def test_a_network_that_is_right_on_one_of_the_swapped_is_refused_too():
    labels = [0, 1] * 12
    wrong = swapped(labels)
    wrong[3] = labels[3]
    with pytest.raises(
        ValueError, match="1 of the 24 images right, but 23 with the two classes swapped"
    ):
        select(Two(), coloured(labels, wrong))


@pytest.mark.parametrize(("shift", "word"), [(1, "lower"), (-1, "higher")])
def test_labels_that_count_from_another_number_are_told(shift, word):
    labels = np.tile([1], 3).tolist() + [0, 1] * 3 if shift == 1 else [1, 2] * 4 + [2]
    with pytest.raises(
        ValueError,
        match=f"none of the 9 images right, but 9 with labels one {word}: labels must count from 0",
    ):
        select(Mean(), coloured(labels, np.array(labels) + shift))


class Guess(Mean):
    """Right in [0, 1]; of any other range it takes one class for all."""

    def head(self, features):
        fits = (features.min() > -0.01) & (features.max() < 1.01)
        return jnp.where(
            fits, super().head(features)[jnp.array([1, 0, 2])], jnp.array([2.0, 0.0, 0.0])
        )


@pytest.mark.parametrize("labels", [[0, 1, 2] * 8, [0, 1, 2, 0], [0], [1] * 24, [0] * 20 + [1] * 2])
def test_wrong_labels_are_not_blamed_on_the_range(labels, caplog):
    """Classes 0 and 1 are swapped: a network that guesses class 0 does better, and not well."""
    image_set = extreme(labels)
    try:
        select(Guess(), image_set)
    except ValueError as error:
        assert f"none of the {len(labels)} images right" in str(error) and "order" in str(error)
        assert 2 not in labels
    else:
        assert 2 in labels and "order of its classes" in caplog.messages[0]


def test_images_of_every_class_are_tried_on_other_ranges():
    with pytest.raises(
        ValueError, match=r"50 of 50 images right when they are scaled to 0\.\.255, 25 in .0, 1."
    ):
        select(Trained(0, 255), extreme([0] * 50 + [1] * 50))


def test_a_weak_network_is_not_refused_for_its_range():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 4, 4, 3), np.uint8)
    selection = select(Mean(), ImageSet(images, rng.integers(0, 3, 60).astype(np.int32)))
    assert 0 < selection.left_out < 60


def test_sign_test_against_all_outcomes():
    outcomes = [bin(i).count("1") for i in range(2**7)]
    for gained in range(8):
        assert _p_value(gained, 7) == np.mean(np.array(outcomes) >= gained)


def test_indices_are_places_in_the_source():
    image_set = coloured([0, 1, 2, 0], [0, 2, 2, 0])._replace(
        positions=np.array([3, 5, 8, 9], np.int32)
    )
    np.testing.assert_array_equal(select(Mean(), image_set).indices, [3, 8, 9])
    np.testing.assert_array_equal(select(Mean(), image_set, limit=2).indices, [3, 8])
