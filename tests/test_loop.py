"""Training, whatever the loss is: what a step does against plain arithmetic, and runs that are stopped and resumed."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Normed
from flax import nnx

from adv2_jax.training import loop as fit
from adv2_jax.training.loop import Checkpointing, Recipe

OPTIONS = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "weight_decay": 0.05, "shift": 1}


def cross_entropy(model, constants, key, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(
        model.head(model.features(images)), labels
    ).mean()


def run(
    model,
    images,
    labels,
    *,
    loss=cross_entropy,
    constants=None,
    trainable=nnx.Param,
    resume=False,
    **options,
):
    """`fit` with checkpointing and recipe as words."""
    checkpointing = Checkpointing(
        resume=resume,
        **{name: options.pop(name) for name in Checkpointing._fields if name in options},
    )
    recipe = Recipe(**{**OPTIONS, **options})
    return fit.fit(
        model, loss, images, labels, recipe, checkpointing, constants=constants, trainable=trainable
    )


@pytest.fixture(scope="module")
def model(normed):
    return normed


@pytest.fixture(scope="module")
def trained(model, coloured):
    return run(model, *coloured)


def test_training_returns_a_copy_of_the_same_structure(model, trained):
    network, losses = trained
    assert losses.shape == (8,) and losses.dtype == np.float32
    assert jax.tree.structure(network) == jax.tree.structure(model)
    np.testing.assert_array_equal(model.bn.mean[...], np.zeros(4))
    assert np.abs(network.conv.kernel[...] - model.conv.kernel[...]).max() > 0.01


def test_trained_network_sees_an_image_alone_as_in_a_batch(trained, coloured):
    images = jnp.asarray(coloured[0][:8]) / 255
    alone = jnp.stack([trained[0].features(image) for image in images])
    np.testing.assert_allclose(trained[0].features(images), alone, atol=1e-5)


def test_first_step_averages_the_statistics_of_its_batch(model):
    column = np.random.default_rng(0).integers(0, 256, (8, 16, 1, 3), np.uint8)
    images = np.repeat(column, 16, axis=2)  # mirroring changes nothing
    stepped, _ = run(model, images, np.arange(8) % 3, epochs=1, batch_size=8, shift=0)
    before_norm = model.conv(images / np.float32(255))
    np.testing.assert_allclose(
        stepped.bn.mean[...], 0.1 * before_norm.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        stepped.bn.var[...], 0.9 + 0.1 * before_norm.var((0, 1, 2)), rtol=1e-4
    )


def test_only_what_is_trainable_changes(model, coloured):
    network, _ = run(model, *coloured, trainable=nnx.PathContains("linear"))
    np.testing.assert_array_equal(network.conv.kernel[...], model.conv.kernel[...])
    assert (network.linear.kernel[...] != model.linear.kernel[...]).all()


def test_the_loss_is_told_constants_images_labels_and_another_key_each_step(model, coloured):
    def loss(model, constants, key, images, labels):
        return (
            constants * jax.random.uniform(key)
            + 1e3 * images.sum()
            + 1e6 * labels.sum()
            + 0 * model.linear.kernel.sum()
        )

    images, labels = np.full((4, 1, 1, 3), 51, np.uint8), np.array([0, 0, 0, 1])
    plan = {"epochs": 3, "batch_size": 4, "seed": 7}
    _, losses = run(model, images, labels, loss=loss, constants=jnp.float32(100), **plan)
    keys = [jax.random.fold_in(jax.random.key(7), step) for step in range(3)]
    expected = [100 * jax.random.uniform(key) + 1e3 * 4 * 3 * 0.2 + 1e6 for key in keys]
    np.testing.assert_allclose(losses, expected, atol=0.2)  # float32 spacing at 1e6 is 1/16
    assert np.ptp(losses) > 1


def test_same_arguments_give_the_same_weights(model, coloured):
    first, again, other = (run(model, *coloured, seed=seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_progress_is_reported_after_every_step(model, coloured):
    seen = []
    _, losses = run(model, *coloured, on_loss=lambda step, loss: seen.append((step, loss)))
    assert seen == [(k + 1, loss) for k, loss in enumerate(losses)]


def test_weight_decay_spares_biases_and_scales():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimiser = fit._optimiser(learning_rate=0.1, weight_decay=0.5, steps=10)
    updates, _ = optimiser.update(
        jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


recipe = partial(Recipe, learning_rate=0.1, weight_decay=0.1)


@pytest.mark.parametrize("mirror", [True, False])
def test_augmented_images_are_shifts_and_mirror_images(mirror):
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 6, 3), np.uint8)
    (draw,) = fit._augmentations(40, recipe(epochs=1, batch_size=40, shift=1, mirror=mirror))
    augmented = fit._augment(images, draw)
    kinds = set()
    for image, result in zip(images[draw.indices], augmented, strict=True):
        for rows in (-1, 0, 1):
            for columns in (-1, 0, 1):
                shifted = image[np.clip(np.arange(5) + rows, 0, 4)][
                    :, np.clip(np.arange(6) + columns, 0, 5)
                ]
                kinds |= {(rows, columns, 1)} if (result == shifted).all() else set()
                kinds |= {(rows, columns, -1)} if (result == shifted[:, ::-1]).all() else set()
    assert augmented.dtype == np.uint8 and augmented.shape == images.shape
    assert {kind[0] for kind in kinds} == {kind[1] for kind in kinds} == {-1, 0, 1}
    assert {kind[2] for kind in kinds} == ({-1, 1} if mirror else {1})


def test_an_epoch_shows_every_image_once():
    draws = list(fit._augmentations(14, recipe(epochs=2, batch_size=4)))
    assert len(draws) == 6
    epochs = [np.concatenate([draw.indices for draw in epoch]) for epoch in (draws[:3], draws[3:])]
    assert all(len(set(epoch)) == 12 and set(epoch) < set(range(14)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1]) and sorted(epochs[0]) != list(epochs[0])


def test_a_batch_has_the_labels_of_its_images(model, monkeypatch):
    seen = []

    def step(constants, state, i, images, labels):
        seen.append((images, labels))
        return state, 0.0

    monkeypatch.setattr(fit, "_make_step", lambda *_: step)
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)
    run(model, images, np.arange(12) % 3, epochs=1, batch_size=4)
    assert len(seen) == 3 and all((batch[:, 0, 0, 0] % 3 == labels).all() for batch, labels in seen)


def test_random_numbers_are_those_of_the_shipped_weights():
    _, draw, *_ = fit._augmentations(6, recipe(epochs=2, batch_size=3))
    expected = {
        "indices": [4, 0, 1],
        "down": [1, -2, 3],
        "right": [2, -4, -1],
        "mirrored": [True, False, True],
    }
    assert {key: value.tolist() for key, value in draw._asdict().items()} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative, got -1.0"),
        ({"shift": -1}, "shift must be at least 0, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"resume": True}, "resume needs checkpoints"),
    ],
)
def test_wrong_options_are_named(model, coloured, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, *coloured, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": np.zeros((4, 8, 8, 3))},
            r"images must be uint8 \[N, H, W, 3\], got float64 \[4, 8, 8, 3\]",
        ),
        ({"images": np.zeros((8, 8, 3), np.uint8)}, r"got uint8 \[8, 8, 3\]"),
        (
            {"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.zeros(0, int)},
            r"got uint8 \[0, 8, 8, 3\]",
        ),
        (
            {"labels": np.zeros(3, int)},
            r"labels must be integers \[4\], one an image, got int64 \[3\]",
        ),
        ({"labels": np.zeros(4)}, r"got float64 \[4\]"),
        (
            {"labels": np.array([0, 1, 2, 10])},
            r"labels must lie in 0\.\.2, the model's classes, got 0\.\.10",
        ),
        (
            {"labels": np.array([0, 1, 2, -1])},
            r"labels must lie in 0\.\.2, the model's classes, got -1\.\.2",
        ),
        ({"batch_size": 5}, r"batch_size must lie in 1\.\.4, the number of images, got 5"),
        ({"count": lambda image: 1}, "a classifier needs 2 classes or more, got 1"),
    ],
)
def test_wrong_examples_are_named(change, message):
    arguments = {
        "images": np.zeros((4, 8, 8, 3), np.uint8),
        "labels": np.zeros(4, int),
        "batch_size": 2,
        "count": lambda image: 3,
    }
    fit.check_examples(**arguments)
    with pytest.raises(ValueError, match=message):
        fit.check_examples(**{**arguments, **change})


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_at(k):
    def on_loss(step, loss):
        if step == k:
            raise Stop

    return on_loss


@pytest.fixture
def stopped(model, coloured, tmp_path):
    """The folder of a run of 8 steps that was stopped at the sixth."""
    with pytest.raises(Stop):
        run(model, *coloured, checkpoints=tmp_path / "run", on_loss=stop_at(6))
    return tmp_path / "run"


def same(one, other):
    """Whether two networks have the same weights, bit for bit."""
    pairs = zip(*(jax.tree.leaves(nnx.state(network)) for network in (one, other)), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize("every", [1, 3, 5])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    model, coloured, trained, tmp_path, every
):
    network, losses = trained
    kept = {"checkpoints": tmp_path / "run", "checkpoint_every": every}
    with pytest.raises(Stop):
        run(model, *coloured, on_loss=stop_at(6), **kept)
    seen = []
    resumed, again = run(
        model, *coloured, resume=True, on_loss=lambda *step: seen.append(step), **kept
    )
    assert same(resumed, network) and again.tobytes() == losses.tobytes()
    done = {1: 5, 3: 3, 5: 5}[every]
    assert seen == [(k + 1, losses[k]) for k in range(done, 8)]


def test_a_finished_run_resumes_to_its_result(model, coloured, tmp_path):
    kept = {"checkpoints": tmp_path / "run"}
    network, losses = run(model, *coloured, **kept)
    resumed, again = run(model, *coloured, resume=True, on_loss=stop_at(8), **kept)
    assert same(resumed, network) and (again == losses).all()


def test_one_checkpoint_an_epoch_and_only_the_latest(stopped, model, coloured):
    assert [path.name for path in stopped.iterdir()] == ["4"]
    (stopped / "6.orbax-checkpoint-tmp").mkdir()  # what a kill in the middle of writing leaves
    run(model, *coloured, checkpoints=stopped, resume=True)
    assert [path.name for path in stopped.iterdir()] == ["8"]


def test_checkpoints_change_nothing(model, coloured, trained, tmp_path):
    kept = run(model, *coloured, checkpoints=tmp_path / "run", checkpoint_every=3)
    assert same(trained[0], kept[0]) and (trained[1] == kept[1]).all()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from conftest import Normed, colours
from flax import nnx
from test_loop import run
kill = lambda step, loss: os.kill(os.getpid(), signal.SIGKILL) if step == 6 else None
run(Normed(nnx.Rngs(0)), *colours(), checkpoints=sys.argv[1], on_loss=kill)
"""


