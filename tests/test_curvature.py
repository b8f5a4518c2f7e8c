"""Curvature in the image, against dense Hessians in float64, closed forms and the goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adv2_jax import curvature, interpreters, models, threats
from adv2_jax.activations import relu_boxed, relu_curved, relu_h, relu_sigmoid, softplus
from adv2_jax.capabilities import logits_of, pre_activations
from adv2_jax.interpreters import Context
from adv2_jax.losses import cross_entropy, log_odds, logit, map_l2, probability

SHAPE = (8, 8, 3)
LABEL = jnp.int32(3)
KEY = jax.random.key(5)
WIDE = Partial(relu_curved, tau=0.05)


def draw(seed, shape=SHAPE, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture
def network(double, make_small):
    return jax.tree.map(lambda values: jnp.asarray(values, jnp.float64), make_small())


@pytest.fixture
def pixels(double):
    return jnp.asarray(np.random.default_rng(8).uniform(0.2, 0.8, SHAPE))


def dense(function, x):
    """The Hessian [D, D] of a function of an image, by JAX."""
    return jax.jit(jax.hessian(lambda flat: function(flat.reshape(SHAPE))))(x.ravel())


def rows(operator, x):
    """The matrix of an operator, a product for each unit vector."""
    units = jnp.eye(x.size).reshape(-1, *x.shape)
    return jax.jit(jax.vmap(operator))(units).reshape(x.size, -1)


ACTS = {"curved": WIDE, "h": Partial(relu_h, tau=0.1), "sigma": relu_sigmoid(2.0), "relu": None}


@pytest.mark.parametrize(
    "act, score",
    [(act, log_odds) for act in ACTS.values()] + [(WIDE, probability), (WIDE, cross_entropy)],
)
def test_hessian_is_that_of_jax(network, pixels, act, score):
    operator = curvature.hessian(network, pixels, LABEL, act=act, score=score)
    true = dense(lambda x: score(logits_of(network, x, act), LABEL), pixels)
    np.testing.assert_allclose(
        rows(operator, pixels), true, atol=1e-10 * np.abs(true).max() + 1e-30
    )


@pytest.mark.parametrize("score", [log_odds, logit])
def test_hessian_is_the_sum_of_its_terms(network, pixels, score):
    v, options = draw(0), {"act": WIDE, "score": score}
    whole = curvature.hessian(network, pixels, LABEL, **options)(v)
    softmax = curvature.softmax_term(network, pixels, LABEL, **options)(v)
    layers = curvature.network_term(network, pixels, LABEL, **options)(v)
    np.testing.assert_allclose(softmax + layers, whole, rtol=1e-9, atol=1e-12)
    assert np.abs(layers).max() > 0
    if score is logit:
        assert not softmax.any()


def test_network_term_is_zero_without_a_surrogate(network, pixels):
    assert not curvature.network_term(network, pixels, LABEL)(draw(0)).any()


@pytest.mark.parametrize(
    "score, rank, sign", [(log_odds, 8, -1), (probability, 9, 0), (cross_entropy, 9, 1)]
)
def test_softmax_spectrum_is_the_exact_one(network, pixels, score, rank, sign):
    """K = 10 classes: rank K - 2 for log-odds, K - 1 for -log f and f (method §12)."""
    pairs = curvature.softmax_spectrum(network, pixels, LABEL, score=score)
    true = dense(lambda x: score(logits_of(network, x), LABEL), pixels)
    values = np.linalg.eigvalsh(true)
    largest = np.argsort(-np.abs(values))[: len(pairs.values)]
    np.testing.assert_allclose(pairs.values, values[largest], atol=1e-10 * np.abs(values).max())
    for value, vector in zip(pairs.values, pairs.vectors, strict=True):
        image_of_vector = true @ vector.ravel()
        np.testing.assert_allclose(image_of_vector, value * vector.ravel(), atol=1e-9)
    large = pairs.values[np.abs(pairs.values) > 1e-12 * np.abs(values).max()]
    assert len(large) == rank
    assert sign == 0 or np.all(np.sign(large) == sign)


def test_a_logit_has_no_softmax_term(network, pixels):
    assert not curvature.softmax_spectrum(network, pixels, LABEL, score=logit).values.any()


def test_softmax_spectrum_of_many_classes(double, make_linear):
    """More classes than are computed at a time."""
    rng = np.random.default_rng(0)
    model = make_linear()
    model = type(model)(
        jnp.asarray(rng.standard_normal((4, 4, 3, 30))),
        jnp.asarray(rng.standard_normal((30, 40))),
        jnp.zeros(40),
    )
    x = jnp.asarray(rng.uniform(size=(4, 4, 3)))
    pairs = curvature.softmax_spectrum(model, x, LABEL, score=cross_entropy, k=3)
    true = jax.hessian(
        lambda flat: cross_entropy(model.head(model.features(flat.reshape(4, 4, 3))), LABEL)
    )
    np.testing.assert_allclose(
        pairs.values, np.linalg.eigvalsh(true(x.ravel()))[::-1][:3], rtol=1e-9
    )


def test_top_eigenpairs_of_a_surrogate_are_those_of_dense_algebra(network, pixels):
    operator = curvature.hessian(network, pixels, LABEL, act=WIDE)
    pairs = curvature.eigenpairs(operator, pixels, 3, depth=60, key=KEY)
    values = np.linalg.eigvalsh(
        dense(lambda x: log_odds(logits_of(network, x, WIDE), LABEL), pixels)
    )
    largest = values[np.argsort(-np.abs(values))[:3]]
    np.testing.assert_allclose(pairs.values, largest, rtol=1e-6)
    slope = jax.grad(lambda x: log_odds(logits_of(network, x), LABEL))(pixels)
    share = curvature.normalised(network, pixels, LABEL, act=WIDE, depth=60, key=KEY)
    np.testing.assert_allclose(share, abs(largest[0]) / np.linalg.norm(slope), rtol=1e-6)


def test_float32_products_are_those_of_float64(make_small):
    """Residuals of eigenpairs of 1e-3 need products to 1e-5."""
    model, x = (
        make_small(),
        jnp.asarray(np.random.default_rng(8).uniform(0.2, 0.8, SHAPE), jnp.float32),
    )
    v = draw(1, dtype=np.float32)
    found = curvature.hessian(model, x, LABEL, act=WIDE)(v)
    true = jax.jvp(jax.grad(lambda x: log_odds(logits_of(model, x, WIDE), LABEL)), (x,), (v,))[1]
    np.testing.assert_allclose(found, true, atol=1e-5 * np.abs(true).max())
    assert found.dtype == jnp.float32


# --- secant


@jax.tree_util.register_pytree_node_class
class SmoothInside:
    """A network with softplus in place of every ReLU: smooth in truth."""

    def __init__(self, network):
        self.network = network

    def logits(self, image):
        return self.network.head(self.network.features(image, act=softplus(3.0)))

    def tree_flatten(self):
        return (self.network,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_secant_becomes_the_derivative_on_a_SmoothInside(network, pixels):
    model, v = SmoothInside(network), draw(2)
    true = curvature.hessian(model, pixels, LABEL)(v)
    errors = [
        np.linalg.norm(curvature.secant(model, pixels, LABEL, step=h)(v) - true)
        for h in (4e-3, 2e-3, 1e-3)
    ]
    # a central difference: its error falls with the square of the step
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.05)
    np.testing.assert_allclose(errors[1] / errors[2], 4, rtol=0.05)
    assert errors[2] < 1e-3 * np.linalg.norm(true)


def test_smoothed_secant_is_the_mean_over_common_samples(network, pixels):
    v, h = draw(2), 0.01
    found = curvature.secant(network, pixels, LABEL, step=h, noise=0.1, samples=5, key=KEY)(v)
    offsets = 0.1 * jax.random.normal(KEY, (5, *SHAPE), pixels.dtype)
    each = [curvature.secant(network, pixels + offset, LABEL, step=h)(v) for offset in offsets]
    np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"noise = 0\.1 needs a key"):
        curvature.secant(network, pixels, LABEL, step=h, noise=0.1)


@jax.tree_util.register_pytree_node_class
class OneLayer:
    """Logits W2 relu(W1 x): one layer of neurons."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def logits(self, image, act=jax.nn.relu):
        return self.second @ act(self.first @ image.ravel())

    def tree_flatten(self):
        return (self.first, self.second), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.fixture
