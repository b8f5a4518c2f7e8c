"""Robust training: penalties against closed forms and dense algebra, attacks inside, and what they are good for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adv2_jax import attacks, crafting, losses, models
from adv2_jax.models import Masker
from adv2_jax.training import loop, masker, robust
from adv2_jax.training.classifier import accuracy, train_classifier
from adv2_jax.training.loop import Checkpointing

K, EPSILON = 3, 0.05


@pytest.fixture(scope="module")
def batch():
    """Three images of 4 x 4 pixels, and their labels."""
    images = np.random.default_rng(4).uniform(0.2, 0.8, (3, 4, 4, 3))
    return jnp.asarray(images, jnp.float32), jnp.array([0, 2, 1])


def logits_of(model):
    return jax.vmap(lambda image: model.head(model.features(image)))


def slopes_by_hand(linear, images, labels):
    """∇ℓ = Σ_k (f_k - [k = label]) ∇z_k, in NumPy's float64."""
    mix, weights, bias = (np.asarray(a, float) for a in (linear.mix, linear.weights, linear.bias))
    rows = np.einsum("hwcn,nk->khwc", mix, weights) / 16
    z = np.einsum("bhwc,khwc->bk", np.asarray(images, float), rows) + bias
    f = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    return np.einsum("bk,khwc->bhwc", f - np.eye(K)[labels], rows)


