"""Training a masker: which maps a batch asks for and what they cost, what training leaves alone, and whether maps explain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_blending import blended
from test_loop import Stop, same, stop_at
from test_maps import bilinear

from adv2_jax import explain, models
from adv2_jax.blending import alternative
from adv2_jax.data import ImageSet, shapes
from adv2_jax.interpreters import SaliencyWeights
from adv2_jax.interpreters.masker_maps import saliency_loss, size_loss
from adv2_jax.models import ClassifierWithMasker, Masker
from adv2_jax.runs import faithfulness
from adv2_jax.runs.faithfulness import qualities, quality, to_explain
from adv2_jax.training import masker as module
from adv2_jax.training.loop import Checkpointing
from adv2_jax.training.masker import MaskerRecipe, batch_loss, class_means, train_masker

pytestmark = pytest.mark.slow

OPTIONS = {
    "epochs": 10,
    "batch_size": 16,
    "learning_rate": 0.02,
    "shift": 1,
    "variation": 0.1,
    "area": 2.0,
    "removal": 4.0,
    "power": 0.5,
    "absent": 0.25,
}


class Roughest(nnx.Module):
    """Classifier of three classes: which colour changes most from pixel to pixel?"""

    def features(self, image, act=None):
        return jnp.diff(image, axis=-2) ** 2

    def head(self, features):
        return 400 * features.mean((-3, -2))


@pytest.fixture(scope="module")
def patches():
    """64 grey images of 8 x 8 pixels with a square that is rough in the colour of its class; their labels; the squares."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 3
    images, masks = (
        rng.integers(110, 140, (64, 8, 8, 3)).astype(np.uint8),
        np.zeros((64, 8, 8), bool),
    )
    for image, label, mask in zip(images, labels, masks, strict=True):
        square = tuple(slice(start, start + 4) for start in rng.integers(0, 5, 2))
        image[*square, label] = rng.integers(0, 256, (4, 4))
        mask[square] = True
    return images, labels, masks


# The loss of a batch.


class Asked:
    """A masker that notes the classes it is asked for, and draws a map that tells them and the brightness of the image."""

    embedding = np.zeros((3, 2))

    def __call__(self, images, labels):
        self.labels = labels
        corners = images.mean((1, 2, 3))[:, None, None] * jnp.array([[0.0, 1.0], [0.5, 0.2]])
        return (corners + 0.2 * labels[:, None, None]) / 2