def one_layer(double):
    return OneLayer(draw(3, (200, 192)), draw(4, (10, 200)))


def test_at_one_layer_the_secant_is_a_box_of_the_matched_width(one_layer, pixels):
    """Method §12: exactly so, kinks included, as no neuron's weight in the logit changes."""
    v = jnp.sign(draw(5))
    for h in (0.01, 0.1):
        act = curvature.Matched(kernel=relu_boxed).activations(one_layer, pixels, v, h)
        surrogate = curvature.hessian(one_layer, pixels, LABEL, act=act, score=logit)(v)
        true = curvature.secant(one_layer, pixels, LABEL, step=h, score=logit)(v)
        assert np.abs(true).max() > 0
        # half of a kernel at its edge is of no neuron here; what is left is rounding
        np.testing.assert_allclose(surrogate, true, rtol=1e-9, atol=1e-9 * np.abs(true).max())


# --- matched widths


def test_matched_widths_are_squares_of_how_far_neurons_move(network, pixels):
    v, h = draw(6), 0.02
    moved = [
        (after - before) / 2e-7
        for after, before in zip(
            pre_activations(network, pixels + 1e-7 * v),
            pre_activations(network, pixels - 1e-7 * v),
            strict=True,
        )
    ]
    alone = curvature.matched_width(network, pixels, v, h)
    both = curvature.matched_width(network, pixels, v, h, neuron=0.5, layer=2.0)
    assert [width.shape for width in alone] == [dz.shape for dz in moved]
    for dz, width, mixed in zip(moved, alone, both, strict=True):
        np.testing.assert_allclose(width, (h * dz) ** 2, rtol=1e-4, atol=1e-12)
        floor = (2 * h) ** 2 * (dz**2).mean()
        np.testing.assert_allclose(mixed, (h * dz / 2) ** 2 + floor, rtol=1e-4)


