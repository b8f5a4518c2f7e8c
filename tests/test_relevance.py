"""LRP: a network by hand, conservation, and what it is at γ = ε = 0. Against zennit: test_attribution_parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adv2_jax import interpreters, losses, models
from adv2_jax.activations import relu
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters import input_x_gradient, lrp, lrp_interpreter
from adv2_jax.interpreters.gradients import times_input
from adv2_jax.interpreters.relevance import check_relus, relevance
from adv2_jax.models.layers import stem_pool

LABEL = 1
WIDTHS = {"first": (3, 6), "second": (6, 6), "narrow": (6, 4), "wide": (4, 5), "last": (5, 3)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """At every pixel: normalisation, a residual block with BatchNorm, two linear layers without a ReLU between them."""

    weights: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    scale: jax.Array

    def features(self, image, act=relu):
        def layer(x, name):
            return x @ self.weights[name] + self.biases[name]

        x = act(layer((image - 0.4) / 0.3, "first"))
        branch = (x @ self.weights["second"] - 0.2) * self.scale + self.biases["second"]
        x = act(branch + x)
        return act(layer(layer(x, "narrow"), "wide"))

    def head(self, features):
        return features.mean((0, 1)) @ self.weights["last"] + self.biases["last"]


@pytest.fixture(scope="module")
def layers():
    rng = np.random.default_rng(3)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Layers(
        {name: draw(*shape) for name, shape in WIDTHS.items()},
        {name: draw(shape[1]) for name, shape in WIDTHS.items()},
        draw(6),
    )


def handed_down(relevances, activations, weights, total, gamma, epsilon):
    """The γ rule of one layer, entry by entry: relevances [J] -> [I]."""
    lifted = weights + gamma * np.maximum(weights, 0)
    positive = activations @ np.maximum(weights, 0)
    below = total + gamma * positive + epsilon
    shares = np.divide(relevances, below, out=np.zeros_like(below), where=relevances != 0)
    return np.array([a * (row @ shares) for a, row in zip(activations, lifted, strict=True)])


def by_hand(model, image, gamma, epsilon):
    """Relevance of every pixel in NumPy's float64."""
    w = {name: np.asarray(value, float) for name, value in model.weights.items()}
    b = {name: np.asarray(value, float) for name, value in model.biases.items()}
    scale, x = np.asarray(model.scale, float), np.asarray(image, float)
    z1 = (x - 0.4) / 0.3 @ w["first"] + b["first"]
    a1 = np.maximum(z1, 0)
    z2 = (a1 @ w["second"] - 0.2) * scale + b["second"] + a1
    a2 = np.maximum(z2, 0)
    thin = a2 @ w["narrow"] + b["narrow"]
    z3 = thin @ w["wide"] + b["wide"]
    a3 = np.maximum(z3, 0)
    # both paths of the block are terms of their own: [w s, 1]
    block = np.concatenate([w["second"] * scale, np.eye(6)])
    found = np.zeros_like(x)
    shares = [epsilon * np.sqrt((z**2).mean()) for z in (z1, z2, z3)]
    for place in np.ndindex(x.shape[:2]):
        top = a3[place] / (x.shape[0] * x.shape[1]) * w["last"][:, LABEL]
        # a path through the two layers is a term with the product of its weights
        paths = [
            a * row[:, None] * w["wide"] for a, row in zip(a2[place], w["narrow"], strict=True)
        ]
        terms = np.concatenate(paths)
        positive = np.maximum(terms, 0)
        below = z3[place] + gamma * positive.sum(0) + shares[2]
        factor = np.divide(top, below, out=np.zeros_like(top), where=top != 0)
        r2 = ((terms + gamma * positive) @ factor).reshape(6, 4).sum(1)
        both = np.concatenate([a1[place], a1[place]])
        r1 = handed_down(r2, both, block, z2[place], gamma, shares[1]).reshape(2, 6).sum(0)
        r0 = handed_down(r1, x[place] / 0.3, w["first"], z1[place], gamma, shares[0])
        found[place] = r0
    return found


@pytest.mark.parametrize(("gamma", "epsilon"), [(0.25, 0.0), (0.0, 0.2), (1.0, 0.1)])
def test_by_hand(layers, pixels, gamma, epsilon):
    ours, logits = jax.jit(
        lambda x: relevance(layers, x, LABEL, gamma=gamma, epsilon=epsilon),
    )(pixels)
    expected = by_hand(layers, pixels, gamma, epsilon)
    # 200 float32 operations a number
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(logits, logits_of(layers, pixels), rtol=1e-6)


