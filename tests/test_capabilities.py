"""What is refused as a classifier, and in which words."""

import dataclasses
import math
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from adv2_jax import attack, explain, interpreters, models, select
from adv2_jax.capabilities import (
    check_activation,
    check_features,
    lacks,
    num_classes,
    static_leaves,
)
from adv2_jax.data import ImageSet
from adv2_jax.models import ClassifierWithMasker

SHAPE = (8, 8, 3)


class Net(nnx.Module):
    """Convolution, BatchNorm, dropout, linear: what users bring, set to inference."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(4, 5, rngs=rngs)
        self.eval()

    def features(self, image, act=nnx.relu):
        return self.dropout(act(self.norm(self.conv(image))))

    def head(self, features):
        return self.linear(features.mean((0, 1)))


class Without(Net):
    head = None


class Flattened(Net):
    def features(self, image, act=nnx.relu):
        return super().features(image, act).reshape(-1)


class Pair(Net):
    def head(self, features):
        return super().head(features), features


class NoAct(Net):
    def features(self, image):
        return super().features(image)


class Picky(Net):
    def features(self, image, act=nnx.relu):
        return super().features(image.reshape(4, 4, 3), act)


class Noting(Net):
    def features(self, image, act=nnx.relu):
        self.seen = nnx.data(image)
        return super().features(image, act)


class Rounded(Net):
    def head(self, features):
        return super().head(features).astype(int)


@dataclasses.dataclass
class Plain:
    """Not registered with JAX."""

    def features(self, image, act=nnx.relu):
        return image

    def head(self, features):
        return features.mean((0, 1))


class Linen(linen.Module):
    def features(self, image, act=nnx.relu):
        return image

    def head(self, features):
        return features.mean((0, 1))


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


def test_a_classifier_is_known_by_its_classes(net):
    assert num_classes(net, SHAPE) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Without, "Without has features but no method head: a classifier is a pytree with logits"),
        (lambda rngs: object(), "object has no methods logits, or features and head: a classifier"),
        (lambda rngs: Plain(), "Plain is not a pytree"),
        (
            lambda rngs: Linen(),
            "Linen is not a pytree: .* a Linen module needs its weights beside it",
        ),
        (Pair, r"Pair\.head must give one array logits \[K\], got tuple"),
        (Rounded, r"Rounded\.head must give floating-point logits \[K\], got int32 \[5\]"),
        (Picky, r"the network cannot take images of \[8, 8, 3\]: TypeError: .*reshape"),
        (Noting, "TraceContextError: Cannot mutate 'Noting'"),
    ],
)
def test_what_is_no_classifier_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        num_classes(make(nnx.Rngs(0)), SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_running_average": False},
            r"set to training: norm \(BatchNorm\) uses batch statistics; call its eval\(\) first",
        ),
        (
            {"deterministic": False},
            r"set to training: dropout \(Dropout\) is random; call its eval\(\) first",
        ),
    ],
)
def test_training_mode_is_refused(change, message):
    net, right = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    net.set_attributes(**change)
    for use in (
        lambda: num_classes(net, SHAPE),
        lambda: attack(net, np.zeros((1, *SHAPE)), [0], interpreter=None, steps=1),
        lambda: num_classes(ClassifierWithMasker(net, right), SHAPE),
        lambda: num_classes(ClassifierWithMasker(right, net), SHAPE),
    ):
        with pytest.raises(ValueError, match=f"^Net is {message}$"):
            use()
    assert num_classes(ClassifierWithMasker(right, right), SHAPE) == 5


def test_logits_that_are_not_finite_are_refused():
    class Broken(Net):
        def head(self, features):
            return jnp.log(-1 - jnp.abs(super().head(features)))

    images, broken = np.full((2, *SHAPE), 0.5), Broken(nnx.Rngs(0))
    for use in (
        lambda: explain(broken, images, [0, 1], interpreter="cam"),
        lambda: attack(broken, images, [0, 1], interpreter=None, steps=1),
    ):
        with pytest.raises(ValueError, match="not finite numbers"):
            use()


def test_half_precision_comes_out_as_float32():
    class Half(Net):
        def features(self, image, act=nnx.relu):
            return super().features(image, act).astype(jnp.bfloat16)

    images, half = np.random.default_rng(0).random((2, *SHAPE)), Half(nnx.Rngs(0))
    logits, maps = explain(half, images, [0, 1], interpreter="cam")
    result = attack(half, images, [1, 2], maps, interpreter="cam", steps=2)
    assert {
        array.dtype for array in (logits, maps, result.logits, result.maps, result.float_images)
    } == {np.dtype(np.float32)}


# One logit.


class OneLogit(Net):
    def head(self, features):
        return super().head(features)[:1]


class TwoLogits(Net):
    def head(self, features):
        return jnp.stack([0, super().head(features)[0]])


def test_one_logit_is_refused_everywhere_and_the_line_says_what_to_write():
    images, one = (
        np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8),
        OneLogit(nnx.Rngs(0)),
    )
    for use in (
        lambda: num_classes(one, SHAPE),
        lambda: select(one, ImageSet(images, np.array([0, 1], np.int32))),
        lambda: attack(one, images, [0, 0], interpreter=None),
        *(
            lambda name=name: explain(one, images, [0, 0], interpreter=name)
            for name in ("grad", "cam", "mask")
        ),
    ):
        with pytest.raises(
            ValueError,
            match=r"^OneLogit\.head gives 1 logits, .* return jnp\.stack\(\[0, z\]\) of it",
        ):
            use()
    two = TwoLogits(nnx.Rngs(0))
    logits, _ = explain(two, images, [0, 1], interpreter="cam")
    z = np.asarray(jax.vmap(lambda x: one.head(one.features(x))[0])(images / np.float32(255)))
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1], jax.nn.sigmoid(z), rtol=1e-5)


# Leaves that are no arrays.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    """Leaves of every kind: arrays of JAX and NumPy, a string, a function, numbers that are used as such."""

    weights: jax.Array
    bias: np.ndarray
    name: str = "net"
    f: object = jnp.tanh
    stride: int = 2
    scale: float = 0.5
    flags: tuple = (True, None)

    def features(self, image, act=nnx.relu):
        assert self.name == "net" and self.flags[0] is True
        return act(self.f(image[:: self.stride, :: self.stride] @ self.weights) * self.scale)

    def head(self, features):
        return features.mean((0, 1)) + self.bias


def named(**changes):
    rng = np.random.default_rng(0)
    weights, bias = rng.standard_normal((3, 5)), rng.standard_normal(5)
    return Named(
        **{"weights": jnp.asarray(weights, jnp.float32), "bias": bias.astype(np.float32), **changes}
    )


def attacked(model, interpreter="grad", **options):
    images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8)
    _, maps = explain(model, images, [0, 1], interpreter=interpreter)
    return attack(model, images, [2, 3], maps, interpreter=interpreter, steps=2, **options)


@pytest.mark.parametrize(
    ("name", "driver"),
    [*((n, "host") for n in ("grad", "cam", "grad_cam", "mask")), ("grad", "fori")],
)
def test_leaves_that_are_no_arrays_are_static(name, driver):
    model = named()
    assert num_classes(model, SHAPE) == 5
    result = attacked(model, name, driver=driver)
    x = result.images / np.float32(255)
    np.testing.assert_allclose(
        result.logits, jax.vmap(lambda x: model.head(model.features(x)))(x), rtol=1e-5
    )


def test_a_masker_beside_such_a_network(masker, images):
    model = ClassifierWithMasker(Wide(jnp.ones((3, 10)), "net"), masker)
    assert explain(model, images, np.zeros(6, int), interpreter="rts")[1].shape == (6, 8, 8)
    with pytest.raises(ValueError, match=r"not a Wide$"):
        explain(model.classifier, images, np.zeros(6, int), interpreter="rts")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Wide:
    weights: jax.Array
    name: str

    def features(self, image, act=nnx.relu):
        return act(image @ self.weights)

    def head(self, features):
        return features.mean((0, 1))


def test_static_leaves_compare_by_value_and_type():
    def structure(**changes):
        return jax.tree.structure(static_leaves(named(**changes)))

    assert structure() == structure() and hash(structure()) == hash(structure())
    for change in ({"name": "other"}, {"f": jnp.sin}, {"stride": 3}, {"scale": 1}, {"scale": 1.0}):
        assert structure() != structure(**change)
    assert structure(scale=1) != structure(scale=1.0)
    arrays = named().weights
    assert static_leaves(arrays) is arrays


def test_equal_static_leaves_compile_nothing(caplog):
    attacked(named())
    with jax.log_compiles():
        attacked(named(weights=jnp.zeros((3, 5))))
    assert [
        record for record in caplog.records if record.getMessage().startswith("Compiling jit(one)")
    ] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": {1, 2}},
            r"Named\.name is neither an array of numbers nor hashable, but set: \{1, 2\}",
        ),
        (
            {"f": np.array(["a"])},
            r"Named\.f is neither an array of numbers nor hashable, but ndarray: \['a'\]",
        ),
        ({"flags": (True, bytearray(b"x"))}, r"Named\.flags\[1\] is neither .* bytearray"),
    ],
)
def test_leaves_that_do_not_compare_are_refused_with_their_path(change, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        attacked(named(**change))
    assert "\n" not in str(caught.value)


def test_static_fields_may_be_lists_but_no_arrays():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Configured(Wide):
        sizes: object = dataclasses.field(metadata={"static": True})

    assert num_classes(Configured(jnp.ones((3, 4)), "net", [3, 4]), SHAPE) == 4
    # JAX says so
    with pytest.raises(ValueError, match="arrays cannot be passed as metadata fields"):
        num_classes(Configured(jnp.ones((3, 4)), "net", np.array([3, 4])), SHAPE)


@pytest.mark.slow
def test_equinox_modules():
    equinox = pytest.importorskip("equinox")

    class Pooled(equinox.Module):
        layers: list
        linear: equinox.nn.Linear

        def __init__(self, key):
            self.layers = [
                equinox.nn.Conv2d(3, 4, 3, padding=1, key=key),
                equinox.nn.MaxPool2d(2, 2),
                equinox.nn.Lambda(jnp.tanh),
                equinox.nn.Dropout(0.5, inference=True),
            ]
            self.linear = equinox.nn.Linear(4, 5, key=key)

        def features(self, image, act=jax.nn.relu):
            x = image.transpose(2, 0, 1)
            for layer in self.layers:
                x = layer(x)
            return act(x.transpose(1, 2, 0))

        def head(self, features):
            return self.linear(features.mean((0, 1)))

    for name in ("grad", "cam"):
        assert not attacked(Pooled(jax.random.key(0)), name).failed.any()


# Linen in training mode.


class Body(linen.Module):
    """What a user's Linen network may hold; `own` says how it normalises."""

    train: bool
    own: str = "batch"
    rate: float = 0.5

    @linen.compact
    def __call__(self, x, act):
        x = linen.Conv(4, (3, 3))(x)
        if self.own == "batch":
            x = linen.BatchNorm(use_running_average=not self.train)(x)
        elif self.own == "called":
            x = linen.BatchNorm()(x, use_running_average=not self.train)
        elif self.own == "group":
            x = linen.GroupNorm(2)(x)
        return linen.Dropout(self.rate)(act(x), deterministic=not self.train)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LinenNet:
    variables: dict
    weights: jax.Array
    body: Body = dataclasses.field(metadata={"static": True})

    def features(self, image, act=nnx.relu):
        x = (image - image.mean()) / jnp.maximum(image.std(), 1e-3)
        apply = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
        return self.body.apply(self.variables, x[None], act, **apply)[0][0]

    def head(self, features):
        return features.mean((0, 1)) @ self.weights