@pytest.mark.slow
def test_a_killed_run_resumes(model, coloured, trained, tmp_path):
    program = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(Path(__file__).parent)]
    assert subprocess.run(program).returncode == -signal.SIGKILL
    resumed, losses = run(model, *coloured, checkpoints=tmp_path / "run", resume=True)
    assert same(resumed, trained[0]) and losses.tobytes() == trained[1].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.06}, "other settings: learning_rate was 0.05, is 0.06$"),
        (
            {"seed": 3, "mirror": False},
            "other settings: seed was 0, is 3; mirror was True, is False$",
        ),
    ],
)
def test_a_run_with_other_settings_does_not_resume(stopped, model, coloured, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, *coloured, checkpoints=stopped, resume=True, **change)


@pytest.mark.parametrize("part", ["initial weights", "images", "labels"])
def test_a_run_on_something_else_does_not_resume(stopped, model, coloured, part):
    images, labels = coloured
    other = {
        "initial weights": (Normed(nnx.Rngs(1)), images, labels),
        "images": (model, images.swapaxes(1, 2), labels),
        "labels": (model, images, labels[::-1]),
    }
    message = rf"other settings: {part} was (\d+) numbers ([0-9a-f]{{16}}), is \1 numbers (?!\2)[0-9a-f]{{16}}$"
    with pytest.raises(ValueError, match=message):
        run(*other[part], checkpoints=stopped, resume=True)


