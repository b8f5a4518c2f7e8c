"""Deletion and insertion against loops over pixels, and where they are known."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax

from adv2_jax.blending import blurred
from adv2_jax.maps import resize
from adv2_jax.runs.faithfulness import areas

N = 3
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 8, 6, 3), dtype=np.uint8)
MAPS = np.random.default_rng(1).random((N, 4, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1], np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """A network of one layer on pixels."""

    weights: jax.Array

    def logits(self, image, act=jax.nn.relu):
        return jnp.einsum("hwc,hwck->k", image, self.weights)


def linear(seed=2, scale=0.3):
    shape = (*IMAGES.shape[1:], 4)
    return Linear(jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32))


def loop(model, image, label, m, steps):
    """Return both areas, a pixel and a step after the other."""
    x, h, w = image / np.float32(255), *image.shape[:2]
    values = np.asarray(resize(jnp.asarray(m), (h, w)))
    order = sorted(np.ndindex(h, w), key=lambda pixel: -values[pixel])
    blur, curves = np.asarray(blurred(jnp.asarray(x))), []
    for start, end in ((x, np.full_like(x, 0.5)), (blur, x)):
        curve = []
        for step in range(steps + 1):
            shown = start.copy()
            for i, pixel in enumerate(order):
                if i / len(order) < step / steps:
                    shown[pixel] = end[pixel]
            curve.append(float(jnp.exp(log_softmax(model.logits(jnp.asarray(shown)))[label])))
        curves.append(sum((a + b) / 2 / steps for a, b in pairwise(curve)))
    return curves


@pytest.mark.parametrize("steps", [1, 7, 48])
def test_areas_are_those_of_loops_over_pixels(steps):
    found = areas(linear(), IMAGES, LABELS, MAPS, steps=steps)
    expected = np.transpose(
        [loop(linear(), *one, steps) for one in zip(IMAGES, LABELS, MAPS, strict=True)]
    )
    # float32, 48 steps
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_network_that_sees_nothing_keeps_its_probability():
    blind = Linear(jnp.zeros_like(linear().weights))
    np.testing.assert_allclose(areas(blind, IMAGES, LABELS, MAPS), 0.25, rtol=1e-6)


def test_the_map_of_what_counts_deletes_fast_and_inserts_fast():
    """All of the class hangs on four pixels."""
    weights = np.zeros((*IMAGES.shape[1:], 4), np.float32)
    weights[2:4, 2:4, :, 0] = 1
    white = np.full((1, 8, 6, 3), 255, np.uint8)
    white[:, :2], white[:, 4:], white[:, 2:4, :2], white[:, 2:4, 4:] = 0, 0, 0, 0
    right = (weights[..., 0, 0] > 0).astype(np.float32)[None]
    label = np.zeros(1, np.int32)
    good, bad = (areas(Linear(jnp.asarray(weights)), white, label, m) for m in (right, 1 - right))
    assert good.deletion < bad.deletion and good.insertion > bad.insertion


def test_batches_change_nothing_and_a_map_that_is_nan_spoils_no_other():
    maps = MAPS.copy()
    maps[1] = np.nan
    whole, spoilt = (areas(linear(), IMAGES, LABELS, m, batch_size=2) for m in (MAPS, maps))
    apart = areas(linear(), IMAGES, LABELS, MAPS, batch_size=1)
    np.testing.assert_allclose(whole, apart, rtol=1e-6)
    assert np.isnan(np.array(spoilt)[:, 1]).all()
    np.testing.assert_array_equal(np.array(spoilt)[:, [0, 2]], np.array(whole)[:, [0, 2]])