def test_a_neuron_that_does_not_move_has_no_curvature(network, pixels):
    still = curvature.matched_width(network, pixels, jnp.zeros(SHAPE), 0.02)
    for kernel in (relu_curved, relu_boxed):
        act = [Partial(kernel, tau=width) for width in still]
        product = curvature.hessian(network, pixels, LABEL, act=act, score=logit)(draw(7))
        np.testing.assert_allclose(product, 0, atol=1e-6)


def test_a_network_that_ignores_act_has_no_matched_width(network, pixels):
    with pytest.raises(ValueError, match="SmoothInside does not call the activation"):
        curvature.matched_width(SmoothInside(network), pixels, draw(6), 0.02)


@pytest.mark.parametrize("kernel", [relu_curved, relu_boxed])
def test_kernels_have_the_mass_of_the_kink(double, kernel):
    z, tau = jnp.linspace(-50, 50, 400_001), 0.04
    first = jax.vmap(jax.grad(lambda z: kernel(z, tau)))
    second = jax.vmap(jax.grad(jax.grad(lambda z: kernel(z, tau))))(z)
    np.testing.assert_array_equal(kernel(z, tau), jnp.maximum(z, 0))
    np.testing.assert_array_equal(first(z), z > 0)
    # the curved kernel has tails: 1e-5 of its mass is outside
    np.testing.assert_allclose(jnp.trapezoid(second, z), 1, atol=1e-3)
    assert (second >= 0).all()


def test_box_is_as_wide_as_its_option(double):
    second = jax.vmap(jax.grad(jax.grad(lambda z: relu_boxed(z, 0.04))))
    np.testing.assert_allclose(
        second(jnp.asarray([-0.21, -0.19, 0.0, 0.19, 0.21])), [0, 2.5, 2.5, 2.5, 0]
    )


# --- fidelity


def test_fidelity_is_cosine_and_ratio_of_products(network, pixels):
    surrogates = [None, WIDE, curvature.Matched(), curvature.Matched(0, 2)]
    steps = [0.01, 0.05]
    found = curvature.fidelity(
        network, pixels, LABEL, surrogates=surrogates, steps=steps, directions=2, key=KEY
    )
    assert found.cosine.shape == found.ratio.shape == (2, 4, 2)
    v = jax.random.rademacher(jax.random.fold_in(KEY, 1), SHAPE, pixels.dtype)
    for j, h in enumerate(steps):
        true = curvature.secant(network, pixels, LABEL, step=h)(v).ravel()
        for i, one in enumerate(surrogates):
            act = (
                one.activations(network, pixels, v, h)
                if isinstance(one, curvature.Matched)
                else one
            )
            seen = curvature.hessian(network, pixels, LABEL, act=act)(v).ravel()
            sizes = np.linalg.norm(seen), np.linalg.norm(true)
            np.testing.assert_allclose(
                found.cosine[1, i, j], seen @ true / np.prod(sizes), rtol=1e-6
            )
            np.testing.assert_allclose(found.ratio[1, i, j], sizes[0] / sizes[1], rtol=1e-6)


