"""RTS: eq. 8 and ℓ_enc against plain NumPy, their gradients against differences, and the attack that carries ℓ_enc."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blending import blended

from adv2_jax import attack, explain, interpreters, losses, metrics, threats
from adv2_jax.interpreters import Context, SaliencyWeights, rts_interpreter
from adv2_jax.interpreters.masker_maps import (
    head_loss,
    log_probability,
    mean_loss,
    saliency_loss,
    size_loss,
)
from adv2_jax.models import ClassifierWithMasker
from adv2_jax.presets import Preset, constant

LABEL = 1
WEIGHTS = SaliencyWeights(variation=0.7, area=1.3, removal=2.1, power=0.4, area_power=0.6)
NONE = SaliencyWeights(variation=0.0, area=0.0, removal=0.0, power=1.0, area_power=1.0)


@pytest.fixture(scope="module")
def m():
    return np.random.default_rng(0).uniform(0.1, 1, (2, 3))  # a power below 1 is steep at 0


@pytest.fixture(scope="module")
def other():
    return np.random.default_rng(1).random((4, 4, 3))


@pytest.fixture(scope="module")
def x(pixels):
    return np.asarray(pixels, float)


# Plain NumPy, float64.


def probability(linear, x):
    """f_c of the linear classifier of conftest.py."""
    mix, weights, bias = (np.asarray(leaf, float) for leaf in jax.tree.leaves(linear))
    logits = np.einsum("hwc,hwck->hwk", x, mix).mean((0, 1)) @ weights + bias
    return np.exp(logits[LABEL]) / np.exp(logits).sum()


def variation(m):
    vertical = [
        (m[i + 1, j] - m[i, j]) ** 2 for i in range(m.shape[0] - 1) for j in range(m.shape[1])
    ]
    horizontal = [
        (m[i, j + 1] - m[i, j]) ** 2 for i in range(m.shape[0]) for j in range(m.shape[1] - 1)
    ]
    return np.mean(vertical) + np.mean(horizontal)


def plain_loss(linear, x, m, other, weights):
    """Eq. 8."""
    preserved, removed = (
        probability(linear, blended(x, m, other)),
        probability(linear, blended(x, 1 - m, other)),
    )
    size = weights.variation * variation(m) + weights.area * (m**weights.area_power).sum() / m.size
    return size - np.log(preserved) + weights.removal * removed**weights.power


def loss_of(linear, x, m, other, weights):
    x, m, other = (jnp.asarray(array, jnp.result_type(float)) for array in (x, m, other))
    return saliency_loss(linear, x, LABEL, m, other, weights)


TERMS = {
    "preservation alone": NONE,
    "total variation": NONE._replace(variation=3.0),
    "area": NONE._replace(area=5.0),
    "power of the area": NONE._replace(area=5.0, area_power=0.5),
    "removal": NONE._replace(removal=2.0),
    "power of the removal": NONE._replace(removal=2.0, power=0.3),
    "all": WEIGHTS,
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_of_equation_8_is_the_one_of_plain_numpy(linear, x, m, other, term):
    actual = loss_of(linear, x, m, other, TERMS[term])
    assert actual == pytest.approx(
        plain_loss(linear, x, m, other, TERMS[term]), rel=1e-5
    )  # float32


def test_the_size_of_a_map_does_not_ask_the_classifier(m):
    expected = 0.7 * variation(m) + 1.3 * (m**0.6).mean()
    assert size_loss(jnp.asarray(m, jnp.float32), WEIGHTS) == pytest.approx(expected, rel=1e-5)


def test_defaults_weigh_every_term():
    assert all(value > 0 for value in SaliencyWeights())


@pytest.mark.parametrize("argument", ["image", "map"])
def test_gradients_of_equation_8_are_central_differences(
    double, slope, linear, x, m, other, argument
):
    network = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), linear)

    def f(changed):
        return loss_of(
            network, *((changed, m) if argument == "image" else (x, changed)), other, WEIGHTS
        )

    at = x if argument == "image" else m
    v = np.random.default_rng(2).standard_normal(at.shape)
    actual = jnp.vdot(jax.grad(f)(jnp.asarray(at)), v)
    np.testing.assert_allclose(actual, slope(f, at, v), rtol=1e-7)
    assert abs(actual) > 1e-2


def test_a_probability_that_rounds_to_zero_has_a_finite_slope(linear, x, m, other):
    """There f_c^λ4 has an infinite one, and log f_c none."""
    certain = replace(linear, bias=jnp.array([0.0, -200.0, 0.0]))
    assert jnp.exp(log_probability(certain, jnp.asarray(x, jnp.float32), LABEL)) == 0
    loss, slopes = jax.value_and_grad(lambda m: loss_of(certain, x, m, other, WEIGHTS))(
        jnp.asarray(m, jnp.float32)
    )
    assert np.isfinite(loss) and loss > 100
    assert np.isfinite(slopes).all() and jnp.abs(slopes).max() > 0


# ℓ_enc.


@pytest.fixture(scope="module")
def photo(images):
    return jnp.asarray(images[2], jnp.float32) / 255


def test_head_loss_is_the_cross_entropy_of_the_encoder(masker, photo):
    features = np.asarray(masker.encoder.features(photo), float)
    kernel, bias = (
        np.asarray(variable[...], float)
        for variable in (masker.encoder.linear.kernel, masker.encoder.linear.bias)
    )
    logits = features.mean((0, 1)) @ kernel + bias
    for label in (0, 6):
        expected = np.log(np.exp(logits).sum()) - logits[label]
        # float32, eight layers
        assert head_loss(masker, photo, label) == pytest.approx(expected, rel=1e-4)


def test_mean_loss_is_the_distance_to_the_class_mean(masker, photo):
    pooled = np.asarray(masker.encoder.features(photo), float).mean((0, 1))
    means = np.asarray(masker.means[...], float)
    for label in (0, 6):
        expected = ((pooled - means[label]) ** 2).sum() / (means[label] ** 2).sum()
        assert mean_loss(masker, photo, label) == pytest.approx(expected, rel=1e-4)


# The interpreter.


@pytest.fixture(scope="module")
def model(make_small, masker):
    return ClassifierWithMasker(make_small(), masker)


def test_masked_classifies_as_its_classifier(model, make_small, photo):
    np.testing.assert_array_equal(
        model.head(model.features(photo)), make_small().head(make_small().features(photo))
    )
    negative = model.features(photo, act=lambda z: -z)
    np.testing.assert_array_equal(negative, make_small().features(photo, act=lambda z: -z))


@pytest.mark.parametrize("loss", ["head", "mean"])
@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_the_surrogate_is_the_map_explained_the_logits_and_the_weighted_encoder_loss(
    model, masker, photo, loss, weight
):
    interpreter = rts_interpreter(encoder_loss=loss, encoder_weight=weight)
    logits, m, penalty, memory = interpreter.surrogate(model, photo, 3, Context(jnp.zeros(())))
    np.testing.assert_array_equal(logits, model.head(model.features(photo)))
    for drawn in (
        interpreter.explain(model, photo, 3),
        interpreters.rts(masker, photo, 3),
        masker(photo, 3),
    ):
        np.testing.assert_array_equal(m, drawn)
    expected = {"head": head_loss, "mean": mean_loss}[loss](masker, photo, 3)
    assert penalty == pytest.approx(float(weight * expected), rel=1e-6) and memory is None
    assert interpreter.name == "rts" and interpreter.faithful


def test_equal_options_are_the_same_interpreter():
    assert rts_interpreter() is rts_interpreter(encoder_weight=0.1, encoder_loss="head")
    assert rts_interpreter() is not rts_interpreter(encoder_weight=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_loss": "tail"}, "encoder_loss 'tail' is not one of head, mean"),
        ({"encoder_weight": -0.1}, "encoder_weight = -0.1 must be finite and not negative"),
        ({"encoder_weight": float("nan")}, "encoder_weight = nan must be finite and not negative"),
        ({"encoder_weight": float("inf")}, "encoder_weight = inf must be finite and not negative"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rts_interpreter(**options)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "no masker",
            "rts needs a masker: its model is a models.ClassifierWithMasker(classifier, masker), not a Small",
        ),
        ("classes", "the masker draws maps of 10 classes, the network has 9"),
        ("size", "the masker cannot take images of [15, 15, 3]; it was made for 32 x 32"),
    ],
)
def test_models_that_do_not_fit_are_refused(make_small, masker, images, case, message):
    network, seen = make_small(), images[:, :15, :15] if case == "size" else images
    few = replace(network, weights=network.weights[:, :9])
    model = {
        "no masker": network,
        "classes": ClassifierWithMasker(few, masker),
        "size": ClassifierWithMasker(network, masker),
    }[case]
    with pytest.raises(ValueError) as refusal:
        attack(model, seen, np.zeros(6, int), np.zeros((6, 8, 8)), interpreter="rts")
    assert str(refusal.value) == message


# The attack.

BARE = Preset(
    rts_interpreter(encoder_weight=0.0),
    warm_steps=3,
    steps=12,
    step_size=constant(1 / 255),
    balance=constant(50.0),
    map_loss=losses.map_mse,
)
WITH_ENCODER = replace(BARE, interpreter=rts_interpreter(encoder_weight=0.5))
PGD = replace(BARE, interpreter=None)


@pytest.fixture(scope="module")
def problem(model, images):
    """The second likeliest class of each image, and the map of the likeliest, to be shown for it."""
    logits, _ = explain(model, images, np.zeros(6, int), interpreter="rts")
    targets, labels = logits.argsort(-1)[:, -2:].T
    return targets, explain(model, images, labels, interpreter="rts")[1]


@pytest.fixture(scope="module")
def run(model, images, problem):
    def call(preset, **options):
        maps = None if preset.interpreter is None else problem[1]
        return attack(
            model,
            images,
            problem[0],
            maps,
            interpreter=preset.interpreter,
            preset=preset,
            threat=threats.linf(0.1),
            **options,
        )

    return call


@pytest.fixture(scope="module")
def results(run):
    return {
        name: run(preset)
        for name, preset in (("bare", BARE), ("encoder", WITH_ENCODER), ("pgd", PGD))
    }


@pytest.mark.slow
def test_the_attack_shows_the_target_map(model, images, results, problem):
    targets, maps = problem
    pgd_maps = explain(model, results["pgd"].images, targets, interpreter="rts")[1]
    before, _ = explain(model, images, targets, interpreter="rts")
    for name in ("bare", "encoder"):
        assert (
            metrics.map_l1(results[name].maps, maps).mean()
            < 0.7 * metrics.map_l1(pgd_maps, maps).mean()
        )
        assert (
            metrics.confidence(results[name].logits, targets) > metrics.confidence(before, targets)
        ).all()


def test_encoder_loss_moves_the_encoder_towards_the_target(masker, results, problem):
    loss = jax.jit(jax.vmap(head_loss, (None, 0, 0)))
    bare, encoder = (
        loss(masker, results[name].images / np.float32(255), problem[0])
        for name in ("bare", "encoder")
    )
    assert (encoder < bare).all()


def test_no_image_sees_its_batch_mates(run, results):
    np.testing.assert_array_equal(run(WITH_ENCODER, batch_size=2).images, results["encoder"].images)