def linen_net(**options):
    variables = Body(False, **options).init(jax.random.key(0), jnp.zeros((1, *SHAPE)), nnx.relu)
    return lambda train: LinenNet(variables, jnp.ones((4, 5)), Body(train, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"BatchNorm_0 \(BatchNorm\) uses batch statistics; give it use_running_average=True"),
        ({"own": "called"}, r"BatchNorm_0 \(BatchNorm\) uses batch statistics"),
        ({"own": "group"}, r"Dropout_0 \(Dropout\) is random; give it deterministic=True"),
    ],
)
def test_linen_in_training_mode_is_refused_as_often_as_it_is_given(options, message):
    make = linen_net(**options)
    for _ in range(2):  # a trace is remembered
        with pytest.raises(ValueError, match=f"^the network is set to training: {message}"):
            num_classes(make(True), SHAPE)
    assert num_classes(make(False), SHAPE) == 5


def test_group_norm_and_standardised_images_are_no_training():
    assert num_classes(linen_net(own="group", rate=0.0)(True), SHAPE) == 5


# What an interpreter needs.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tokens:
    """Patches of 4 x 4 pixels as tokens, mixed by one attention: logits alone, and no features [h, w, C]."""

    embedding: jax.Array
    out: jax.Array

    def logits(self, image, act=nnx.relu):
        h, w, _ = image.shape
        patches = image.reshape(h // 4, 4, w // 4, 4, 3).swapaxes(1, 2).reshape(-1, 48)
        tokens = act(patches @ self.embedding)
        mixed = jax.nn.softmax(tokens @ tokens.T / 4) @ tokens
        return act(tokens + mixed).mean(0) @ self.out


def tokens(seed=0):
    one, other = jax.random.split(jax.random.key(seed))
    return Tokens(jax.random.normal(one, (48, 16)) / 4, jax.random.normal(other, (16, 5)) / 4)


@pytest.mark.parametrize("name", ["grad", "mask"])
def test_a_network_without_feature_maps_can_be_explained_and_attacked(name):
    x = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8)
    logits, maps = explain(tokens(), x, [0, 1], interpreter=name)
    np.testing.assert_allclose(logits, jax.vmap(tokens().logits)(x / np.float32(255)), rtol=1e-5)
    result = attack(tokens(), x, [2, 3], maps, interpreter=name, steps=4)
    assert np.isfinite(result.maps).all() and (result.images != x).any()


