"""The masker: its parts against plain NumPy, what it is made from, and its files."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models import block, conv_norm

import adv2_jax
from adv2_jax import models
from adv2_jax.data import shapes
from adv2_jax.files import write_arrays
from adv2_jax.models import CifarResNet, Masker
from adv2_jax.models.convert import to_state_dict
from adv2_jax.models.masker import LIMIT, Stage, pixel_shuffle

K = 10  # classes of the fixture `masker`

pytestmark = pytest.mark.usefixtures("tiny_by_name")


@pytest.fixture(scope="module")
def encoder(tiny):
    return tiny(3)


@pytest.fixture(scope="module")
def fresh(encoder):
    return Masker(encoder, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def x(images):
    return jnp.asarray(images, jnp.float32) / 255


draw = jax.jit(lambda masker, image, label: masker(image, label))


# Plain NumPy: one image [H, W, C], float64.


def shuffled(x):
    h, w, c = x.shape
    up = np.zeros((2 * h, 2 * w, c // 4))
    for i in range(2 * h):
        for j in range(2 * w):
            quarter = 2 * (i % 2) + j % 2
            up[i, j] = x[i // 2, j // 2, quarter * (c // 4) : (quarter + 1) * (c // 4)]
    return up


def stage_of(stage, x, skip):
    arrays = to_state_dict(stage)
    up = shuffled(np.maximum(conv_norm(x, arrays, "", 1), 0))[: skip.shape[0], : skip.shape[1]]
    return block(np.concatenate([up, skip], -1), arrays, "block.", 1)


def gate_of(masker, features, label):
    scores = features @ np.asarray(masker.embedding[...], float)[label] - float(
        masker.threshold[...]
    )
    return 1 / (1 + np.exp(-scores))


def smoothed_of(scores):
    """Every score a mean of all, with weights that fall as a Gaussian of a sixteenth of the side."""
    side = min(scores.shape)
    mean = np.zeros(scores.shape)
    for i, j in np.ndindex(scores.shape):
        rows, columns = (np.arange(n) - k for n, k in zip(scores.shape, (i, j), strict=True))
        weights = np.exp(-(rows[:, None] ** 2 + columns**2) / (2 * (side / 16) ** 2))
        mean[i, j] = (weights * scores).sum() / weights.sum()
    return mean


def test_pixel_shuffle_puts_quarters_of_the_channels_beside_each_other():
    x = np.random.default_rng(0).standard_normal((3, 5, 8))
    np.testing.assert_array_equal(
        pixel_shuffle(jnp.asarray(x, jnp.float32)), shuffled(x).astype(np.float32)
    )
    batch = np.stack([x, -x])
    np.testing.assert_array_equal(
        pixel_shuffle(jnp.asarray(batch, jnp.float32))[1], shuffled(-x).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("c_skip", "size"), [(8, (6, 8)), (9, (5, 7))], ids=["even", "odd, with a projection"]
)
def test_stage_is_the_one_of_plain_numpy(randomised, c_skip, size):
    stage = randomised(lambda: Stage(5, c_skip, 4, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    x, skip = rng.standard_normal((3, 4, 5)), rng.random((*size, c_skip))
    assert stage.block.projects == ((4 + c_skip) % 4 > 0)
    expected = stage_of(stage, x, skip)
    found = stage(jnp.asarray(x, jnp.float32), jnp.asarray(skip, jnp.float32))
    assert found.shape == (*size, (4 + c_skip) // 4 * 4)
    # float32, five layers
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_gate_is_the_sigmoid_of_a_product(masker):
    features = np.random.default_rng(2).standard_normal((2, 3, 16))
    for label in (0, 7):
        found = masker.gate(jnp.asarray(features, jnp.float32), label)
        np.testing.assert_allclose(found, gate_of(masker, features, label), rtol=1e-5)


def test_masker_is_the_one_of_plain_numpy(masker, x):
    skip, deepest = (np.asarray(scale, float) for scale in masker.encoder.scales(x[2])[1:])
    y = stage_of(masker.stages[0], deepest * gate_of(masker, deepest, 4)[..., None], skip)
    kernel, bias = (
        np.asarray(variable[...], float) for variable in (masker.out.kernel, masker.out.bias)
    )
    z = (y @ kernel[0, 0] + bias)[..., 0]
    expected = 1 / (1 + np.exp(-smoothed_of(z / (1 + np.abs(z) / LIMIT))))
    found = draw(masker, x[2], 4)
    assert found.shape == (8, 8) and np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)  # float32, a dozen layers


def test_another_class_has_another_map(masker, x):
    assert np.abs(draw(masker, x[2], 4) - draw(masker, x[2], 5)).max() > 0.01


def test_a_batch_is_drawn_as_its_images_alone(masker, x):
    labels = np.arange(6) % K
    alone = jnp.stack([draw(masker, image, label) for image, label in zip(x, labels, strict=True)])
    np.testing.assert_allclose(draw(masker, x, labels), alone, atol=1e-5)  # float32
    np.testing.assert_allclose(jax.vmap(draw, (None, 0, 0))(masker, x, labels), alone, atol=1e-5)


# What it is made from.

CIFAR, IMAGENET = partial(models.CifarResNet, 1), partial(models.ImageNetResNet, (1, 1, 1, 1), 4)


@pytest.mark.parametrize(
    ("encoder", "side", "expected", "stages"),
    [
        (CIFAR, 32, 16, 1),
        (CIFAR, 64, 32, 1),
        (IMAGENET, 224, 56, 3),
        (partial(models.ImageNetResNet, (1, 1, 1, 1), 1), 224, 56, 3),
        (IMAGENET, 75, 19, 3),
    ],
)
def test_the_map_has_half_the_side_of_small_images_and_a_quarter_of_large_ones(
    encoder, side, expected, stages
):
    def drawn(image):
        masker = Masker(encoder(image_size=side, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
        assert len(masker.stages) == stages
        return masker(image, 0)

    assert nnx.eval_shape(drawn, jax.ShapeDtypeStruct((side, side, 3), jnp.float32)).shape == (
        expected,
        expected,
    )


def test_the_encoder_is_a_copy_with_the_weights_of_the_classifier(fresh, encoder, x):
    jax.tree.map(np.testing.assert_array_equal, fresh.encoder, encoder)
    assert fresh.encoder is not encoder and fresh.encoder.conv1 is not encoder.conv1
    np.testing.assert_array_equal(fresh.encoder.features(x[0]), encoder.features(x[0]))


def test_the_selector_starts_as_cam(fresh, encoder):
    weights = np.asarray(encoder.linear.kernel[...])
    np.testing.assert_allclose(fresh.embedding[...], weights.T, atol=1e-6)
    assert fresh.threshold[...] == 0
    features = np.random.default_rng(0).random((3, 3, 16))
    expected = 1 / (1 + np.exp(-(features @ weights[:, 2])))
    np.testing.assert_allclose(
        fresh.gate(jnp.asarray(features, jnp.float32), 2), expected, rtol=1e-5
    )


def test_mean_features_are_zero_until_measured(fresh):
    np.testing.assert_array_equal(fresh.means[...], np.zeros((K, 16)))


def test_the_seed_is_that_of_the_decoder(fresh, encoder):
    again, other = (Masker(encoder, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again, fresh)
    assert (other.stages[0].conv.kernel[...] != fresh.stages[0].conv.kernel[...]).any()


def test_what_the_masker_was_not_made_for_is_refused(masker):
    masker.check(K, (32, 32, 3))
    masker.check(K, (16, 24, 3))
    with pytest.raises(
        ValueError, match=r"^the masker draws maps of 10 classes, the network has 9$"
    ):
        masker.check(9, (32, 32, 3))
    with pytest.raises(
        ValueError,
        match=r"^the masker cannot take images of \[15, 15, 3\]; it was made for 32 x 32$",
    ):
        masker.check(K, (15, 15, 3))


@pytest.mark.parametrize("network", [None, nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
def test_only_a_resnet_is_an_encoder(network, encoder):
    assert models.check_encoder(encoder) is encoder
    with pytest.raises(
        ValueError,
        match=r"the encoder of a masker must be one of cifar_resnet20, .*resnet152, .*not a ",
    ) as refusal:
        models.check_encoder(network)
    assert "densenet" not in str(refusal.value) and type(network).__name__ in str(refusal.value)


# Files.


@pytest.fixture(scope="module")
def arrays(tiny_by_name, masker, tmp_path_factory):
    """What is in the file of a masker."""
    path = tmp_path_factory.mktemp("masker") / "masker.npz"
    models.save_masker(masker, "tiny", path)
    with np.load(path) as archive:
        return dict(archive)


def test_a_saved_masker_is_loaded(tmp_path, randomised, x):
    look = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "image_size": 48}
    saved = randomised(
        lambda: Masker(
            CifarResNet(1, width=3, num_classes=4, **look, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
        )
    )
    models.save_masker(saved, "tiny", tmp_path / "masker.npz")
    loaded = models.load_masker(tmp_path / "masker.npz")
    # else jit would not know it again
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, loaded, saved)
    assert {name: getattr(loaded.encoder, name) for name in look} == look
    np.testing.assert_array_equal(draw(loaded, x[0], 3), draw(saved, x[0], 3))


def test_a_masker_of_no_known_encoder_is_not_saved(masker, tmp_path):
    with pytest.raises(ValueError, match="model 'resnet51' is not one of"):
        models.save_masker(masker, "resnet51", tmp_path / "masker.npz")
    with pytest.raises(ValueError, match=r"cannot write .*masker\.pth"):
        models.save_masker(masker, "tiny", tmp_path / "masker.pth")
    assert list(tmp_path.iterdir()) == []


NOT_MASKERS = {
    "it does not name its encoder; `adv2 train rts` writes maskers": {"option/name": None},
    "model 'resnet51' is not one of cifar_resnet20": {"option/name": "resnet51"},
    "not a DenseNet": {"option/name": "densenet121"},
    "unexpected keyword argument 'colour'": {"option/colour": 1},
    "incompatible shapes for broadcasting": {"option/mean": [0.5, 0.5]},
    "integer modulo by zero": {"option/image_size": 0},
    "1 of 62 keys do not match: threshold expected () found nothing": {"threshold": None},
    "1 of 63 keys do not match: more expected nothing found (2,)": {"more": np.zeros(2)},
    "1 of 62 keys do not match: means expected (16, 10) found (16, 9)": {
        "means": np.zeros((16, 9))
    },
    "not finite floating-point numbers: threshold": {"threshold": np.nan},
}


@pytest.mark.parametrize("expected", NOT_MASKERS)
def test_a_file_that_holds_no_masker_is_named(arrays, tmp_path, expected):
    changed = {
        key: np.asarray(array)
        for key, array in (arrays | NOT_MASKERS[expected]).items()
        if array is not None
    }
    path = tmp_path / "masker.npz"
    write_arrays(path, changed)
    with pytest.raises(ValueError) as refusal:
        models.load_masker(path)
    assert str(refusal.value).startswith(f"{path} holds no masker: ") and "\n" not in str(
        refusal.value
    )
    assert expected in str(refusal.value)


def test_the_weights_of_a_network_are_no_masker(encoder, tmp_path):
    write_arrays(tmp_path / "weights.npz", to_state_dict(encoder))
    with pytest.raises(
        ValueError, match=r"weights\.npz holds no masker: it does not name its encoder"
    ):
        models.load_masker(tmp_path / "weights.npz")


def test_a_damaged_file_is_named(arrays, tmp_path):
    path = tmp_path / "masker.npz"
    write_arrays(path, arrays)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"^cannot read {path}: ") as refusal:
        models.load_masker(path)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=f"^cannot read {tmp_path}/none.npz: no such file$"):
        models.load_masker(tmp_path / "none.npz")


# The one that comes with the package.


def test_the_shipped_masker_fits_the_embedded_network_and_marks_objects():
    network, masker = models.embedded(), models.embedded_masker()
    masker.check(network.linear.out_features, (64, 64, 3))
    assert (masker.means[...] != 0).any(axis=1).all()  # ℓ_enc by "mean" divides by them
    scenes = shapes.generate(32, seed=3)
    maps = draw(masker, scenes.images / np.float32(255), scenes.labels)
    m = np.asarray(jax.image.resize(maps, scenes.objects.shape, "bilinear", antialias=False))
    inside = np.array([values[mask].mean() for values, mask in zip(m, scenes.objects, strict=True)])
    outside = np.array(
        [values[~mask].mean() for values, mask in zip(m, scenes.objects, strict=True)]
    )
    # a map that knows nothing of the object has inside = outside, on average; eq. 8 wants 1 and 0
    assert np.mean(inside > outside) >= 0.9
    assert inside.mean() > 2 * outside.mean()


def test_the_shipped_masker_is_small():
    assert (
        Path(adv2_jax.__file__).parent / "weights" / "shapes_masker.npz"
    ).stat().st_size <= 3_000_000
