"""Attributions against captum's and zennit's: what they once said in float64, and what they say where they are installed."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_attribution_goldens import (
    BASELINE,
    GAMMA,
    LABEL,
    PATH,
    POINTS,
    SCORES,
    attributions,
    drawn,
)
from make_attribution_goldens import relevance as relevance_by_zennit

from adv2_jax import losses
from adv2_jax.activations import relu, relu_guided
from adv2_jax.interpreters import input_gradient
from adv2_jax.interpreters.gradients import times_input
from adv2_jax.interpreters.path import mean_gradient, path_attribution
from adv2_jax.interpreters.relevance import relevance

NAMES = ("input_x_gradient", "guided_backprop", "integrated_gradients", "smooth_grad")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    first: jax.Array
    bias: jax.Array
    second: jax.Array
    last: jax.Array

    def features(self, image, act=relu):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = image[None]
        for kernel, bias in ((self.first, self.bias), (self.second, jnp.zeros(8))):
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)
            x = act(x + bias.reshape(1, 1, 1, 8))
        return x[0]

    def head(self, features):
        return features.mean((0, 1)) @ self.last


@pytest.fixture(scope="module", params=SCORES)
def ours(request):
    """name/score -> attribution [12, 12, 3], float32."""
    arrays = {key: jnp.asarray(array) for key, array in drawn().items()}
    image, noisy = arrays.pop("image"), arrays.pop("noisy")
    options = {"score": losses.SCORES[request.param]}

    @jax.jit
    def draw(model):
        return {
            "input_x_gradient": times_input(model, image, LABEL, **options)[0],
            "guided_backprop": input_gradient(model, image, LABEL, act=relu_guided, **options)[0],
            "integrated_gradients": path_attribution(
                model, image, LABEL, baseline=BASELINE, points=POINTS, **options
            ),
            "smooth_grad": mean_gradient(model, noisy, LABEL, **options),
        }

    return {f"{name}/{request.param}": values for name, values in draw(Network(**arrays)).items()}


def assert_close(ours, expected):
    """Ten times what is seen: sums of 100 float32 products."""
    for key, values in ours.items():
        largest = np.abs(expected[key]).max()
        np.testing.assert_allclose(values, expected[key], rtol=0, atol=3e-6 * largest)


def test_attributions_are_what_captum_once_said(ours):
    with np.load(PATH) as goldens:
        names = {f"{name}/{score}" for name in NAMES for score in SCORES}
        assert set(goldens.files) == names | {"lrp/logit"}
        assert_close(ours, goldens)


def test_attributions_are_what_captum_says(ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports, and its hooks, are not ours to judge
        pytest.importorskip("torch")
        pytest.importorskip("captum")
        expected = attributions()
    assert_close(ours, expected)


@pytest.fixture(scope="module")
def our_relevance():
    arrays = {key: jnp.asarray(array) for key, array in drawn().items() if key != "noisy"}
    model = Network(arrays["first"], -jnp.abs(arrays["bias"]), arrays["second"], arrays["last"])

    @jax.jit
    def draw(model):
        return relevance(model, arrays["image"], LABEL, gamma=GAMMA, epsilon=0.0)[0]

    return {"lrp/logit": draw(model)}


def test_relevance_is_what_zennit_once_said(our_relevance):
    with np.load(PATH) as goldens:
        assert_close(our_relevance, goldens)


def test_relevance_is_what_zennit_says(our_relevance):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("zennit")
        expected = relevance_by_zennit()
    assert_close(our_relevance, {"lrp/logit": expected})
