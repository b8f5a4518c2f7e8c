"""What is refused as a classifier, and in which words."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from adv2_jax import attack, explain
from adv2_jax.classifier import num_classes
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
