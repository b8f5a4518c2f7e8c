"""Training: what a step does against plain arithmetic, and the embedded network."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adv2_jax
from adv2_jax import models
from adv2_jax.data import shapes
from adv2_jax.experiments import train

OPTIONS = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "shift": 1}


class Tiny(nnx.Module):
    """One convolution, BatchNorm and a linear layer, for images of any size."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def features(self, image, act=nnx.relu):
        return act(self.bn(self.conv(image)))

    def head(self, features):
        return self.linear(features.mean((-3, -2)))


@pytest.fixture(scope="module")
def model():
    return Tiny(nnx.Rngs(0))


@pytest.fixture(scope="module")
def coloured():
    """64 noisy images; the class is the channel that is a little brighter than the others."""
    labels = np.arange(64) % 3
    images = np.random.default_rng(0).integers(0, 156, (64, 8, 8, 3), np.uint8)
    images[range(64), :, :, labels] += 60
    return images, labels


@pytest.fixture(scope="module")
def trained(model, coloured):
    return train.train_classifier(model, *coloured, **{**OPTIONS, "epochs": 15})


def test_training_lowers_the_loss(trained, coloured):
    network, losses = trained
    assert losses.shape == (60,) and losses.dtype == np.float32
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    assert train.accuracy(network, *coloured) == 1


def test_training_returns_a_copy_of_the_same_structure(model, trained):
    assert jax.tree.structure(trained[0]) == jax.tree.structure(model)
    np.testing.assert_array_equal(model.bn.mean[...], np.zeros(4))
    assert np.abs(trained[0].conv.kernel[...] - model.conv.kernel[...]).max() > 0.01


def test_trained_network_sees_an_image_alone_as_in_a_batch(trained, coloured):
    images = jnp.asarray(coloured[0][:8]) / 255
    alone = jnp.stack([trained[0].features(image) for image in images])
    np.testing.assert_allclose(trained[0].features(images), alone, atol=1e-5)


def test_first_step_averages_the_statistics_of_its_batch(model):
    column = np.random.default_rng(0).integers(0, 256, (8, 16, 1, 3), np.uint8)
    images = np.repeat(column, 16, axis=2)  # mirroring changes nothing
    stepped, _ = train.train_classifier(model, images, np.arange(8) % 3, epochs=1, batch_size=8, shift=0)
    before_norm = model.conv(images / np.float32(255))
    np.testing.assert_allclose(stepped.bn.mean[...], 0.1 * before_norm.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stepped.bn.var[...], 0.9 + 0.1 * before_norm.var((0, 1, 2)), rtol=1e-4)


def test_same_arguments_give_the_same_weights(model, coloured):
    first, again, other = (train.train_classifier(model, *coloured, seed=seed, **OPTIONS)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_progress_is_reported_after_every_step(model, coloured):
    seen = []
    _, losses = train.train_classifier(model, *coloured, on_step=lambda step, loss: seen.append((step, loss)), **OPTIONS)
    assert seen == [(k + 1, loss) for k, loss in enumerate(losses)]


def test_weight_decay_spares_biases_and_scales():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimiser = train._optimiser(learning_rate=0.1, weight_decay=0.5, steps=10)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_augmented_images_are_shifts_and_mirror_images():
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 6, 3), np.uint8)
    augmented = train._augment(np.random.default_rng(1), images, shift=1)
    kinds = set()
    for image, result in zip(images, augmented, strict=True):
        for rows in (-1, 0, 1):
            for columns in (-1, 0, 1):
                shifted = image[np.clip(np.arange(5) + rows, 0, 4)][:, np.clip(np.arange(6) + columns, 0, 5)]
                kinds |= {(rows, columns, 1)} if (result == shifted).all() else set()
                kinds |= {(rows, columns, -1)} if (result == shifted[:, ::-1]).all() else set()
    assert augmented.dtype == np.uint8
    assert {kind[0] for kind in kinds} == {kind[1] for kind in kinds} == {-1, 0, 1}
    assert {kind[2] for kind in kinds} == {-1, 1}


def test_an_epoch_shows_every_image_once():
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    batches = list(train._batches(images, np.arange(12), epochs=2, batch_size=4, shift=0, seed=0))
    assert len(batches) == 6
    for epoch in (batches[:3], batches[3:]):
        seen = np.concatenate([labels for _, labels in epoch])
        assert sorted(seen) == list(range(12)) and list(seen) != list(range(12))
    assert all((batch.ravel() == labels).all() for batch, labels in batches)


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
    assert train.accuracy(Brightest(), images, np.array([0, 1, 2, 0, 0, 0, 1]), batch_size=batch_size) == 4 / 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 8, 8, 3))}, r"images must be uint8 \[N, H, W, 3\], got float64 \[4, 8, 8, 3\]"),
        ({"images": np.zeros((8, 8, 3), np.uint8)}, r"got uint8 \[8, 8, 3\]"),
        ({"labels": np.zeros(3, int)}, "one label an image, got 3 for 4 images"),
        ({"labels": np.array([0, 1, 2, 10])}, r"labels must lie in 0\.\.2, the model's classes, got 0\.\.10"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative, got -1.0"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"shift": -1}, "shift must be at least 0, got -1"),
        ({"batch_size": 5}, r"batch_size must lie in 1\.\.4, the number of images, got 5"),
    ],
)
def test_wrong_arguments_are_named(model, change, message):
    arguments = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.zeros(4, int), "batch_size": 2, **change}
    with pytest.raises(ValueError, match=message):
        train.train_classifier(model, **arguments)


def test_embedded_network_recognises_fresh_scenes():
    model = models.load("cifar_resnet20", Path(adv2_jax.__file__).parent / "weights" / "shapes_resnet20.npz")
    fresh = shapes.generate(200, seed=2)
    assert train.accuracy(model, fresh.images, fresh.labels) >= 0.95
