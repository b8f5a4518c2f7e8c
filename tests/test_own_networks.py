"""The networks of notebooks/, which users write from: loaded by file name as the command line does, explained and attacked."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import adv2_jax as adv2
from adv2_jax import cli
from adv2_jax.activations import relu_h
from adv2_jax.attacks import missing
from adv2_jax.files import write_arrays
from adv2_jax.models import user
from adv2_jax.runs.select import select

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def check(model, images, num_classes):
    """Every interpreter but MASK and RTS draws maps, the smoothed twin another one, and an attack raises the target's probability.

    MASK asks a network for what GRAD asks it for, and takes longer; the command line draws its maps of one network below.
    """
    able = {
        name
        for name, make in adv2.interpreters.INTERPRETERS.items()
        if missing(model, make()) is None
    } - {"mask"}
    for name in able:
        classes = np.arange(len(images))
        logits, maps = adv2.explain(model, images, classes, interpreter=name)
        assert logits.shape == (len(images), num_classes)
        assert maps.min() >= 0 and maps.max() <= 1
        assert np.ptp(maps, axis=(1, 2)).min() > 0.9
    x = jnp.asarray(images[0], jnp.float32) / 255
    plain, smooth = (
        jax.jit(partial(adv2.interpreters.grad, model, label=0, act=act))(x)
        for act in (None, relu_h)
    )
    assert abs(smooth - plain).max() > 1e-3
    targets = np.full(len(images), num_classes - 1)
    attacked = "grad_cam" if "grad_cam" in able else "grad"
    _, maps = adv2.explain(model, images, np.arange(len(images)), interpreter=attacked)
    result = adv2.attack(model, images, targets, maps, interpreter=attacked, warm_steps=5, steps=5)
    before, after = (adv2.metrics.confidence(values, targets) for values in (logits, result.logits))
    assert (after > before).all()


def test_linen_module(photos, tmp_path):
    fresh = user.load(f"{NOTEBOOKS}/linen.py:network")
    check(fresh, photos, 10)
    flat = {key: np.asarray(value) for key, value in flatten_dict(fresh.variables, sep="/").items()}
    flat["params/linear/bias"] = flat["params/linear/bias"] + np.arange(10, dtype=np.float32)
    write_arrays(tmp_path / "parameters.safetensors", flat)
    loaded = user.load(f"{NOTEBOOKS}/linen.py:network", tmp_path / "parameters.safetensors")
    difference = loaded.head(jnp.zeros((4, 4, 32))) - fresh.head(jnp.zeros((4, 4, 32)))
    np.testing.assert_allclose(difference, np.arange(10), atol=1e-6)


def test_equinox_module(photos, tmp_path):
    equinox = pytest.importorskip("equinox")
    fresh = user.load(f"{NOTEBOOKS}/equinox_module.py:network")
    check(fresh, photos, 10)
    other = equinox.tree_at(
        lambda net: net.linear.bias, fresh, fresh.linear.bias + jnp.arange(10.0)
    )
    equinox.tree_serialise_leaves(tmp_path / "network.eqx", other)
    loaded = user.load(f"{NOTEBOOKS}/equinox_module.py:network", tmp_path / "network.eqx")
    difference = loaded.head(jnp.zeros((4, 4, 32))) - fresh.head(jnp.zeros((4, 4, 32)))
    np.testing.assert_allclose(difference, np.arange(10), atol=1e-6)


def test_tokens_without_feature_maps(photos, tmp_path):
    fresh = user.load(f"{NOTEBOOKS}/tokens.py:network")
    check(fresh, photos, 10)
    weights = {name: np.asarray(values) for name, values in fresh.weights.items()}
    np.savez(tmp_path / "weights.npz", **weights)
    logits, _ = adv2.explain(fresh, photos, [0, 0, 0], interpreter="grad")
    np.savez(tmp_path / "images.npz", images=photos, labels=logits.argmax(1))
    words = [
        "--weights",
        str(tmp_path / "weights.npz"),
        "--images",
        str(tmp_path / "images.npz"),
        "--steps",
        "3",
        "--quiet",
    ]
    assert (
        cli.main(
            [
                "attack",
                "--model",
                f"{NOTEBOOKS}/tokens.py:network",
                *words,
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    # those it can be explained by
    assert [row["interpreter"] for row in rows] == ["grad"] * 3 + ["mask"] * 3


def miniature(rng):
    """A graph of every operation there is, and its weights."""
    layers = [
        ("a", "conv", 2, "relu", (3, 3, 3, 8)),
        ("b", "dwconv", 2, "relu", (5, 5, 1, 8)),
        ("c", "dwconv", 1, "none", (3, 3, 1, 8)),
    ]
    ops, weights, last = (
        [{"op": "quantize", "input": "images", "output": "images_int8"}],
        {},
        "images_int8",
    )
    for name, kind, stride, act, shape in layers:
        ops.append(
            {
                "op": kind,
                "name": name,
                "input": last,
                "output": f"{name}/out",
                "stride": stride,
                "padding": "SAME",
                "act": act,
            }
        )
        weights |= {
            f"{name}/kernel": rng.standard_normal(shape),
            f"{name}/bias": rng.standard_normal(shape[-1]),
        }
        last = f"{name}/out"
    ops.append({"op": "add", "inputs": ["b/out", "c/out"], "output": "sum", "act": "none"})
    ops.append({"op": "gap", "input": "sum", "output": "pooled"})
    head = "MobilenetEdgeTPU/Logits/Conv2d_1c_1x1"
    weights |= {
        f"{head}/kernel": rng.standard_normal((1, 1, 8, 6)),
        f"{head}/bias": rng.standard_normal(6),
    }
    return {"ops": ops}, {name: value.astype(np.float32) for name, value in weights.items()}


def test_plain_functions_with_a_dict_of_weights(photos, tmp_path):
    graph, weights = miniature(np.random.default_rng(1))
    (tmp_path / "mini.graph.json").write_text(json.dumps(graph))
    write_arrays(tmp_path / "mini.npz", weights)
    model = user.load(f"{NOTEBOOKS}/mobilenet.py:mobilenet", tmp_path / "mini.npz")
    check(model, photos, 5)
    x = jnp.asarray(photos[0], jnp.float32) / 255
    a = jax.nn.relu(conv(2 * x - 1, weights["a/kernel"], 2) + weights["a/bias"])
    b = jax.nn.relu(conv(a, weights["b/kernel"], 2, groups=8) + weights["b/bias"])
    c = conv(b, weights["c/kernel"], 1, groups=8) + weights["c/bias"]
    # sums of some hundred float32 products of order 1
    np.testing.assert_allclose(model.features(x), b + c, atol=1e-4)


def conv(x, kernel, stride, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x[None],
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=layout,
        feature_group_count=groups,
    )
    return y[0]


def test_mobilenet_gets_the_photographs_right_and_is_fooled(data_dir):
    model = user.load(f"{NOTEBOOKS}/mobilenet.py:mobilenet", data_dir / "mobilenet_edgetpu_224.npz")
    selection = select(model, adv2.data.load(str(data_dir / "photos40_224.npz")), batch_size=8)
    assert (len(selection.indices), selection.left_out, selection.num_classes) == (40, 0, 1000)
    one = selection.images.take(np.arange(1))
    targets = (one.labels + 100) % 1000
    _, maps = adv2.explain(model, one.images, one.labels, interpreter="cam")
    pgd = adv2.attack(model, one.images, targets, interpreter=None, steps=25)
    both = adv2.attack(model, one.images, targets, maps, interpreter="cam", steps=25)
    assert (pgd.logits.argmax(-1) == targets).all() and (both.logits.argmax(-1) == targets).all()
    _, pgd_maps = adv2.explain(model, pgd.images, targets, interpreter="cam")
    assert abs(both.maps - maps).mean() < 0.25 * abs(pgd_maps - maps).mean()
