"""Grad-CAM++ and LayerCAM against their formulas in NumPy, on heads that are linear and that are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import interpreters
from adv2_jax.interpreters.activation_maps import (
    head_weights,
    raw_cam,
    raw_grad_cam,
    raw_grad_cam_pp,
    raw_layer_cam,
)

LABEL = 1
H, W, C, K = 3, 4, 5, 3


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Powers:
    """Features are the channels of an image; the head is the mean of their powers, weighted by position and channel."""

    power: int
    by_position: bool = True

    @property
    def weights(self):
        random = np.random.default_rng(7)
        weights = random.standard_normal((H, W, C, K))
        return weights if self.by_position else np.broadcast_to(weights[:1, :1], weights.shape)

    def features(self, image, act=jax.nn.relu):
        return image

    def head(self, features):
        return jnp.einsum("hwc,hwck->k", features**self.power, self.weights) / (H * W)


HEADS = [Powers(1, by_position=False), Powers(1), Powers(2), Powers(3)]
MAPS = {"grad_cam_pp": raw_grad_cam_pp, "layer_cam": raw_layer_cam}


@pytest.fixture
def features(double):
    """Not negative, as after a ReLU; some are 0, and one channel is 0 everywhere."""
    values = np.maximum(np.random.default_rng(3).standard_normal((H, W, C)), 0)
    values[..., 2] = 0
    return jnp.asarray(values)


def slopes(head, features):
    """g by hand, float64."""
    a = np.asarray(features)
    return head.power * a ** (head.power - 1) * head.weights[..., LABEL] / (H * W)


def literal_grad_cam_pp(g, a):
    """Eq. 19 and 7 of the paper, entry by entry."""
    total = np.zeros((H, W))
    for k in range(C):
        weight = 0.0
        for i in range(H):
            for j in range(W):
                if g[i, j, k] == 0:
                    continue
                powers = 2 * g[i, j, k] ** 2 + a[..., k].sum() * g[i, j, k] ** 3
                weight += g[i, j, k] ** 2 / powers * max(g[i, j, k], 0)
        total += weight * a[..., k]
    return np.maximum(total, 0)


def literal_layer_cam(g, a):
    return np.maximum((np.maximum(g, 0) * a).sum(-1), 0)


LITERAL = {"grad_cam_pp": literal_grad_cam_pp, "layer_cam": literal_layer_cam}


@pytest.mark.parametrize("head", HEADS, ids=repr)
@pytest.mark.parametrize("name", MAPS)
def test_formulas(features, name, head):
    expected = LITERAL[name](slopes(head, features), np.asarray(features))
    assert np.ptp(expected) > 0.01
    actual = MAPS[name](head, features, LABEL)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)
    scaled = (expected - expected.min()) / np.ptp(expected)
    np.testing.assert_allclose(
        getattr(interpreters, name)(head, features, LABEL), scaled, atol=1e-12
    )


def test_grad_cam_pp_of_a_pooled_linear_head_in_closed_form(features):
    """alpha is the same everywhere: w_k = ReLU(w_kc) / (2 + w_kc mean a_k)."""
    head, a = HEADS[0], np.asarray(features)
    w = np.maximum(head.weights[0, 0, :, LABEL], 0)
    expected = a @ (w / (2 + w * a.mean((0, 1))))
    np.testing.assert_allclose(raw_grad_cam_pp(head, features, LABEL), expected, rtol=1e-12)


def test_layer_cam_is_grad_cam_where_no_slope_is_negative(features):
    """With a pooled linear head, and CAM where all its weights are positive."""
    head = HEADS[0]
    positive = jnp.asarray(head.weights[0, 0, :, LABEL] > 0)
    kept = features * positive
    layer = raw_layer_cam(head, kept, LABEL)
    np.testing.assert_allclose(layer, raw_grad_cam(head, kept, LABEL), rtol=1e-12)
    np.testing.assert_allclose(layer * H * W, raw_cam(head, kept, LABEL), rtol=1e-12)
    # and without this: channels of negative weights are left out, not subtracted
    expected = features @ jnp.maximum(head_weights(head, features, LABEL), 0)
    np.testing.assert_allclose(raw_layer_cam(head, features, LABEL), expected, rtol=1e-12)
    assert (raw_grad_cam(head, features, LABEL) < layer).any()


@pytest.mark.parametrize("head", HEADS, ids=repr)
@pytest.mark.parametrize("name", MAPS)
def test_gradient_of_the_surrogate_is_that_of_central_differences(features, slope, name, head):
    """Through the gradient of the head too, which of a head that is not linear depends on the features."""
    surrogate = getattr(interpreters, f"{name}_interpreter")().surrogate
    v = np.random.default_rng(0).normal(size=features.shape)
    x = features + 0.1  # clear of the kinks at 0

    def loss(x):
        m = surrogate(head, x, LABEL, None).map
        return jnp.sum(jnp.cos(jnp.arange(m.size).reshape(m.shape)) * m**2)

    along = jnp.vdot(jax.grad(loss)(x), v)
    np.testing.assert_allclose(along, slope(loss, x, v), rtol=1e-7)


@pytest.mark.parametrize("name", MAPS)
def test_slopes_too_small_for_their_squares(name):
    """Half precision and deep heads: g² and g³ would underflow in float32, and 0/0 be drawn."""

    @jax.tree_util.register_static
    class Faint:
        def features(self, image, act=jax.nn.relu):
            return image

        def head(self, features):
            return 1e-30 * features.mean((0, 1))

    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 3, 3)), jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: MAPS[name](Faint(), x, LABEL)[0, 0])(x)
    # the slope is that of the mean, 1/9, and Grad-CAM++ sums alpha = 1/2 over nine positions
    factor = {"grad_cam_pp": 1 / 2, "layer_cam": 1 / 9}[name]
    np.testing.assert_allclose(value * 1e30, factor * x[0, 0, LABEL], rtol=1e-5)
    expected = np.zeros((3, 3, 3))
    expected[0, 0, LABEL] = factor
    np.testing.assert_allclose(gradient * 1e30, expected, atol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_a_head_without_slope_has_an_empty_map(name):
    @jax.tree_util.register_static
    class Deaf:
        def features(self, image, act=jax.nn.relu):
            return image

        def head(self, features):
            return jnp.arange(3.0) + 0 * features.sum()

    x = jnp.ones((3, 3, 3))
    m, gradient = jax.value_and_grad(lambda x: getattr(interpreters, name)(Deaf(), x, LABEL).sum())(
        x
    )
    assert m == 0 and not gradient.any()