def test_a_masker_beside_a_network_without_feature_maps(masker):
    model = ClassifierWithMasker(tokens(), masker)
    assert lacks(model, "logits", "features", "act") == ["features"]
    with pytest.raises(
        ValueError,
        match="cam needs features and head, and ClassifierWithMasker has no method features",
    ):
        explain(model, np.zeros((1, *SHAPE), np.uint8), [0], interpreter="cam")


class Ravelled(Flattened):
    def head(self, features):
        return self.linear(features.reshape(-1, 4).mean(0))


@pytest.mark.parametrize("name", ["cam", "grad_cam"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            tokens,
            "{} needs features and head, and Tokens has no method features; grad and mask need logits only",
        ),
        (
            lambda: Ravelled(nnx.Rngs(0)),
            r"Ravelled\.features must give floating-point \[h, w, C\], got float32 \[256\]",
        ),
    ],
)
def test_cam_needs_feature_maps(name, make, message):
    with pytest.raises(ValueError, match=f"^{message.format(name)}$"):
        explain(make(), np.zeros((1, *SHAPE), np.uint8), [0], interpreter=name)


def test_grad_needs_no_feature_maps():
    x = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), np.uint8)
    assert np.ptp(explain(Ravelled(nnx.Rngs(0)), x, [0], interpreter="grad")[1]) == 1