def without_biases(model):
    """The network with no normalisation, and every mean and bias of its BatchNorms and layers at 0."""
    model.mean, model.std = (0.0,) * 3, (1.0,) * 3
    graph, state = nnx.split(model)
    flat = [
        (path, variable.replace(jnp.zeros_like(variable[...])))
        if path[-1] in ("mean", "bias")
        else (path, variable)
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


NETWORKS = {
    "residual": lambda: models.CifarResNet(1, width=4, rngs=nnx.Rngs(0)),
    "bottleneck": lambda: models.ImageNetResNet(
        (1, 1, 1, 1), 4, width=4, num_classes=5, rngs=nnx.Rngs(0)
    ),
    "dense": lambda: models.DenseNet(
        (1, 1, 1, 1), growth=4, width=4, num_classes=5, rngs=nnx.Rngs(0)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_relevance_is_conserved_and_without_a_rule_is_input_times_gradient(
    randomised, images, name
):
    # 32 x 32: a DenseNet halves five times
    image = jnp.asarray(images[3].repeat(2, 0).repeat(2, 1) / np.float32(255))
    model = randomised(NETWORKS[name])
    plain, (times, logits) = jax.jit(
        lambda model: (
            relevance(model, image, LABEL, gamma=0.0, epsilon=0.0)[0],
            times_input(model, image, LABEL, score=losses.logit),
        )
    )(model)
    largest = jnp.abs(times).max()
    np.testing.assert_allclose(plain, times, rtol=0, atol=1e-5 * largest)
    values, seen = jax.jit(lambda model: relevance(model, image, LABEL, epsilon=0.0))(model)
    np.testing.assert_allclose(seen, logits, rtol=1e-5, atol=1e-5)
    assert jnp.abs(values - plain).max() > 0.1 * largest

    values, logits = jax.jit(lambda model: relevance(model, image, LABEL, epsilon=0.0))(
        without_biases(model)
    )
    # sums of 3072 float32 numbers
    assert values.sum() == pytest.approx(
        float(logits[LABEL]), abs=1e-5 * float(jnp.abs(values).sum())
    )


def test_the_largest_of_a_window_inherits_all(pixels):
    @jax.tree_util.register_static
    class Pooled:
        def features(self, image, act=relu):
            return stem_pool(act(image - 0.1))

        def head(self, features):
            return features.sum((0, 1))

    ours, _ = jax.jit(lambda x: relevance(Pooled(), x, LABEL, gamma=0.5, epsilon=0.0))(pixels)
    winners = np.zeros(pixels.shape)
    for row in range(0, 4, 2):
        for column in range(0, 4, 2):
            window = np.full((3, 3), -1.0)
            for i in range(3):
                for j in range(3):
                    if 0 <= row + i - 1 < 4 and 0 <= column + j - 1 < 4:
                        window[i, j] = pixels[row + i - 1, column + j - 1, LABEL]
            i, j = np.unravel_index(window.argmax(), (3, 3))
            winners[row + i - 1, column + j - 1, LABEL] += 1
    x = np.asarray(pixels)
    # one weight of 1 and a bias of -.1: R = x (1 + γ) / (x - .1 + γ x) of what the ReLU has
    expected = winners * x * 1.5 / (1.5 * x - 0.1) * (x - 0.1)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_what_is_no_layer_hands_on_as_a_gradient(layers, pixels):
    """A network that ends in a function of its own: with γ = 0 that is image times gradient."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Odd(Layers):
        def head(self, features):
            return super().head(jnp.tanh(features) * jax.nn.softmax(features))

    odd = Odd(layers.weights, layers.biases, layers.scale)
    ours, times = jax.jit(
        lambda x: (
            relevance(odd, x, LABEL, gamma=0.0, epsilon=0.0)[0],
            times_input(odd, x, LABEL, score=losses.logit)[0],
        )
    )(pixels)
    np.testing.assert_allclose(ours, times, rtol=1e-4, atol=1e-6)
    assert jnp.isfinite(jax.jit(lambda x: relevance(odd, x, LABEL)[0])(pixels)).all()


def test_the_second_derivative_is_exact(layers, pixels, double, slope):
    """No second derivative is invented: that of the surrogate's map is the change of the map."""
    model = jax.tree.map(lambda leaf: leaf.astype(float), layers)
    x = pixels.astype(float)
    v = jax.random.normal(jax.random.key(0), x.shape)
    weights = jax.random.normal(jax.random.key(1), x.shape[:2])

    @jax.jit
    def seen(x):
        return (weights * lrp(model, x, LABEL)).sum()

    assert jnp.vdot(jax.grad(seen)(x), v) == pytest.approx(float(slope(seen, x, v)), rel=1e-6)
    # that of GRAD is 0 but for the scaling of the map: what there is comes from the factors
    assert jnp.abs(jax.grad(seen)(x)).max() > 1e-3


def test_half_precision_keeps_its_type_and_is_near(layers, pixels):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layers)
    m = jax.jit(lrp)(half, pixels.astype(jnp.bfloat16), LABEL)
    assert jnp.abs(m - jax.jit(lrp)(layers, pixels, LABEL)).mean() < 0.05  # bfloat16 has 8 bits


def test_the_map_is_that_of_the_relevance(layers, pixels):
    m = lrp_interpreter(gamma=0.0, epsilon=0.0).explain(layers, pixels, LABEL)
    expected = input_x_gradient(layers, pixels, LABEL, score=losses.logit)
    np.testing.assert_allclose(m, expected, atol=1e-5)


def test_a_network_without_relus_is_refused():
    vit = models.VisionTransformer(1, 2, patch=4, width=8, image_size=8, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="lrp needs a network with ReLUs: VisionTransformer has none"
    ):
        check_relus(vit, (8, 8, 3))
    assert interpreters.INTERPRETERS["lrp"]().check is check_relus


@pytest.mark.parametrize("option", ["gamma", "epsilon"])
def test_a_negative_rule_is_refused(option):
    with pytest.raises(ValueError, match=rf"^{option} = -0.5 must be 0 or more$"):
        lrp_interpreter(**{option: -0.5})