def test_the_gradient_penalty_is_the_squared_slope(make_linear, batch):
    linear, (images, labels) = make_linear(0), batch
    penalty = robust.gradient_penalty(logits_of(linear), linear, images, labels, EPSILON)
    expected = (slopes_by_hand(linear, images, labels) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(penalty, expected, rtol=1e-4)


def test_the_curvature_penalty_is_the_change_of_the_slope_along_its_signs(make_linear, batch):
    linear, (images, labels) = make_linear(0), batch
    penalty = robust.curvature_penalty(logits_of(linear), linear, images, labels, 1.0)
    here = slopes_by_hand(linear, images, labels)
    there = slopes_by_hand(linear, np.asarray(images, float) + np.sign(here), labels)
    np.testing.assert_allclose(penalty, ((there - here) ** 2).sum((1, 2, 3)), rtol=1e-3)


def largest_eigenvalues(linear, images, labels):
    """Of the dense Hessian of each image."""
    loss = lambda x, y: losses.cross_entropy(linear.head(linear.features(x)), y)  # noqa: E731
    dense = jax.vmap(jax.hessian(loss))(images, labels).reshape(len(labels), images[0].size, -1)
    return jnp.linalg.eigvalsh(dense)[:, -1]


def test_ssr_is_the_largest_eigenvalue_and_so_is_its_derivative(make_linear, batch):
    linear, (images, labels) = make_linear(0), batch

    def penalty(linear):
        return robust.ssr_penalty(logits_of(linear), linear, images, labels, EPSILON)

    expected = largest_eigenvalues(linear, images, labels)
    np.testing.assert_allclose(penalty(linear), expected, rtol=1e-4)
    # an eigenvalue alone has a derivative, whatever its eigenvector does
    got = jax.grad(lambda one: penalty(one).sum())(linear)
    wanted = jax.grad(lambda one: largest_eigenvalues(one, images, labels).sum())(linear)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("name", robust.PENALTIES)
def test_a_penalty_shrinks_what_it_penalises(normed, coloured, name):
    images, labels = coloured
    options = {"epochs": 10, "batch_size": 16, "learning_rate": 0.05, "shift": 0}
    plain, _ = train_classifier(normed, images, labels, **options)
    other, _ = train_classifier(normed, images, labels, robust=name, penalty=100.0, **options)
    x, y = jnp.asarray(images / np.float32(255)), jnp.asarray(labels)

    def mean(model):
        return robust.PENALTIES[name][0](logits_of(model), model, x, y, 8 / 255).mean()

    assert mean(other) < 0.5 * mean(plain)
    # and the statistics are those of the batches that the network was trained on
    assert np.isfinite(accuracy(other, images, labels))


def test_a_penalty_of_weight_zero_is_none(normed, coloured):
    options = {"epochs": 1, "batch_size": 16}
    plain, losses = train_classifier(normed, *coloured, **options)
    other, same = train_classifier(normed, *coloured, robust="gradient", penalty=0.0, **options)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (plain, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture(scope="module")
def seen(tiny, images):
    """A tiny network, and the images and classes of a batch."""
    model = tiny()
    x = jnp.asarray(images[:4] / np.float32(255))
    labels = jax.vmap(lambda image: model.head(model.features(image)).argmax())(x)
    return model, x, labels.astype(jnp.int32)


@pytest.mark.parametrize("interpreter", [None, "cam"])
def test_attacked_images_stay_in_the_ball_and_leave_their_class(seen, interpreter):
    model, x, labels = seen
    preset = robust.inner_attack(interpreter, 6, EPSILON)
    assert preset.warm_steps + preset.steps == 6
    attacked = robust.adversarial(model, jax.random.key(0), x, labels, preset, EPSILON)
    assert attacked.shape == x.shape and attacked.min() >= 0 and attacked.max() <= 1
    assert jnp.abs(attacked - x).max() <= EPSILON + 1e-6
    noise = x + EPSILON * jax.random.rademacher(jax.random.key(9), x.shape, x.dtype)
    f, noisy, g = (
        jax.nn.softmax(logits_of(model)(images))[np.arange(4), labels]
        for images in (x, noise.clip(0, 1), attacked)
    )
    assert (g < f).all() and (f - g).mean() > 4 * jnp.abs(f - noisy).mean()
    other = robust.adversarial(model, jax.random.key(1), x, labels, preset, EPSILON)
    assert (other != attacked).any()  # another random start


def test_it_aims_at_the_maps_it_is_told(seen, monkeypatch):
    model, x, labels = seen
    asked = []

    def noted(model, problems, preset, threat, start):
        asked.append(problems.target_map)
        return crafting.craft(model, problems, preset, threat, start=start)

    monkeypatch.setattr(robust, "craft", noted)
    preset = robust.inner_attack("cam", 2, EPSILON)
    move = partial(jnp.roll, shift=1, axis=0)
    robust.adversarial(model, jax.random.key(0), x, labels, preset, EPSILON, move)
    images, cam = np.asarray(x), preset.interpreter
    maps = attacks.explain(model, images, np.asarray(labels), interpreter=cam)[1]
    np.testing.assert_allclose(asked[0], maps[[3, 0, 1, 2]], atol=1e-5)


def test_robust_accuracy_is_what_plain_pgd_leaves(normed, coloured):
    images, labels = coloured
    model, _ = train_classifier(normed, *coloured, epochs=6, batch_size=16, learning_rate=0.05)
    assert accuracy(model, images, labels) > 0.9
    at = [robust.robust_accuracy(model, images, labels, levels / 255) for levels in (1, 16, 90)]
    # 60 grey levels tell the classes apart
    assert at[0] >= at[1] >= at[2] == 0


@pytest.mark.parametrize("kind", robust.ATTACKS)
def test_a_network_trained_on_attacked_images_withstands_them(normed, coloured, kind):
    options = {"epochs": 10, "batch_size": 16, "learning_rate": 0.05, "shift": 0}
    epsilon = 32 / 255
    plain, _ = train_classifier(normed, *coloured, **options)
    model, _ = train_classifier(
        normed, *coloured, robust=kind, epsilon=epsilon, attack_steps=4, **options
    )
    before, after = (robust.robust_accuracy(one, *coloured, epsilon) for one in (plain, model))
    assert after > before + 0.1


def test_an_adversary_sees_the_present_network_at_inference(normed, coloured):
    images, labels = coloured
    seen = []

    def adversary(model, constants, key, x, y):
        assert model.bn.use_running_average
        seen.append((np.asarray(model.linear.kernel[...]), np.asarray(x), constants, key))
        return 1 - x

    def loss(model, constants, key, x, y):
        return x.mean() + 0 * model.head(model.features(x)).sum()

    recipe = loop.Recipe(epochs=1, batch_size=16, learning_rate=0.05, weight_decay=0.05, shift=0)
    _, values = loop.fit(
        normed, loss, images, labels, recipe, Checkpointing(), constants=2.0, adversary=adversary
    )
    np.testing.assert_allclose(values, [1 - x.mean() for _, x, *_ in seen], rtol=1e-5)
    assert len(seen) == 4 and seen[0][2] == 2
    assert (seen[0][0] == normed.linear.kernel[...]).all()
    assert len({tuple(jax.random.key_data(key).tolist()) for *_, key in seen}) == 4


def test_a_robust_training_resumes_to_the_same_weights(normed, coloured, tmp_path):
    options = {"epochs": 2, "batch_size": 32, "robust": "pgd", "attack_steps": 1}
    whole, _ = train_classifier(normed, *coloured, **options)

    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    keep = Checkpointing(tmp_path, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(normed, *coloured, checkpointing=keep._replace(on_loss=stop), **options)
    again = keep._replace(resume=True)
    resumed, _ = train_classifier(normed, *coloured, checkpointing=again, **options)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def scenes(randomised):
    """A masker of a tiny network, that network, and eight images of it."""
    build = lambda: models.CifarResNet(1, width=4, num_classes=3, rngs=nnx.Rngs(0))  # noqa: E731
    classifier = randomised(build)
    drawer = randomised(lambda: Masker(build(), rngs=nnx.Rngs(0)), 5)
    images = np.random.default_rng(6).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    return drawer, classifier, images, np.arange(8) % 3


def test_the_loss_of_distillation_is_eq_8_and_the_distance_of_the_maps(scenes):
    drawer, classifier, images, labels = scenes
    benign = jnp.asarray(images / np.float32(255))
    attacked, key = 1 - benign, jax.random.key(3)

    def value(weight):
        recipe = masker.MaskerRecipe(robust="adv2", distillation=weight)
        return masker.distillation_loss(
            drawer, classifier, key, (benign, attacked), jnp.asarray(labels), recipe=recipe
        )

    logits = np.array(logits_of(classifier)(attacked))
    logits[range(8), labels] = -np.inf
    distance = jnp.abs(drawer(attacked, logits.argmax(-1)) - drawer(benign, labels)).mean()
    recipe = masker.MaskerRecipe()
    plain = masker.batch_loss(drawer, classifier, key, benign, labels, recipe=recipe)
    for weight in (-2.0, 0.0, 3.0):
        np.testing.assert_allclose(value(weight), plain + weight * distance, rtol=1e-5)


@pytest.mark.slow
def test_distillation_keeps_the_benign_map_or_draws_another(scenes):
    drawer, classifier, images, labels = scenes
    options = {"epochs": 8, "batch_size": 8, "learning_rate": 0.02, "shift": 0, "mirror": False}
    attack = {"robust": "adv2", "epsilon": 16 / 255, "attack_steps": 4}
    benign, key = jnp.asarray(images / np.float32(255)), jax.random.key(1)

    def trained(weight):
        chosen = options | attack | {"distillation": weight}
        return masker.train_masker(drawer, classifier, images, labels, **chosen)[0]

    def distance(one, aim):
        """Between the maps of benign and attacked images, under the attack of that training."""
        recipe = masker.MaskerRecipe(**attack, distillation=aim)
        _, x = masker._beside_attacked(
            one, classifier, key, benign, jnp.asarray(labels), recipe=recipe
        )
        logits = np.array(logits_of(classifier)(x))
        logits[range(8), labels] = -np.inf
        return float(jnp.abs(one(x, logits.argmax(-1)) - one(benign, labels)).mean())

    near, far = trained(100.0), trained(-100.0)
    assert distance(near, 1.0) < 0.5 * distance(far, 1.0)
    assert distance(near, -1.0) < 0.5 * distance(far, -1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robust": "pgd"}, "robust must be adv2, got pgd"),
        ({"robust": "adv2", "distillation": np.inf}, "distillation must be finite, got inf"),
        ({"robust": "adv2", "epsilon": 0.0}, r"epsilon must lie in \[1/255, 1\], got 0.0"),
    ],
)
def test_wrong_options_of_a_masker_are_named(scenes, options, message):
    with pytest.raises(ValueError, match=message):
        masker.train_masker(*scenes, batch_size=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robust": "trades"}, "robust must be one of pgd, adv2, gradient, curvature, ssr"),
        ({"robust": "pgd", "epsilon": 8.0}, r"epsilon must lie in \[1/255, 1\], got 8.0"),
        ({"robust": "pgd", "attack_steps": 0}, "attack_steps must be at least 1, got 0"),
        ({"robust": "pgd", "penalty": 1.0}, "penalty goes with robust gradient, curvature, ssr"),
        ({"robust": "ssr", "penalty": -1.0}, "penalty must be finite and not negative"),
        ({"robust": "adv2", "interpreter": "mask"}, "a training cannot attack mask"),
        ({"robust": "adv2", "interpreter": "rts"}, "rts needs a masker"),
    ],
)
def test_wrong_options_are_named(normed, coloured, options, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(normed, *coloured, **options)
