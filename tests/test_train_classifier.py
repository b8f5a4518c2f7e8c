"""Training a classifier, the sets it is trained on, and the embedded network."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import adv2_jax
from adv2_jax import models
from adv2_jax.data import ImageSet, shapes, splits
from adv2_jax.training import classifier as train
from adv2_jax.training.loop import Checkpointing

OPTIONS = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "shift": 1}


@pytest.fixture(scope="module")
def model(normed):
    return normed


def test_training_lowers_the_loss(model, coloured):
    network, losses = train.train_classifier(model, *coloured, **{**OPTIONS, "epochs": 15})
    assert losses.shape == (60,) and losses.dtype == np.float32
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    assert train.accuracy(network, *coloured) == 1


def test_the_loss_is_cross_entropy_with_smoothed_labels(model, coloured):
    images, labels = (array[:16] for array in coloured)
    _, losses = train.train_classifier(
        model, images, labels, epochs=1, batch_size=16, shift=0, mirror=False, smoothing=0.2
    )
    z = model.conv(images / np.float32(255))
    normal = (z - z.mean((0, 1, 2))) / np.sqrt(z.var((0, 1, 2)) + 1e-5)
    logits = np.asarray(model.head(nnx.relu(normal)), float)
    log_f = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    q = np.where(np.arange(3) == labels[:, None], 0.8, 0.1)
    np.testing.assert_allclose(losses[0], -(q * log_f).sum(-1).mean(), rtol=1e-5)


class Brightest(nnx.Module):
    """Classifier whose logits are the mean colours of the image."""

    def features(self, image, act=None):
        return image

    def head(self, features):
        return features.mean((-3, -2))


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_accuracy_counts_right_answers(batch_size):
    images = np.zeros((7, 4, 4, 3), np.uint8)
    images[range(7), :, :, [0, 1, 2, 0, 1, 2, 0]] = 200
    assert (
        train.accuracy(Brightest(), images, np.array([0, 1, 2, 0, 0, 0, 1]), batch_size=batch_size)
        == 4 / 7
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": np.array([0, 1, 2, 10])},
            r"labels must lie in 0\.\.2, the model's classes, got 0\.\.10",
        ),
        ({"batch_size": 5}, r"batch_size must lie in 1\.\.4, the number of images, got 5"),
        ({"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1.0"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"checkpointing": Checkpointing(resume=True)}, "resume needs checkpoints"),
    ],
)
def test_wrong_arguments_are_named(model, change, message):
    arguments = {
        "images": np.zeros((4, 8, 8, 3), np.uint8),
        "labels": np.zeros(4, int),
        "batch_size": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        train.train_classifier(model, **arguments)


def test_the_head_alone_is_trained(model, coloured):
    images, labels = coloured
    network, losses = train.train_classifier(model, images, labels, head_only=True, **OPTIONS)
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, network))
    changed = {path for path in before if (before[path][...] != after[path][...]).any()}
    assert changed == {("linear", "kernel"), ("linear", "bias")}
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="the head of Brightest has no parameters"):
        train.train_classifier(Brightest(), images, labels, head_only=True, **OPTIONS)


@pytest.mark.slow
def test_a_head_is_known_by_what_it_reads():
    class Wide(nnx.Module):
        def __init__(self, rngs):
            self.z_features = nnx.Linear(3, 5, rngs=rngs)
            self.classifier = nnx.List(
                [
                    nnx.Linear(5, 4, rngs=rngs),
                    nnx.LayerNorm(4, rngs=rngs),
                    nnx.Linear(4, 3, rngs=rngs),
                ]
            )

        def features(self, image, act=nnx.relu):
            return act(self.z_features(image))

        def head(self, features):
            first, norm, last = self.classifier
            return last(norm(first(features.mean((-3, -2)))))

    model = Wide(nnx.Rngs(0))
    chosen = train._read_by_head(model, np.zeros((4, 4, 3), np.uint8))
    assert {path[:2] for path, _ in nnx.to_flat_state(nnx.state(model, chosen))} == {
        ("classifier", i) for i in range(3)
    }
    assert len(jax.tree.leaves(nnx.state(model, chosen))) == 6


@pytest.fixture
def sources(monkeypatch):
    """Image sets by name, for `load`; every call of it is noted."""
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)
    labels = np.arange(20, dtype=np.int32) % 4
    named = {
        "plain": ImageSet(images, labels),
        "few": ImageSet(images[:9], labels[:9]),
        "more": ImageSet(images, labels + 3),
        "animals": ImageSet(images, labels, classes=("ant", "bee", "cat", "dog", "elk")),
        "others": ImageSet(images, labels, classes=("ant", "bee", "cow", "dog", "elk")),
        "longer": ImageSet(images, labels, classes=("ant", "bee", "cat", "dog", "elk", "fox")),
        "unlabelled": ImageSet(images, None),
    }
    calls = []

    def load(source, **options):
        calls.append((source, options))
        return named["plain" if source.startswith("shapes") else source]

    monkeypatch.setattr(splits, "load", load)
    return calls


def test_a_tenth_is_held_out(sources):
    sets = splits.training_sets("plain", seed=1, size=4, sample=None)
    parts = [set(part.images[:, 0, 0, 0]) for part in sets[:2]]
    assert len(sets.held_out.images) == len(parts[1]) == 2 and parts[0] | parts[1] == set(range(20))
    assert all((part.images[:, 0, 0, 0] % 4 == part.labels).all() for part in sets[:2])
    assert set(splits.training_sets("plain", seed=2).held_out.images[:, 0, 0, 0]) != parts[1]
    assert sources[0] == ("plain", {"seed": 1, "size": 4, "sample": None})


def test_a_source_of_its_own_is_held_out(sources):
    sets = splits.training_sets("few", held_out="more", seed=1, size=4)
    assert (len(sets.train.images), len(sets.held_out.images)) == (9, 20)
    assert sources == [("few", {"seed": 1, "size": 4}), ("more", {"seed": 1, "size": 4})]


def test_shapes_hold_out_scenes_of_another_seed(sources, monkeypatch):
    # as small as those of the other sources
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    scenes = ImageSet(images, np.arange(10, dtype=np.int32), classes=shapes.CLASSES)
    monkeypatch.setattr(
        shapes, "generate", lambda n, seed, plain: {(8000, 0, 0.3): scenes}[n, seed, plain]
    )
    sets = splits.training_sets("shapes", plain=0.3, size=None)
    np.testing.assert_array_equal(sets.train.images, scenes.images)
    assert (sources[0][0], sets.num_classes, sets.classes) == ("shapes:2000", 10, shapes.CLASSES)
    assert splits.training_sets("shapes", held_out="plain", plain=0.3) and sources[1][0] == "plain"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("plain", None, 4),
        ("plain", "more", 7),
        ("more", "plain", 7),
        ("animals", None, 5),
        ("plain", "animals", 5),
    ],
)
def test_classes_are_counted(sources, first, second, expected):
    assert splits.training_sets(first, held_out=second).num_classes == expected


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("few", None, "few holds 9 images; training needs at least 10"),
        ("unlabelled", None, "unlabelled has no labels"),
        ("plain", "unlabelled", "unlabelled has no labels"),
        (
            "animals",
            "others",
            "others must have the classes of animals: class 2 is 'cow', not 'cat'",
        ),
        ("animals", "longer", "class 5 is 'fox', not None"),
        ("shapes:50", None, "scenes held out for attacks"),
    ],
)
def test_sets_that_cannot_be_trained_on_are_named(sources, first, second, message):
    with pytest.raises(ValueError, match=message):
        splits.training_sets(first, held_out=second)


def test_shapes_take_no_options(sources):
    with pytest.raises(
        ValueError, match="the embedded set is trained on as it is, without size, sample"
    ):
        splits.training_sets("shapes", size=32, labels=None, sample=5)


@pytest.mark.slow
def test_embedded_network_recognises_fresh_scenes():
    model = models.load(
        "cifar_resnet20", Path(adv2_jax.__file__).parent / "weights" / "shapes_resnet20.npz"
    )
    fresh = shapes.generate(200, seed=2)
    assert train.accuracy(model, fresh.images, fresh.labels) >= 0.95


def test_sets_of_two_sizes_are_refused(monkeypatch):
    sizes = {"a": 8, "b": 16}
    monkeypatch.setattr(
        splits,
        "load",
        lambda name, **_: ImageSet(
            np.zeros((10, sizes[name], sizes[name], 3), np.uint8), np.arange(10) % 2
        ),
    )
    with pytest.raises(
        ValueError, match="images of a and b differ in size, 8x8 and 16x16; --size makes them one"
    ):
        splits.training_sets("a", held_out="b")