@pytest.fixture(scope="module")
def noise():
    """600 images of 4 x 4 pixels, for the linear classifier, and their labels."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.random((600, 4, 4, 3)), jnp.float32), jnp.asarray(
        rng.integers(0, 3, 600)
    )


def ask(linear, images, labels, recipe, seed=0):
    """The loss of a batch, and the classes that were asked for."""

    @jax.jit
    def run(key):
        masker = Asked()
        return batch_loss(masker, linear, key, images, labels, recipe=recipe), masker.labels

    return run(jax.random.key(seed))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_loss_of_a_batch_is_the_mean_of_what_each_map_costs(linear, noise, monkeypatch, share):
    monkeypatch.setattr(module, "alternative", lambda key, x: 1 - x)
    (images, labels), weights = (array[:40] for array in noise), SaliencyWeights(0.7, 1.3, 2.1, 0.4)
    found, asked = ask(linear, images, labels, MaskerRecipe(absent=share, **weights._asdict()))

    @jax.jit
    @jax.vmap
    def costs(x, y, m):
        return saliency_loss(linear, x, y, m, 1 - x, weights), size_loss(m, weights)

    shown, absent = costs(images, labels, Asked()(images, asked))
    # float32
    assert found == pytest.approx(np.where(asked == labels, shown, absent).mean(), rel=1e-5)
    assert (asked == labels).all() == (share == 0)


def test_a_share_of_the_maps_is_asked_of_any_other_class(linear, noise):
    images, labels = noise
    asked, again = (
        ask(linear, images, labels, MaskerRecipe(absent=0.25), seed)[1] for seed in (1, 2)
    )
    steps = np.bincount((asked - labels) % 3, minlength=3) / len(labels)
    # four deviations of 600 draws
    np.testing.assert_allclose(steps, [0.75, 0.125, 0.125], atol=0.07)
    assert (again != asked).any()


def test_every_image_has_an_alternative_of_its_own(linear, noise, monkeypatch):
    seen = []

    def noted(key, x):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return x

    monkeypatch.setattr(module, "alternative", noted)
    images, labels = (array[:9] for array in noise)
    ask(linear, images, labels, MaskerRecipe())
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 9


# Training.


@pytest.fixture(scope="module")
def fresh(randomised):
    return randomised(
        lambda: Masker(
            models.CifarResNet(1, width=4, num_classes=3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
        ),
        5,
    )


@pytest.fixture(scope="module")
def run(fresh, patches):
    return lambda **options: train_masker(fresh, Roughest(), *patches[:2], **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def trained(run):
    return run()


draw = jax.jit(lambda masker, image, label: masker(image, label))


def test_training_lowers_the_loss(fresh, trained, patches):
    """On the same random draws: those of another key move the loss of a batch by more than it falls."""
    masker, losses = trained
    assert losses.shape == (40,) and losses.dtype == np.float32
    images, labels, _ = patches
    recipe = MaskerRecipe(**OPTIONS)
    loss = jax.jit(
        lambda masker, key: batch_loss(
            masker, Roughest(), key, images / np.float32(255), labels, recipe=recipe
        )
    )
    for key in jax.random.split(jax.random.key(0), 3):
        assert loss(masker, key) < 0.95 * loss(fresh, key)


def test_training_finds_the_object(trained, patches):
    images, labels, masks = patches
    maps = draw(trained[0], images / np.float32(255), labels)
    up = np.array([bilinear(m, (8, 8)) for m in np.asarray(maps)])
    assert up[masks].mean() > up[~masks].mean() + 0.2


def changed(one, other, kind):
    """Paths of the variables of a kind that differ."""
    before, after = (dict(nnx.to_flat_state(nnx.state(network, kind))) for network in (one, other))
    return {path for path in before if (before[path][...] != after[path][...]).any()}


def test_the_encoder_stays_as_it_is(fresh, trained):
    masker, _ = trained
    assert changed(fresh.encoder, masker.encoder, (nnx.Param, nnx.BatchStat)) == set()
    assert {path[0] for path in changed(fresh, masker, nnx.Param)} == {
        "embedding",
        "threshold",
        "stages",
        "out",
    }
    assert {path[0] for path in changed(fresh, masker, nnx.BatchStat)} == {"means", "stages"}


def test_a_tuned_encoder_keeps_its_statistics(fresh, run):
    masker, _ = run(epochs=1, tune=True)
    assert ("conv1", "kernel") in changed(fresh.encoder, masker.encoder, nnx.Param)
    assert changed(fresh.encoder, masker.encoder, nnx.BatchStat) == set()


def test_a_trained_masker_draws_a_batch_as_its_images_alone(trained, patches):
    masker, images, labels = (
        trained[0],
        jnp.asarray(patches[0][:6], jnp.float32) / 255,
        np.arange(6) % 3,
    )
    alone = jnp.stack(
        [draw(masker, image, label) for image, label in zip(images, labels, strict=True)]
    )
    np.testing.assert_allclose(draw(masker, images, labels), alone, atol=1e-5)  # float32


def test_mean_features_are_measured_after_training(trained, patches):
    masker, _ = trained
    np.testing.assert_array_equal(masker.means[...], class_means(masker, *patches[:2]))
    assert (masker.means[...] != 0).any()


def test_a_resumed_run_ends_like_one_that_was_never_stopped(run, trained, tmp_path):
    masker, losses = trained
    kept = Checkpointing(tmp_path / "run", checkpoint_every=2)
    with pytest.raises(Stop):
        run(checkpointing=kept._replace(on_loss=stop_at(3)))
    resumed, again = run(checkpointing=kept._replace(resume=True))
    assert same(resumed, masker) and again.tobytes() == losses.tobytes()
    with pytest.raises(ValueError, match=r"other settings: area was 2\.0, is 3\.0$"):
        run(checkpointing=kept._replace(resume=True), area=3.0)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_class_means_are_those_of_the_pooled_features(fresh, coloured, batch_size):
    images, labels = (array[:12] for array in coloured)
    labels = np.where(labels == 1, 2, labels)
    features = jax.jit(lambda encoder, x: encoder.features(x))(
        fresh.encoder, images / np.float32(255)
    )
    pooled = np.asarray(features, float).mean((1, 2))
    # no image shows class 1
    expected = [pooled[labels == 0].mean(0), pooled.mean(0), pooled[labels == 2].mean(0)]
    np.testing.assert_allclose(
        class_means(fresh, images, labels, batch_size=batch_size), expected, rtol=1e-4, atol=1e-5
    )


def test_the_recipe_weighs_as_the_interpreter_does():
    assert MaskerRecipe().weights == SaliencyWeights()
    assert MaskerRecipe(
        variation=1.0, area=2.0, removal=3.0, power=4.0, area_power=5.0
    ).weights == (
        1,
        2,
        3,
        4,
        5,
    )


WRONG = {
    "variation must be finite and not negative, got -1.0": {"variation": -1.0},
    "area must be finite and not negative, got nan": {"area": float("nan")},
    "removal must be finite and not negative, got inf": {"removal": float("inf")},
    "power must be finite and not negative, got -0.3": {"power": -0.3},
    "absent must lie in [0, 1), got 1.0": {"absent": 1.0},
    "absent must lie in [0, 1), got -0.1": {"absent": -0.1},
    "epochs must be at least 1, got 0": {"epochs": 0},
    "batch_size must lie in 1..64, the number of images, got 65": {"batch_size": 65},
    "resume needs checkpoints, the folder of the run to go on with": {
        "checkpointing": Checkpointing(resume=True)
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_named(run, message):
    with pytest.raises(ValueError) as refusal:
        run(**WRONG[message])
    assert str(refusal.value) == message


def test_what_does_not_fit_is_named(fresh, masker, patches):
    images, labels, _ = patches
    with pytest.raises(
        ValueError, match=r"^labels must lie in 0\.\.2, the model's classes, got 0\.\.3$"
    ):
        train_masker(fresh, Roughest(), images, labels + (labels == 2))
    with pytest.raises(
        ValueError, match=r"^the masker draws maps of 10 classes, the network has 3$"
    ):
        train_masker(masker, Roughest(), images, labels)
    with pytest.raises(
        ValueError, match=r"^the masker cannot take images of \[7, 7, 3\]; it was made for 32 x 32$"
    ):
        train_masker(fresh, Roughest(), images[:, :7, :7], labels)


# Do maps explain?


@pytest.fixture(scope="module")
def scenes():
    """Three images of 4 x 4 pixels, and where the objects on them are."""
    rng = np.random.default_rng(1)
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :2, :2] = masks[1, 1:, 3] = masks[2, 0] = True
    return rng.integers(0, 256, (3, 4, 4, 3), np.uint8), np.array([0, 1, 2]), masks


def log_probability(linear, x, label):
    mix, weights, bias = (np.asarray(leaf, float) for leaf in jax.tree.leaves(linear))
    logits = np.einsum("hwc,hwck->hwk", x, mix).mean((0, 1)) @ weights + bias
    return logits[label] - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("batch_size", [2, 64])
def test_quality_is_what_is_left_and_what_is_gone(linear, scenes, batch_size):
    images, labels, _ = scenes
    maps = np.random.default_rng(2).random((3, 2, 2))
    found = quality(linear, images, labels, maps, seed=4, batch_size=batch_size)
    kept, removed = [], []
    others = jax.jit(jax.vmap(alternative))(
        jax.random.split(jax.random.key(4), 3), images / np.float32(255)
    )
    for image, label, m, other in zip(images, labels, maps, np.asarray(others, float), strict=True):
        x = image / 255
        kept.append(
            np.exp(
                log_probability(linear, blended(x, m, other), label)
                - log_probability(linear, x, label)
            )
        )
        removed.append(np.exp(log_probability(linear, blended(x, 1 - m, other), label)))
    assert found.n == 3 and found[3:] == (None,) * 4
    assert found.confidence_kept == pytest.approx(np.mean(kept), rel=1e-5)  # float32
    assert found.confidence_removed == pytest.approx(np.mean(removed), rel=1e-5)


def test_a_map_that_is_the_object_is_perfect(linear, scenes):
    images, labels, masks = scenes
    found = quality(linear, images, labels, masks.astype(float), masks)
    assert (found.inside, found.outside, found.pointing_game, found.iou) == (1, 0, 1, 1)
    found = quality(linear, images, labels, 1.0 - masks, masks)
    assert (found.inside, found.outside, found.pointing_game, found.iou) == (0, 1, 0, 0)


def test_quality_against_the_truth_is_that_of_plain_loops(linear, scenes):
    images, labels, masks = scenes
    maps = np.array([[[0.9, 0.1], [0.3, 0.2]], [[0.9, 0.2], [0.1, 0.8]], [[0.55, 0.7], [0.2, 0.1]]])
    up = np.array([bilinear(m, (4, 4)) for m in maps])
    on = [up[place] for place in np.ndindex(up.shape) if masks[place]]
    off = [up[place] for place in np.ndindex(up.shape) if not masks[place]]
    peaks = [masks[i][np.unravel_index(up[i].argmax(), (4, 4))] for i in range(3)]
    shares = [
        ((up[i] >= 0.5) & masks[i]).sum() / ((up[i] >= 0.5) | masks[i]).sum() for i in range(3)
    ]
    found = quality(linear, images, labels, maps, masks)
    assert found.inside == pytest.approx(np.mean(on), rel=1e-5) and found.outside == pytest.approx(
        np.mean(off), rel=1e-5
    )
    assert found.pointing_game == pytest.approx(np.mean(peaks)) and 0 < np.mean(peaks) < 1
    assert found.iou == pytest.approx(np.mean(shares), rel=1e-5) and 0 < np.mean(shares) < 1


def test_held_out_images_to_explain_are_those_the_network_gets_right(patches):
    images, labels, masks = patches
    wrong = np.where(np.arange(64) % 2, labels, (labels + 1) % 3)
    chosen = to_explain(Roughest(), ImageSet(images, wrong, objects=masks), limit=5)
    for found, given in ((chosen.images, images), (chosen.labels, labels), (chosen.objects, masks)):
        np.testing.assert_array_equal(found, given[1:10:2])
    with pytest.raises(ValueError, match="the network gets none of the 64 images right"):
        to_explain(Roughest(), ImageSet(images, (labels + 1) % 3))


def test_interpreters_are_measured_on_the_same_images(make_small, masker, images, monkeypatch):
    monkeypatch.setattr(faithfulness, "PAPER", ("cam", "rts"))
    model = ClassifierWithMasker(make_small(), masker)
    logits, _ = explain(model, images, np.zeros(6, int), interpreter="cam")
    labels = logits.argmax(-1)
    found = qualities(model, ImageSet(images, labels))
    assert list(found) == ["rts", "cam"]
    for name, value in found.items():
        _, maps = explain(model, images, labels, interpreter=name)
        assert value == quality(model.classifier, images, labels, maps)
    assert found["cam"].confidence_kept != found["rts"].confidence_kept


def test_the_shipped_masker_marks_what_the_network_needs():
    """What eq. 8 asks of a map, on scenes that neither network was trained on; the numbers README gives."""
    model = ClassifierWithMasker(models.embedded(), models.embedded_masker())
    scenes = shapes.generate(220, seed=1)
    held_out = to_explain(
        model, ImageSet(scenes.images, scenes.labels, objects=scenes.objects), limit=200
    )
    _, maps = explain(model, held_out.images, held_out.labels, interpreter="rts")
    found = quality(model.classifier, held_out.images, held_out.labels, maps, held_out.objects)
    assert found.n == 200
    assert found.confidence_kept >= 0.8 and found.confidence_removed < 0.2
    assert found.pointing_game >= 0.9 and found.iou >= 0.5
