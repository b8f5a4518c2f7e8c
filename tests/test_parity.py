"""ImageNet networks at full size: what torchvision once said of them in float64, and what it says where it is installed."""

import warnings
from functools import cache, partial

import jax
import numpy as np
import pytest
from flax import nnx
from make_goldens import (
    NAMES,
    PATH,
    drawn,
    photograph,
    summary,
    torchvision_forward,
    torchvision_network,
)

from adv2_jax import models
from adv2_jax.models.convert import from_state_dict, shapes, to_state_dict

pytestmark = pytest.mark.slow


@cache
def network(name):
    abstract = nnx.eval_shape(lambda: models.build(name))
    return from_state_dict(abstract, drawn(shapes(abstract)))


@cache
def answer(name):
    """Last features [7, 7, C], or tokens [197, C], and logits [1000] of the photograph."""

    @jax.jit
    def forward(model, image):
        features = model.features(image)
        return features, model.head(features)

    return [np.asarray(array) for array in forward(network(name), photograph())]


@pytest.fixture
def torch():
    """The module, at float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports are not ours to judge
        torch = pytest.importorskip("torch")
        pytest.importorskip("torchvision")
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_default_dtype(torch.float32)


def assert_close(found, expected):
    """Ten times what is seen: up to 170 convolutions round at 6e-8 each."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_network_says_what_torchvision_once_said(name):
    found = summary(*answer(name))
    with np.load(PATH) as goldens:
        for part, array in found.items():
            assert_close(array, goldens[f"{name}/{part}"])


@pytest.mark.parametrize("name", NAMES)
def test_network_says_what_torchvision_says(name, torch):
    with torch.no_grad():
        expected = torchvision_forward(
            torchvision_network(name), torch.from_numpy(photograph()).double()
        )
    for found, tensor in zip(answer(name), expected, strict=True):
        assert_close(found, tensor.numpy())


# of ViTs the names of timm are written
@pytest.mark.parametrize("name", [ours for ours, theirs in NAMES.items() if ours == theirs])
def test_torchvision_takes_what_is_written(name, torch):
    arrays = to_state_dict(network(name))
    theirs = torchvision_network(name)
    # checks shapes
    keys = theirs.load_state_dict(
        {key: torch.tensor(array) for key, array in arrays.items()}, strict=False
    )
    assert keys.unexpected_keys == []
    assert [key for key in keys.missing_keys if not key.endswith("num_batches_tracked")] == []


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit_base_patch16"])
def test_gradient_of_the_log_odds_is_that_of_torch(name, torch):
    image = torch.from_numpy(photograph()).double().requires_grad_()
    _, logits = torchvision_forward(torchvision_network(name), image)
    (logits[0] - torch.logsumexp(logits[1:], 0)).backward()

    @jax.jit
    @partial(jax.grad, argnums=1)
    def gradient(model, image):
        logits = model.head(model.features(image))
        return logits[0] - jax.nn.logsumexp(logits[1:])

    found = np.asarray(gradient(network(name), photograph()))
    expected = image.grad.numpy()
    # a ReLU within rounding of 0 may switch, and the gradient below it with it: few pixels, but no digit of them is safe
    assert np.median(np.abs(found - expected)) < 1e-5 * np.abs(expected).max()
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
