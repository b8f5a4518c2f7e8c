"""Maps of Grad-CAM++, LayerCAM and occlusion against pytorch-grad-cam and captum, from a file that make_map_goldens.py wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import make_map_goldens as goldens
import numpy as np
import pytest

from adv2_jax import interpreters
from adv2_jax.losses import logit
from adv2_jax.maps import min_max

EXPECTED = np.load(goldens.PATH)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Twin:
    """The network of make_map_goldens.py."""

    first: jax.Array
    second: jax.Array
    last: jax.Array
    power: int = dataclasses.field(metadata={"static": True})

    def features(self, image, act=jax.nn.relu):
        x = image[None]
        for kernel in (self.first, self.second):
            x = act(
                jax.lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return x[0]

    def head(self, features):
        return (features**self.power).mean((0, 1)) @ self.last


@pytest.fixture
def twin(double):
    arrays = {key: jnp.asarray(array, float) for key, array in goldens.drawn().items()}
    return lambda power: (Twin(*(arrays[key] for key in goldens.SHAPES), power), arrays["image"])


@pytest.mark.parametrize("head", goldens.HEADS)
@pytest.mark.parametrize("name", ["grad_cam_pp", "layer_cam"])
def test_pytorch_grad_cam(twin, name, head):
    model, image = twin(goldens.HEADS[head])
    actual = getattr(interpreters, name)(model, image, goldens.LABEL)
    # it scales maps in float32; what it adds to denominators, 1e-6, is nothing beside 2 g² here
    np.testing.assert_allclose(actual, EXPECTED[f"{name}/{head}"], atol=1e-6)
    assert np.ptp(actual) == 1


@pytest.mark.parametrize("name", goldens.PATCHES)
def test_captum(twin, name):
    model, image = twin(1)
    patch, stride = goldens.PATCHES[name]
    actual = interpreters.occlusion(
        model, image, goldens.LABEL, patch=patch, stride=stride, fill=goldens.FILL, score=logit
    )
    expected = min_max(jnp.asarray(EXPECTED[f"occlusion/{name}"], float))
    np.testing.assert_allclose(actual, expected, atol=1e-6)  # captum averages in float32
