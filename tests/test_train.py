"""Training: what a step does against plain arithmetic, runs that are stopped and resumed, and the embedded network."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adv2_jax
from adv2_jax import models
from adv2_jax.data import ImageSet, shapes
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


def colours():
    """64 noisy images; the class is the channel that is a little brighter than the others."""
    labels = np.arange(64) % 3
    images = np.random.default_rng(0).integers(0, 156, (64, 8, 8, 3), np.uint8)
    images[range(64), :, :, labels] += 60
    return images, labels


@pytest.fixture(scope="module")
def coloured():
    return colours()


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


@pytest.mark.parametrize("mirror", [True, False])
def test_augmented_images_are_shifts_and_mirror_images(mirror):
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 6, 3), np.uint8)
    (draw,) = train._draws(40, train.Recipe(epochs=1, batch_size=40, shift=1, mirror=mirror))
    augmented = train._augment(images, draw)
    kinds = set()
    for image, result in zip(images[draw.chosen], augmented, strict=True):
        for rows in (-1, 0, 1):
            for columns in (-1, 0, 1):
                shifted = image[np.clip(np.arange(5) + rows, 0, 4)][:, np.clip(np.arange(6) + columns, 0, 5)]
                kinds |= {(rows, columns, 1)} if (result == shifted).all() else set()
                kinds |= {(rows, columns, -1)} if (result == shifted[:, ::-1]).all() else set()
    assert augmented.dtype == np.uint8 and augmented.shape == images.shape
    assert {kind[0] for kind in kinds} == {kind[1] for kind in kinds} == {-1, 0, 1}
    assert {kind[2] for kind in kinds} == ({-1, 1} if mirror else {1})


def test_an_epoch_shows_every_image_once():
    draws = list(train._draws(14, train.Recipe(epochs=2, batch_size=4)))
    assert len(draws) == 6
    epochs = [np.concatenate([draw.chosen for draw in epoch]) for epoch in (draws[:3], draws[3:])]
    assert all(len(set(epoch)) == 12 and set(epoch) < set(range(14)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1]) and sorted(epochs[0]) != list(epochs[0])


def test_a_batch_has_the_labels_of_its_images(model, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "_make_step", lambda *_: lambda state, images, labels: (state, seen.append((images, labels)) or 0.0))
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)
    train.train_classifier(model, images, np.arange(12) % 3, epochs=1, batch_size=4)
    assert len(seen) == 3 and all((batch[:, 0, 0, 0] % 3 == labels).all() for batch, labels in seen)


def test_random_numbers_are_those_of_the_shipped_weights():
    _, draw, *_ = train._draws(6, train.Recipe(epochs=2, batch_size=3))
    expected = {"chosen": [4, 0, 1], "down": [1, -2, 3], "right": [2, -4, -1], "mirrored": [True, False, True]}
    assert {key: value.tolist() for key, value in draw._asdict().items()} == expected


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
        ({"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.zeros(0, int)}, r"got uint8 \[0, 8, 8, 3\]"),
        ({"labels": np.zeros(3, int)}, r"labels must be integers \[4\], one an image, got int64 \[3\]"),
        ({"labels": np.zeros(4)}, r"got float64 \[4\]"),
        ({"labels": np.array([0, 1, 2, 10])}, r"labels must lie in 0\.\.2, the model's classes, got 0\.\.10"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative, got -1.0"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"shift": -1}, "shift must be at least 0, got -1"),
        ({"batch_size": 5}, r"batch_size must lie in 1\.\.4, the number of images, got 5"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"resume": True}, "resume needs checkpoints"),
    ],
)
def test_wrong_arguments_are_named(model, change, message):
    arguments = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.zeros(4, int), "batch_size": 2, **change}
    with pytest.raises(ValueError, match=message):
        train.train_classifier(model, **arguments)


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_at(k):
    def on_step(step, loss):
        if step == k:
            raise Stop

    return on_step


@pytest.fixture
def stopped(model, coloured, tmp_path):
    """The folder of a run of 8 steps that was stopped at the sixth."""
    with pytest.raises(Stop):
        train.train_classifier(model, *coloured, checkpoints=tmp_path / "run", on_step=stop_at(6), **OPTIONS)
    return tmp_path / "run"


def same(one, other):
    """Whether two networks have the same weights, bit for bit."""
    pairs = zip(*(jax.tree.leaves(nnx.state(network)) for network in (one, other)), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize("every", [1, 3, 5])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(model, coloured, tmp_path, every):
    network, losses = train.train_classifier(model, *coloured, **OPTIONS)
    run = {"checkpoints": tmp_path / "run", "checkpoint_every": every, **OPTIONS}
    with pytest.raises(Stop):
        train.train_classifier(model, *coloured, on_step=stop_at(6), **run)
    seen = []
    resumed, again = train.train_classifier(model, *coloured, resume=True, on_step=lambda *step: seen.append(step), **run)
    assert same(resumed, network) and again.tobytes() == losses.tobytes()
    done = {1: 5, 3: 3, 5: 5}[every]
    assert seen == [(k + 1, losses[k]) for k in range(done, 8)]


def test_a_finished_run_resumes_to_its_result(model, coloured, tmp_path):
    run = {"checkpoints": tmp_path / "run", **OPTIONS}
    network, losses = train.train_classifier(model, *coloured, **run)
    resumed, again = train.train_classifier(model, *coloured, resume=True, on_step=stop_at(8), **run)
    assert same(resumed, network) and (again == losses).all()


def test_one_checkpoint_an_epoch_and_only_the_latest(stopped, model, coloured):
    assert [path.name for path in stopped.iterdir()] == ["4"]
    (stopped / "6.orbax-checkpoint-tmp").mkdir()  # what a kill in the middle of writing leaves
    train.train_classifier(model, *coloured, checkpoints=stopped, resume=True, **OPTIONS)
    assert [path.name for path in stopped.iterdir()] == ["8"]


def test_checkpoints_change_nothing(model, coloured, tmp_path):
    plain = train.train_classifier(model, *coloured, **OPTIONS)
    kept = train.train_classifier(model, *coloured, checkpoints=tmp_path / "run", checkpoint_every=3, **OPTIONS)
    assert same(plain[0], kept[0]) and (plain[1] == kept[1]).all()


KILLED = """
import os, signal, sys
from flax import nnx
sys.path.insert(0, sys.argv[2])
from test_train import OPTIONS, Tiny, colours, train
kill = lambda step, loss: os.kill(os.getpid(), signal.SIGKILL) if step == 6 else None
train.train_classifier(Tiny(nnx.Rngs(0)), *colours(), checkpoints=sys.argv[1], on_step=kill, **OPTIONS)
"""


def test_a_killed_run_resumes(model, coloured, tmp_path):
    program = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(Path(__file__).parent)]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as conftest: other programs round otherwise
    assert subprocess.run(program, env=environment).returncode == -signal.SIGKILL
    resumed, losses = train.train_classifier(model, *coloured, checkpoints=tmp_path / "run", resume=True, **OPTIONS)
    network, expected = train.train_classifier(model, *coloured, **OPTIONS)
    assert same(resumed, network) and losses.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.06}, "other settings: learning_rate was 0.05, is 0.06$"),
        ({"seed": 3, "mirror": False}, "other settings: seed was 0, is 3; mirror was True, is False$"),
    ],
)
def test_a_run_with_other_settings_does_not_resume(stopped, model, coloured, change, message):
    with pytest.raises(ValueError, match=message):
        train.train_classifier(model, *coloured, checkpoints=stopped, resume=True, **{**OPTIONS, **change})


@pytest.mark.parametrize("part", ["initial weights", "images", "labels"])
def test_a_run_on_something_else_does_not_resume(stopped, model, coloured, part):
    images, labels = coloured
    other = {
        "initial weights": (Tiny(nnx.Rngs(1)), images, labels),
        "images": (model, images.swapaxes(1, 2), labels),
        "labels": (model, images, labels[::-1]),
    }
    message = rf"other settings: {part} was (\d+) numbers ([0-9a-f]{{8}}), is \1 numbers (?!\2)[0-9a-f]{{8}}$"
    with pytest.raises(ValueError, match=message):
        train.train_classifier(*other[part], checkpoints=stopped, resume=True, **OPTIONS)


def test_a_run_is_neither_overwritten_nor_made_up(stopped, model, coloured):
    with pytest.raises(ValueError, match=f"{stopped} holds a run at step 4.*--resume.*remove the folder"):
        train.train_classifier(model, *coloured, checkpoints=stopped, **OPTIONS)
    with pytest.raises(ValueError, match=r"nothing to resume: .*/empty holds no checkpoint"):
        train.train_classifier(model, *coloured, checkpoints=stopped / "empty", resume=True, **OPTIONS)
    assert [path.name for path in stopped.iterdir()] == ["4"]


@pytest.mark.parametrize("pattern", ["4/settings/*", "4/state/*"])
def test_a_damaged_checkpoint_is_named(stopped, model, coloured, pattern):
    for path in stopped.glob(pattern):
        path.is_file() and path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*/run/4: ") as refusal:
        train.train_classifier(model, *coloured, checkpoints=stopped, resume=True, **OPTIONS)
    assert "\n" not in str(refusal.value)


def test_divergence_ends_a_run_early_and_is_not_kept(model, coloured, tmp_path):
    seen = []
    options = {**OPTIONS, "epochs": 50, "learning_rate": 1e38, "checkpoints": tmp_path / "run"}
    with pytest.raises(ValueError, match="training diverged by step 4; a lower learning rate than 1e\\+38 may help"):
        train.train_classifier(model, *coloured, on_step=lambda *step: seen.append(step), **options)
    assert len(seen) == 4 and not (tmp_path / "run").exists()


def test_the_host_waits_at_checkpoints_only(model, coloured, monkeypatch):
    class Loss:
        waits = 0

        def __float__(self):
            Loss.waits += 1
            return 0.0

    handed = []
    monkeypatch.setattr(train, "_make_step", lambda *_: lambda state, *batch: (state, handed.append(Loss.waits) or Loss()))
    train.train_classifier(model, *coloured, **OPTIONS)
    assert handed[:4] == [0] * 4 and handed[4:] == [handed[4]] * 4 and handed[4] > 0


def test_the_head_alone_is_trained(model, coloured):
    images, labels = coloured
    network, losses = train.train_classifier(model, images, labels, head_only=True, **OPTIONS)
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, network))
    changed = {path for path in before if (before[path][...] != after[path][...]).any()}
    assert changed == {("linear", "kernel"), ("linear", "bias")}
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="the head of Brightest has no parameters"):
        train.train_classifier(Brightest(), images, labels, head_only=True, **OPTIONS)


def test_a_head_is_known_by_what_it_reads():
    class Wide(nnx.Module):
        def __init__(self, rngs):
            self.z_features = nnx.Linear(3, 5, rngs=rngs)
            self.classifier = nnx.List([nnx.Linear(5, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])

        def features(self, image, act=nnx.relu):
            return act(self.z_features(image))

        def head(self, features):
            first, norm, last = self.classifier
            return last(norm(first(features.mean((-3, -2)))))

    model = Wide(nnx.Rngs(0))
    chosen = train._read_by_head(model, np.zeros((4, 4, 3), np.uint8))
    assert {path[:2] for path, _ in nnx.to_flat_state(nnx.state(model, chosen))} == {("classifier", i) for i in range(3)}
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

    monkeypatch.setattr(train, "load", load)
    return calls


def test_a_tenth_is_held_out(sources):
    sets = train.training_sets("plain", seed=1, size=4, sample=None)
    parts = [set(part.images[:, 0, 0, 0]) for part in sets[:2]]
    assert len(sets.held_out.images) == len(parts[1]) == 2 and parts[0] | parts[1] == set(range(20))
    assert all((part.images[:, 0, 0, 0] % 4 == part.labels).all() for part in sets[:2])
    assert set(train.training_sets("plain", seed=2).held_out.images[:, 0, 0, 0]) != parts[1]
    assert sources[0] == ("plain", {"seed": 1, "size": 4, "sample": None})


def test_a_source_of_its_own_is_held_out(sources):
    sets = train.training_sets("few", held_out="more", seed=1, size=4)
    assert (len(sets.train.images), len(sets.held_out.images)) == (9, 20)
    assert sources == [("few", {"seed": 1, "size": 4}), ("more", {"seed": 1, "size": 4})]


def test_shapes_hold_out_scenes_of_another_seed(sources, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)  # as small as those of the other sources
    scenes = shapes.Scenes(images, np.arange(10, dtype=np.int32), np.zeros((10, 4, 4), bool))
    monkeypatch.setattr(shapes, "generate", lambda n, seed: {(8000, 0): scenes}[n, seed])
    sets = train.training_sets("shapes", size=None)
    np.testing.assert_array_equal(sets.train.images, scenes.images)
    assert (sources[0][0], sets.num_classes, sets.classes) == ("shapes:2000", 10, shapes.CLASSES)
    assert train.training_sets("shapes", held_out="plain") and sources[1][0] == "plain"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("plain", None, 4), ("plain", "more", 7), ("more", "plain", 7), ("animals", None, 5), ("plain", "animals", 5)],
)
def test_classes_are_counted(sources, first, second, expected):
    assert train.training_sets(first, held_out=second).num_classes == expected


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("few", None, "few holds 9 images; training needs at least 10"),
        ("unlabelled", None, "unlabelled has no labels"),
        ("plain", "unlabelled", "unlabelled has no labels"),
        ("animals", "others", "others must have the classes of animals: class 2 is 'cow', not 'cat'"),
        ("animals", "longer", "class 5 is 'fox', not None"),
        ("shapes:50", None, "scenes held out for attacks"),
    ],
)
def test_sets_that_cannot_be_trained_on_are_named(sources, first, second, message):
    with pytest.raises(ValueError, match=message):
        train.training_sets(first, held_out=second)


def test_shapes_take_no_options(sources):
    with pytest.raises(ValueError, match="the embedded set is trained on as it is, without size, sample"):
        train.training_sets("shapes", size=32, labels=None, sample=5)


def test_embedded_network_recognises_fresh_scenes():
    model = models.load("cifar_resnet20", Path(adv2_jax.__file__).parent / "weights" / "shapes_resnet20.npz")
    fresh = shapes.generate(200, seed=2)
    assert train.accuracy(model, fresh.images, fresh.labels) >= 0.95


def test_sets_of_two_sizes_are_refused(monkeypatch):
    sizes = {"a": 8, "b": 16}
    monkeypatch.setattr(
        train, "load", lambda name, **_: ImageSet(np.zeros((10, sizes[name], sizes[name], 3), np.uint8), np.arange(10) % 2)
    )
    with pytest.raises(ValueError, match="images of a and b differ in size, 8x8 and 16x16; --size makes them one"):
        train.training_sets("a", held_out="b")