def test_a_run_with_other_constants_does_not_resume(stopped, model, coloured):
    with pytest.raises(
        ValueError, match=r"other settings: constants was None, is 2 numbers [0-9a-f]{16}$"
    ):
        run(model, *coloured, constants=jnp.ones(2), checkpoints=stopped, resume=True)


def test_a_run_is_neither_overwritten_nor_made_up(stopped, model, coloured):
    with pytest.raises(
        ValueError, match=f"{stopped} holds a run at step 4.*--resume.*remove the folder"
    ):
        run(model, *coloured, checkpoints=stopped)
    with pytest.raises(ValueError, match=r"nothing to resume: .*/empty holds no checkpoint"):
        run(model, *coloured, checkpoints=stopped / "empty", resume=True)
    assert [path.name for path in stopped.iterdir()] == ["4"]


@pytest.mark.parametrize("pattern", ["4/settings/*", "4/state/*"])
def test_a_damaged_checkpoint_is_named(stopped, model, coloured, pattern):
    for path in stopped.glob(pattern):
        path.is_file() and path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*/run/4: ") as refusal:
        run(model, *coloured, checkpoints=stopped, resume=True)
    assert "\n" not in str(refusal.value)


def test_divergence_ends_a_run_early_and_is_not_kept(model, coloured, tmp_path):
    seen = []
    options = {"epochs": 50, "learning_rate": 1e38, "checkpoints": tmp_path / "run"}
    with pytest.raises(
        ValueError, match="training diverged by step 4; a lower learning rate than 1e\\+38 may help"
    ):
        run(model, *coloured, on_loss=lambda *step: seen.append(step), **options)
    assert len(seen) == 4 and not (tmp_path / "run").exists()


def test_the_host_waits_at_checkpoints_only(model, coloured, monkeypatch):
    class Loss:
        waits = 0

        def __float__(self):
            Loss.waits += 1
            return 0.0

    handed = []

    def step(constants, state, *batch):
        handed.append(Loss.waits)
        return state, Loss()

    monkeypatch.setattr(fit, "_make_step", lambda *_: step)
    run(model, *coloured)
    assert handed[:4] == [0] * 4 and handed[4:] == [handed[4]] * 4 and handed[4] > 0
