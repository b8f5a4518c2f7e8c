"""Vision transformers and attention rollout: plain NumPy in float64, central differences, names of torchvision and timm."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adv2_jax as adv2
from adv2_jax import interpreters, losses, models, threats
from adv2_jax.capabilities import inspected
from adv2_jax.interpreters import attention_maps
from adv2_jax.models import VisionTransformer
from adv2_jax.models.convert import from_state_dict, shapes, to_state_dict

SIDE, PATCH, HEADS, WIDTH, K = 16, 4, 2, 8, 5
ROLLOUTS = ["attention_rollout", "gradient_rollout"]


@pytest.fixture(scope="module")
def arrays():
    """Weights of a small transformer under timm's names; large enough for attentions far from uniform."""
    abstract = nnx.eval_shape(lambda: build())
    rng = np.random.default_rng(0)
    drawn = {
        key: 0.5 * rng.standard_normal(shape).astype(np.float32)
        for key, shape in sorted(shapes(abstract).items())
    }
    return drawn | {k: 1 + 0.2 * v for k, v in drawn.items() if "norm" in k and "weight" in k}


def build():
    options = {"patch": PATCH, "width": WIDTH, "num_classes": K, "image_size": SIDE}
    return VisionTransformer(2, HEADS, **options, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def vit(arrays):
    return from_state_dict(build(), arrays)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(1).random((SIDE, SIDE, 3)).astype(np.float32)


def normed(x, arrays, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def linear(x, arrays, name):
    return x @ arrays[f"{name}.weight"].T.astype(float) + arrays[f"{name}.bias"]


def plain(image, arrays, added=None):
    """Logits and attentions of the small transformer, written out."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x, n = (image.astype(float) - mean) / std, SIDE // PATCH
    patches = x.reshape(n, PATCH, n, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(n * n, -1)
    kernel = arrays["patch_embed.proj.weight"].reshape(WIDTH, -1)
    tokens = patches @ kernel.T + arrays["patch_embed.proj.bias"]
    x = np.concatenate([arrays["cls_token"][0], tokens]) + arrays["pos_embed"][0]
    seen = []
    for i in range(2):
        name = f"blocks.{i}"
        qkv = linear(normed(x, arrays, f"{name}.norm1"), arrays, f"{name}.attn.qkv")
        q, k, v = qkv.reshape(len(x), 3, HEADS, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(WIDTH // HEADS)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        seen.append(weights)
        weights = weights if added is None else weights + added[i]
        mixed = (weights @ v).transpose(1, 0, 2).reshape(len(x), WIDTH)
        x = x + linear(mixed, arrays, f"{name}.attn.proj")
        hidden = linear(normed(x, arrays, f"{name}.norm2"), arrays, f"{name}.mlp.fc1")
        gelu = np.vectorize(lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2)
        x = x + linear(gelu(hidden), arrays, f"{name}.mlp.fc2")
    return linear(normed(x[0], arrays, "norm"), arrays, "head"), seen


def scaled(row):
    m = row[1:].reshape(SIDE // PATCH, -1)
    return (m - m.min()) / (m.max() - m.min())


def test_transformer_is_the_one_of_plain_numpy(vit, arrays, photo):
    expected, attention = plain(photo, arrays)
    logits, seen = attention_maps.attentions(vit, photo)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)  # float32
    np.testing.assert_allclose(np.stack(seen), np.stack(attention), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(vit.head(vit.features(photo)), vit.logits(photo))
    batch = vit.logits(np.stack([photo, photo[::-1]]))
    np.testing.assert_allclose(batch[0], logits, rtol=1e-5, atol=1e-5)


LABELS = {"grad_cam": 3, "grad_cam_pp": 0, "layer_cam": 3}


@pytest.mark.parametrize("name", LABELS)
def test_maps_of_tokens_are_those_of_central_differences(name, vit, arrays, photo, double, slope):
    """By the formulas of the papers in NumPy, over the patches; the class token is left out."""
    vit = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), vit)
    # tokens may be negative, and Grad-CAM++ of most classes is then empty
    tokens, label = vit.features(jnp.asarray(photo, float)), LABELS[name]
    score = jax.jit(lambda tokens: vit.head(tokens)[label])
    directions = jnp.eye(tokens.size).reshape(-1, *tokens.shape)
    g = jax.lax.map(lambda v: slope(score, tokens, v), directions).reshape(tokens.shape)
    a, g = (np.asarray(values)[1:].reshape(4, 4, WIDTH) for values in (tokens, g))
    positive = np.maximum(g, 0)
    raw = {
        "grad_cam": lambda: a @ g.mean((0, 1)),
        "grad_cam_pp": lambda: a @ (positive / (2 + a.sum((0, 1)) * positive)).sum((0, 1)),
        "layer_cam": lambda: (positive * a).sum(-1),
    }
    expected = np.maximum(raw[name](), 0)
    m = getattr(interpreters, name)(vit, jnp.asarray(photo, float), label)
    np.testing.assert_allclose(m, expected / expected.max(), atol=1e-7)
    assert expected.min() == 0 < expected.max()


def test_rollout_is_that_of_plain_numpy(vit, arrays, photo):
    _, seen = plain(photo, arrays)
    product = np.eye(len(seen[0][0]))
    for attention in seen:
        product = (attention.mean(0) + np.eye(len(product))) / 2 @ product
    found = interpreters.attention_rollout(vit, photo, 0)
    np.testing.assert_allclose(found, scaled(product[0]), atol=2e-5)  # float32, scaled to [0, 1]
    np.testing.assert_array_equal(found, interpreters.attention_rollout(vit, photo, 1))


def test_gradient_rollout_is_that_of_central_differences(vit, arrays, photo):
    label, step, (_, seen) = 3, 1e-5, plain(photo, arrays)
    product, tokens = np.eye(len(seen[0][0])), len(seen[0][0])
    for i, attention in enumerate(seen):
        slope = np.zeros_like(attention)
        for place in np.ndindex(slope.shape):
            up, down = (
                plain(photo, arrays, [z + s * one(place, z, i == j) for j, z in enumerate(zeros)])[
                    0
                ]
                for s, zeros in ((step, [0 * a for a in seen]), (-step, [0 * a for a in seen]))
            )
            slope[place] = (up - down)[label] / (2 * step)
        product = (np.eye(tokens) + np.maximum(attention * slope, 0).mean(0)) @ product
    found = interpreters.gradient_rollout(vit, photo, label)
    np.testing.assert_allclose(found, scaled(product[0]), atol=1e-4)  # float32
    assert np.abs(found - interpreters.gradient_rollout(vit, photo, 1)).max() > 0.1


def one(place, zeros, wanted):
    unit = np.zeros_like(zeros)
    unit[place] = wanted
    return unit


def test_names_of_torchvision_and_timm_are_read(arrays, photo, vit):
    def of_torchvision(key):
        for timm, other in {
            "cls_token": "class_token",
            "pos_embed": "encoder.pos_embedding",
            "patch_embed.proj": "conv_proj",
            "blocks.": "encoder.layers.encoder_layer_",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "attn.qkv.": "self_attention.in_proj_",
            "attn.proj": "self_attention.out_proj",
            "mlp.fc1": "mlp.0",
            "mlp.fc2": "mlp.3",
            "head": "heads.head",
        }.items():
            key = key.replace(timm, other)
        return key.replace("norm.", "encoder.ln.") if key.startswith("norm.") else key

    for prefix in ("", "module."):
        theirs = {prefix + of_torchvision(key): array for key, array in arrays.items()}
        loaded = from_state_dict(build(), theirs)
        np.testing.assert_array_equal(loaded.logits(photo), vit.logits(photo))
    assert to_state_dict(vit).keys() == arrays.keys()


def test_a_new_head_is_that_of_the_classes(vit, photo):
    fresh = models.with_new_head(vit, 7)
    assert fresh.logits(photo).shape == (7,)
    np.testing.assert_array_equal(fresh.features(photo), vit.features(photo))


def test_second_derivatives_of_grad_are_those_of_the_network(double, arrays, photo, slope):
    """GELU is smooth: nothing stands for a derivative that is not there."""
    vit = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), from_state_dict(build(), arrays))
    image, wanted = jnp.asarray(photo, float), jnp.linspace(0, 1, SIDE**2).reshape(SIDE, SIDE)
    assert inspected(vit, image.shape).relus == 0
    surrogate = interpreters.grad_interpreter().surrogate
    context = interpreters.Context(tau=jnp.asarray(1e-2))

    def loss(x):
        return losses.map_l2(surrogate(vit, x, 2, context).map, wanted)

    v = np.random.default_rng(2).standard_normal(image.shape)
    expected = float(slope(loss, image, v, 1e-6))  # attentions bend within 1e-5 of pixels
    assert float(jnp.vdot(jax.grad(loss)(image), v)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_derivatives_of_rollouts_are_those_of_central_differences(
    name, double, arrays, photo, slope
):
    vit = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), from_state_dict(build(), arrays))
    explain, image = getattr(interpreters, name), jnp.asarray(photo, float)
    wanted = jnp.linspace(0, 1, 16).reshape(4, 4)

    def loss(x):
        return losses.map_l2(explain(vit, x, 2), wanted)

    v = np.random.default_rng(2).standard_normal(image.shape)
    expected = float(slope(loss, image, v, 1e-6))  # attentions bend within 1e-5 of pixels
    assert float(jnp.vdot(jax.grad(loss)(image), v)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*ROLLOUTS, "grad_cam"])
def test_maps_of_transformers_are_attacked(name, vit):
    images = np.random.default_rng(3).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    labels = adv2.explain(vit, images, [0, 0], interpreter=name)[0].argmax(-1)
    targets = (labels + 1) % K
    wanted = adv2.explain(vit, images, labels, interpreter=name)[1]
    result = adv2.attack(vit, images, targets, wanted, interpreter=name, threat=threats.linf(0.2))
    alone = adv2.attack(vit, images, targets, interpreter=None, threat=threats.linf(0.2))
    shown = adv2.explain(vit, alone.images, targets, interpreter=name)[1]
    assert (result.logits.argmax(-1) == targets).all()
    assert np.abs(result.maps - wanted).mean() < 0.5 * np.abs(shown - wanted).mean()


def test_cam_of_tokens_is_refused(vit):
    with pytest.raises(ValueError, match=r"must give floating-point \[h, w, C\], got"):
        adv2.explain(vit, np.zeros((1, SIDE, SIDE, 3)), [0], interpreter="cam")


def test_what_is_no_square_of_patches_is_refused(vit, make_small):
    with pytest.raises(ValueError, match=r"attention_rollout needs a transformer: .* attend"):
        adv2.explain(make_small(), np.zeros((1, 16, 16, 3)), [0], interpreter="attention_rollout")
    with pytest.raises(ValueError, match="cannot take images"):
        adv2.explain(vit, np.zeros((1, 20, 20, 3)), [0], interpreter="grad")
    with pytest.raises(ValueError, match="must divide images"):
        VisionTransformer(1, 2, patch=5, width=8, image_size=16, rngs=nnx.Rngs(0))

    class Distilled(VisionTransformer):
        def logits(self, image, *, attend=lambda a: a):
            attend(jnp.full((2, 18, 18), 1 / 18))
            return jnp.zeros(3)

        def features(self, image, *, attend=lambda a: a):
            return jnp.zeros((18, 8))

    distilled = Distilled(1, 2, patch=4, width=8, image_size=16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"a square of patches: .* attentions of \[18\] tokens"):
        interpreters.attention_rollout_interpreter().check(distilled, (16, 16, 3))
    with pytest.raises(ValueError, match=r"Distilled.features are 18 tokens, not a class token"):
        interpreters.grad_cam_interpreter().check(distilled, (16, 16, 3))