RELUS = {
    "jax.nn.relu": jax.nn.relu,
    "maximum": lambda z: jnp.maximum(z, 0),
    "maximum, zero first": lambda z: jnp.maximum(0.0, z),
    "jitted": jax.jit(jax.nn.relu),
    "of a scan": lambda z: jax.lax.scan(lambda c, row: (c, jax.nn.relu(row)), 0, z)[1],
}
NO_RELUS = {
    "tanh": jnp.tanh,
    "a clip": lambda z: jnp.clip(z, 0, 1),
    "relu6": jax.nn.relu6,
    "a variance": lambda z: z / jnp.sqrt(jnp.maximum((z**2).mean() - z.mean() ** 2, 0) + 1),
    "LayerNorm": nnx.LayerNorm(4, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)),
}


def with_fixed(activation):
    class Fixed(Net):
        def features(self, image, act=nnx.relu):
            return activation(super().features(image, act))

    return Fixed(nnx.Rngs(0))


@pytest.mark.parametrize("kind", RELUS)
def test_an_activation_that_is_not_passed_on_is_seen(kind):
    with pytest.raises(
        ValueError, match=r"^Fixed does not pass act on: 1 ReLUs stay where act is another function"
    ):
        check_activation(with_fixed(RELUS[kind]), SHAPE)