# --- maps


GRAD = interpreters.grad_interpreter()


def explained(model, x, interpreter=GRAD):
    return interpreter.surrogate(model, x, LABEL, curvature.CONTEXT).map


@pytest.mark.parametrize("make", [interpreters.grad_interpreter, interpreters.cam_interpreter])
def test_map_jacobian_is_that_of_jax(network, pixels, make):
    interpreter = make()
    jacobian = curvature.map_jacobian(interpreter, network, pixels, LABEL)
    true = jax.jacobian(lambda x: explained(network, x, interpreter))(pixels).reshape(-1, 192)
    np.testing.assert_allclose(
        jacobian(draw(1)).ravel(), true @ draw(1).ravel(), rtol=1e-9, atol=1e-12
    )
    pairs = curvature.singular_values(jacobian, pixels, 2, depth=60, key=KEY)
    np.testing.assert_allclose(pairs.values, np.linalg.svd(true)[1][:2], rtol=1e-6)


def test_map_hessian_is_that_of_jax(network, pixels):
    target = jnp.asarray(np.random.default_rng(3).uniform(size=(8, 8)))
    context = Context(tau=0.2)
    operator = curvature.map_hessian(GRAD, network, pixels, LABEL, target, context)

    def loss(x):
        return map_l2(GRAD.surrogate(network, x, LABEL, context).map, target)

    v = draw(1)
    true = jax.jvp(jax.grad(loss), (pixels,), (v,))[1]
    np.testing.assert_allclose(operator(v), true, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("threat", [threats.linf(8 / 255), threats.l2(0.3)], ids=["linf", "l2"])
def test_lipschitz_shows_an_image_in_the_ball_whose_map_changed(network, pixels, threat):
    found = curvature.lipschitz(GRAD, network, pixels, LABEL, threat=threat, steps=15, key=KEY)
    delta = found.image - pixels
    if threat.name == "linf":
        assert np.abs(delta).max() <= 8 / 255 + 1e-9
    else:
        assert np.linalg.norm(delta) <= 0.3 + 1e-9
    np.testing.assert_allclose(found.map, explained(network, found.image))
    change = np.linalg.norm(found.map - explained(network, pixels))
    np.testing.assert_allclose(found.change, change, rtol=1e-9)
    np.testing.assert_allclose(found.constant, change / np.linalg.norm(delta), rtol=1e-6)
    rng = np.random.default_rng(0)
    # as far as random images of the ball go
    for _ in range(10):
        noise = threat.project(jnp.asarray(rng.choice([-1.0, 1.0], SHAPE)), pixels)
        assert (
            np.linalg.norm(explained(network, pixels + noise) - explained(network, pixels)) < change
        )


def test_lipschitz_on_a_map_that_does_not_move(double, make_linear):
    """CAM of a network that is linear in each pixel moves with the image; a constant map cannot."""
    still = interpreters.from_explain("still", lambda model, image, label: jnp.full((4, 4), 0.5))
    x = jnp.full((4, 4, 3), 0.5)
    found = curvature.lipschitz(still, make_linear(), x, jnp.int32(0), steps=3, key=KEY)
    assert found.change == found.constant == 0
    jacobian = curvature.map_jacobian(still, make_linear(), x, jnp.int32(0))
    assert not curvature.singular_values(jacobian, x, 1, depth=2, key=KEY).values.any()


def test_the_drivers_agree(network, pixels):
    host, loop = (
        curvature.lipschitz(GRAD, network, pixels, LABEL, steps=4, key=KEY, driver=driver)
        for driver in ("host", "fori")
    )
    np.testing.assert_allclose(host.image, loop.image, atol=1e-12)


# --- composition


def test_they_compose_with_jit_and_vmap(make_small):
    model = make_small()
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(2, *SHAPE)), jnp.float32)

    def examined(image, key):
        operator = curvature.hessian(model, image, LABEL, act=WIDE)
        return (
            curvature.eigenpairs(operator, image, 1, depth=6, key=key).values,
            curvature.softmax_spectrum(model, image, LABEL, k=2).values,
            curvature.moments(operator, image, probes=2, key=key),
            curvature.secant(model, image, LABEL, step=0.01)(image),
        )

    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(examined))(images, keys)
    for i in range(2):
        alone = examined(images[i], keys[i])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            # float32 sums in another order
            np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_other_images_and_widths_need_no_new_program(make_small):
    model = make_small()

    def examine(seed, tau):
        x = jnp.asarray(np.random.default_rng(seed).uniform(size=SHAPE), jnp.float32)
        operator = curvature.hessian(model, x, LABEL, act=Partial(relu_curved, tau=tau))
        curvature.eigenpairs(operator, x, 1, depth=3, key=KEY)

    examine(0, 0.1)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        import logging

        compiled = []
        handler = logging.Handler()
        handler.emit = lambda record: compiled.append(record.getMessage())
        patch.setattr(logging.getLogger("jax._src.interpreters.pxla"), "propagate", False)
        logging.getLogger("jax._src.interpreters.pxla").addHandler(handler)
        examine(1, 0.01)
        logging.getLogger("jax._src.interpreters.pxla").removeHandler(handler)
    assert compiled == []


