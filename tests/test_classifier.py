"""What is refused as a classifier, and in which words."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from adv2_jax import attack, explain, interpreters, models, select
from adv2_jax.classifier import abstract_pass, num_classes, static_leaves
from adv2_jax.data import ImageSet
from adv2_jax.models import Masked

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
        (Without, "Without has no method head: a classifier is a pytree with features"),
        (lambda rngs: object(), "object has no method features"),
        (lambda rngs: Plain(), "Plain is not a pytree"),
        (lambda rngs: Linen(), "Linen is not a pytree: .* a Linen module needs its weights beside it"),
        (Flattened, r"Flattened\.features must give floating-point \[h, w, C\], got float32 \[256\]"),
        (Pair, r"Pair\.head must give one array logits \[K\], got tuple"),
        (Rounded, r"Rounded\.head must give floating-point logits \[K\], got int32 \[5\]"),
        (NoAct, r"cannot take images of \[8, 8, 3\]: TypeError: .*act"),
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
        ({"use_running_average": False}, r"set to training: norm \(BatchNorm\) uses batch statistics; call its eval\(\) first"),
        ({"deterministic": False}, r"set to training: dropout \(Dropout\) is random; call its eval\(\) first"),
    ],
)
def test_training_mode_is_refused(change, message):
    net, right = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    net.set_attributes(**change)
    for use in (
        lambda: num_classes(net, SHAPE),
        lambda: attack(net, np.zeros((1, *SHAPE)), [0], interpreter=None, steps=1),
        lambda: num_classes(Masked(net, right), SHAPE),
        lambda: num_classes(Masked(right, net), SHAPE),
    ):
        with pytest.raises(ValueError, match=f"^Net is {message}$"):
            use()
    assert num_classes(Masked(right, right), SHAPE) == 5


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
    assert {array.dtype for array in (logits, maps, result.logits, result.maps, result.float_images)} == {np.dtype(np.float32)}


# One logit.


class OneLogit(Net):
    def head(self, features):
        return super().head(features)[:1]


class TwoLogits(Net):
    def head(self, features):
        return jnp.stack([0, super().head(features)[0]])


def test_one_logit_is_refused_everywhere_and_the_line_says_what_to_write():
    images, one = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8), OneLogit(nnx.Rngs(0))
    for use in (
        lambda: num_classes(one, SHAPE),
        lambda: select(one, ImageSet(images, np.array([0, 1], np.int32))),
        lambda: attack(one, images, [0, 0], interpreter=None),
        *(lambda name=name: explain(one, images, [0, 0], interpreter=name) for name in ("grad", "cam", "mask")),
    ):
        with pytest.raises(ValueError, match=r"^OneLogit\.head gives 1 logits, .* return jnp\.stack\(\[0, z\]\) of it"):
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
    return Named(**{"weights": jnp.asarray(weights, jnp.float32), "bias": bias.astype(np.float32), **changes})


def attacked(model, interpreter="grad", **options):
    images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8)
    _, maps = explain(model, images, [0, 1], interpreter=interpreter)
    return attack(model, images, [2, 3], maps, interpreter=interpreter, steps=2, **options)


@pytest.mark.parametrize("name", ["grad", "cam", "grad_cam", "mask"])
@pytest.mark.parametrize("driver", ["host", "fori"])
def test_leaves_that_are_no_arrays_are_static(name, driver):
    model = named()
    assert num_classes(model, SHAPE) == 5
    result = attacked(model, name, driver=driver)
    x = result.images / np.float32(255)
    np.testing.assert_allclose(result.logits, jax.vmap(lambda x: model.head(model.features(x)))(x), rtol=1e-5)


def test_a_masker_beside_such_a_network(masker, images):
    model = Masked(Wide(jnp.ones((3, 10)), "net"), masker)
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
    assert [record for record in caplog.records if record.getMessage().startswith("Compiling jit(one)")] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": {1, 2}}, r"Named\.name is neither an array of numbers nor hashable, but set: \{1, 2\}"),
        ({"f": np.array(["a"])}, r"Named\.f is neither an array of numbers nor hashable, but ndarray: \['a'\]"),
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
    with pytest.raises(ValueError, match="arrays cannot be passed as metadata fields"):  # JAX says so
        num_classes(Configured(jnp.ones((3, 4)), "net", np.array([3, 4])), SHAPE)


def test_equinox_modules():
    equinox = pytest.importorskip("equinox")

    class Pooled(equinox.Module):
        layers: list
        linear: equinox.nn.Linear

        def __init__(self, key):
            self.layers = [
                equinox.nn.Conv2d(3, 4, 3, padding=1, key=key),
                equinox.nn.MaxPool2d(2, 2),
                equinox.nn.Lambda(jax.nn.relu),
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

    for name in ("grad", "cam", "grad_cam", "mask"):
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


# Traces.


def test_a_network_is_traced_once_for_each_architecture_and_shape():
    traced = []

    class Counting(Net):
        def features(self, image, act=nnx.relu):
            traced.append(image.shape)
            return super().features(image, act)

    for seed in (0, 1, 2):
        assert num_classes(Counting(nnx.Rngs(seed)), SHAPE) == 5
        assert abstract_pass(Counting(nnx.Rngs(seed)), SHAPE)[0].shape == (8, 8, 4)
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
    "attention": lambda net, f: net.linear((jax.nn.softmax(f.sum(-1).ravel())[:, None] * f.reshape(-1, 4)).sum(0)),
    "hidden layer": lambda net, f: net.linear(nnx.relu(f.mean((0, 1)))),
    "activation first": lambda net, f: net.linear(nnx.relu(f).mean((0, 1))),
    "first row": lambda net, f: net.linear(f[0].mean(0)),
}
FIT = ("sum", "convolution first", "affine")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "given", ["cam", interpreters.cam, interpreters.cam_interpreter()], ids=["name", "function", "interpreter"]
)
def test_cam_wants_pooling_and_a_linear_layer(head, given):
    net, images = Headed(head, nnx.Rngs(0)), np.random.default_rng(0).random((1, *SHAPE))
    if head in FIT:
        explain(net, images, [0], interpreter=given)
    else:
        with pytest.raises(
            ValueError, match=r"^cam needs a head of global average pooling and a linear layer: .*; grad_cam takes any"
        ):
            explain(net, images, [0], interpreter=given)
    assert explain(net, images, [0], interpreter="grad_cam")[1].shape == (1, 8, 8)


def test_the_attack_on_cam_wants_it_too():
    with pytest.raises(ValueError, match=r"^cam needs a head"):
        attack(Headed("flat", nnx.Rngs(0)), np.zeros((1, *SHAPE)), [0], np.zeros((1, 8, 8)), interpreter="cam")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "resnet50", "densenet121"])
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
        lambda: attack(net, np.full((1, *image), 0.5), [0], np.zeros((1, *shape)), interpreter=given, steps=1, all_may_fail=True),
    )
    for use in uses:
        if math.prod(shape) >= 4:
            use()
            continue
        with pytest.raises(ValueError) as caught:
            use()
        assert str(caught.value).startswith(f"{interpreter} draws maps {list(shape)} of images {list(image)}: fewer than 2 x 2")


class Strided(Net):
    def features(self, image, act=nnx.relu):
        return super().features(image, act)[::8, ::8]


def test_a_masker_without_means_is_refused_where_they_are_divided_by(masker, make_small, images):
    from adv2_jax.interpreters import rts_interpreter

    bare = nnx.clone(masker)
    bare.means[...] = bare.means[...].at[3].set(0)
    model, maps = Masked(make_small(), bare), np.zeros((6, 8, 8))
    with pytest.raises(ValueError, match="no mean features of some classes"):
        attack(model, images, np.zeros(6, int), maps, interpreter=rts_interpreter(encoder_loss="mean"), steps=1)
    for fine in (rts_interpreter(), rts_interpreter(encoder_loss="mean", encoder_weight=0.0)):
        attack(model, images, np.zeros(6, int), maps, interpreter=fine, steps=1)