@pytest.mark.parametrize("kind", NO_RELUS)
def test_what_is_no_relu_may_stay(kind):
    class Fixed(Net):
        def features(self, image, act=nnx.relu):
            return act(NO_RELUS[kind](super().features(image, act)))

    check_activation(Fixed(nnx.Rngs(0)), SHAPE)


def test_images_may_be_clipped_below():
    class Clipping(Net):
        def features(self, image, act=nnx.relu):
            return super().features(jnp.maximum(image, 0), act)

    check_activation(Clipping(nnx.Rngs(0)), SHAPE)


@pytest.mark.parametrize("name", ["grad", "mask"])
def test_a_network_that_takes_no_activation_is_explained_but_not_attacked_blindly(name):
    x, model = np.zeros((1, *SHAPE), np.uint8), NoAct(nnx.Rngs(0))
    _, maps = explain(model, x, [0], interpreter=name)
    with pytest.raises(ValueError, match="NoAct does not pass act on: 1 ReLUs stay"):
        attack(model, x, [1], maps, interpreter=name, steps=2)
    _, maps = explain(model, x, [0], interpreter="cam")
    assert attack(model, x, [1], maps, interpreter="cam", steps=2).images.shape == x.shape


def test_a_smooth_network_need_not_take_an_activation():
    class Smooth(Net):
        def features(self, image):
            return super().features(image, jnp.tanh)

    x, model = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), np.uint8), Smooth(nnx.Rngs(0))
    _, maps = explain(model, x, [0], interpreter="grad")
    assert np.isfinite(attack(model, x, [1], maps, interpreter="grad", steps=2).maps).all()


# Traces.


def test_a_network_is_traced_once_for_each_architecture_and_shape():
    traced = []

    class Counting(Net):
        def features(self, image, act=nnx.relu):
            traced.append(image.shape)
            return super().features(image, act)

    for seed in (0, 1, 2):
        assert num_classes(Counting(nnx.Rngs(seed)), SHAPE) == 5
        assert check_features(Counting(nnx.Rngs(seed)), SHAPE).shape == (8, 8, 4)
    assert len(traced) == 1
    num_classes(Counting(nnx.Rngs(0)), (16, 16, 3))
    assert len(traced) == 2


def test_a_network_that_is_set_to_training_afterwards_is_refused():
    net = Net(nnx.Rngs(0))
    assert num_classes(net, SHAPE) == 5
    net.train()
    with pytest.raises(ValueError, match="set to training"):
        num_classes(net, SHAPE)


# Heads, maps and their sizes.


class Headed(Net):
    def __init__(self, head, rngs):
        super().__init__(rngs)
        self.flat = nnx.Linear(8 * 8 * 4, 5, rngs=rngs)
        self.own = head

    def head(self, features):
        return HEADS[self.own](self, features)