def test_products_are_exact_where_the_default_is_not(make_small):
    """Every dot and convolution of a product says HIGHEST, whatever the process asks for."""
    model, x = make_small(), jnp.full(SHAPE, 0.4, jnp.float32)

    def product(x):
        with jax.default_matmul_precision("bfloat16"):
            operator = curvature.hessian(model, x, LABEL, act=WIDE)
            return operator(x), curvature.along(operator, x)

    text = str(jax.make_jaxpr(product)(x))
    assert "HIGHEST" in text and "BF16" not in text and "DEFAULT" not in text


# --- real networks


@pytest.fixture(scope="module")
def resnet20(data_dir):
    return models.load("cifar_resnet20", data_dir / "cifar10_resnet20.npz")


# ten times what a float32 run of the oracle's own code reaches (goldens.md)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, act, tolerance",
    [
        ("r", None, 2e-5),
        ("sigma", relu_sigmoid(1.0), 1e-5),
        ("h", Partial(relu_h, tau=1e-4), 1e-3),
    ],
)
def test_products_are_those_of_the_goldens(data_dir, resnet20, name, act, tolerance):
    goldens = np.load(data_dir / "goldens_resnet20.npz")
    for score, kind in ((log_odds, "logodds_t"), (logit, "logit_t")):
        for i in range(4):
            x, v, true = (
                jnp.asarray(goldens[key][i].transpose(1, 2, 0), jnp.float32)
                for key in ("in/xa", "in/v", f"xa/hvp_{name}/{kind}")
            )
            label = jnp.int32(goldens["in/t"][i])
            found = curvature.hessian(resnet20, x, label, act=act, score=score)(v)
            np.testing.assert_allclose(found, true, rtol=0, atol=tolerance * np.abs(true).max())


@pytest.mark.slow
def test_table_of_the_literature_is_found_again(data_dir, resnet20):
    """Method §12: median cosine with the secant on eight images, at one and four pixel values."""
    images = np.load(data_dir / "cifar10_test100.npz")
    surrogates = [
        Partial(relu_h, tau=1e-4),
        relu_sigmoid(1.0),
        Partial(relu_curved, tau=1e-2),
        curvature.Matched(0, 2),
        curvature.Matched(),
    ]
    expected = [(0.42, 0.18), (0.27, 0.36), (0.81, 0.42), (0.82, 0.53), (0.86, 0.56)]
    cosines = [
        curvature.fidelity(
            resnet20,
            jnp.asarray(images["images"][i] / 255, jnp.float32),
            jnp.int32(images["labels"][i]),
            surrogates=surrogates,
            steps=[1 / 255, 4 / 255],
            key=jax.random.key(i),
        ).cosine
        for i in range(8)
    ]
    found = np.median(np.concatenate(cosines), axis=0)
    np.testing.assert_allclose(found, expected, atol=0.05)