HEADS = {
    "sum": lambda net, f: net.linear(f.sum((0, 1))),
    "convolution first": lambda net, f: jax.vmap(jax.vmap(net.linear))(f).mean((0, 1)),
    "affine": lambda net, f: 3 * net.linear(f.mean((0, 1)) / 2 + 1) - 7,
    "flat": lambda net, f: net.flat(f.reshape(-1)),
    "maximum": lambda net, f: net.linear(f.max((0, 1))),
    "root of a mean of cubes": lambda net, f: net.linear(jnp.cbrt((f**3).mean((0, 1)))),
    "power": lambda net, f: net.linear((f**3).mean((0, 1)) ** (1 / 3)),
    "attention": lambda net, f: net.linear(
        (jax.nn.softmax(f.sum(-1).ravel())[:, None] * f.reshape(-1, 4)).sum(0)
    ),
    "hidden layer": lambda net, f: net.linear(nnx.relu(f.mean((0, 1)))),
    "activation first": lambda net, f: net.linear(nnx.relu(f).mean((0, 1))),
    "first row": lambda net, f: net.linear(f[0].mean(0)),
}
FIT = ("sum", "convolution first", "affine")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "given",
    ["cam", interpreters.cam, interpreters.cam_interpreter()],
    ids=["name", "function", "interpreter"],
)
def test_cam_wants_pooling_and_a_linear_layer(head, given):
    net, images = Headed(head, nnx.Rngs(0)), np.random.default_rng(0).random((1, *SHAPE))
    if head in FIT:
        explain(net, images, [0], interpreter=given)
    else:
        with pytest.raises(
            ValueError,
            match=r"^cam needs a head of global average pooling and a linear layer: .*; grad_cam takes any",
        ):
            explain(net, images, [0], interpreter=given)
    assert explain(net, images, [0], interpreter="grad_cam")[1].shape == (1, 8, 8)


def test_the_attack_on_cam_wants_it_too():
    with pytest.raises(ValueError, match=r"^cam needs a head"):
        attack(
            Headed("flat", nnx.Rngs(0)),
            np.zeros((1, *SHAPE)),
            [0],
            np.zeros((1, 8, 8)),
            interpreter="cam",
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *product(("cifar_resnet20", "resnet18", "resnet50", "densenet121"), [jnp.float32]),
        *product(("cifar_resnet20", "resnet50"), [jnp.bfloat16, jnp.float16]),
    ],
)
def test_our_networks_have_such_heads(randomised, name, dtype):
    options = {"growth": 4} if name == "densenet121" else {}
    network = randomised(lambda: models.build(name, num_classes=10, width=8, **options))
    network = jax.tree.map(lambda leaf: leaf.astype(dtype), network)
    interpreters.cam_interpreter().check(network, (64, 64, 3))


@pytest.mark.parametrize("interpreter", ["cam", "grad_cam", "grad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (1, 4), (2, 2)])
def test_maps_of_fewer_than_four_entries_are_refused(interpreter, shape):
    image, net = (*(8 * side for side in shape), 3), Strided(nnx.Rngs(0))
    given = interpreters.grad_interpreter(pool=8) if interpreter == "grad" else interpreter
    uses = (
        lambda: explain(net, np.full((1, *image), 0.5), [0], interpreter=given),
        lambda: attack(
            net,
            np.full((1, *image), 0.5),
            [0],
            np.zeros((1, *shape)),
            interpreter=given,
            steps=1,
            all_may_fail=True,
        ),
    )
    for use in uses:
        if math.prod(shape) >= 4:
            use()
            continue
        with pytest.raises(ValueError) as caught:
            use()
        assert str(caught.value).startswith(
            f"{interpreter} draws maps {list(shape)} of images {list(image)}: fewer than 2 x 2"
        )


class Strided(Net):
    def features(self, image, act=nnx.relu):
        return super().features(image, act)[::8, ::8]


@pytest.mark.slow
def test_a_masker_without_means_is_refused_where_they_are_divided_by(masker, make_small, images):
    from adv2_jax.interpreters import rts_interpreter

    bare = nnx.clone(masker)
    bare.means[...] = bare.means[...].at[3].set(0)
    model, maps = ClassifierWithMasker(make_small(), bare), np.zeros((6, 8, 8))
    with pytest.raises(ValueError, match="no mean features of some classes"):
        attack(
            model,
            images,
            np.zeros(6, int),
            maps,
            interpreter=rts_interpreter(encoder_loss="mean"),
            steps=1,
        )
    for fine in (rts_interpreter(), rts_interpreter(encoder_loss="mean", encoder_weight=0.0)):
        attack(model, images, np.zeros(6, int), maps, interpreter=fine, steps=1)
