"""Networks against plain NumPy in float64, their sizes against the published ones, and weights on their way in and out."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adv2_jax import interpreters, losses, models
from adv2_jax.activations import relu_h
from adv2_jax.files import read_arrays, write_arrays
from adv2_jax.models import CifarResNet, DenseNet, ImageNetResNet
from adv2_jax.models.convert import canonical, from_state_dict, shapes, to_state_dict
from adv2_jax.models.layers import stem_pool
from adv2_jax.types import Classifier

TINY = {
    "cifar": lambda: CifarResNet(2, width=4, num_classes=5, rngs=nnx.Rngs(0)),
    "basic": lambda: ImageNetResNet((2, 1, 1, 1), 1, width=4, num_classes=5, rngs=nnx.Rngs(0)),
    "bottleneck": lambda: ImageNetResNet((2, 1, 1, 1), 4, width=4, num_classes=5, rngs=nnx.Rngs(0)),
    "dense": lambda: DenseNet((2, 1, 1, 3), growth=2, width=6, num_classes=5, rngs=nnx.Rngs(0)),
}
SIZE = {"cifar": 16, "basic": 64, "bottleneck": 64, "dense": 64}


@pytest.fixture(scope="module", params=TINY)
def style(request):
    return request.param


@pytest.fixture(scope="module")
def network(style, randomised):
    return randomised(TINY[style])


@pytest.fixture(scope="module")
def arrays(network):
    return to_state_dict(network)


@pytest.fixture(scope="module")
def photo(style):
    return np.random.default_rng(3).random((SIZE[style], SIZE[style], 3)).astype(np.float32)


# Plain NumPy: the state dict, one image [H, W, C], float64.


def conv(x, kernel, stride):
    """Cross-correlation with an OIHW kernel, size // 2 zeros on every side."""
    pad = kernel.shape[-1] // 2
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[-2:], axis=(0, 1))[
        ::stride, ::stride
    ]
    return np.einsum("hwcij,ocij->hwo", windows, kernel.astype(float))


def norm(x, arrays, name):
    mean, var, weight, bias = (
        arrays[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def conv_norm(x, arrays, name, stride, conv_name="conv", norm_name="bn"):
    return norm(conv(x, arrays[f"{name}{conv_name}.weight"], stride), arrays, f"{name}{norm_name}")


def max_pool(x):
    """3 x 3, stride 2, one row or column beyond every side."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))[::2, ::2].max(
        (-2, -1)
    )


def block(x, arrays, name, stride):
    strides = (1, stride, 1) if f"{name}conv3.weight" in arrays else (stride, 1)
    y = x
    for i, s in enumerate(strides, 1):
        y = conv_norm(np.maximum(y, 0), arrays, name, s, f"conv{i}", f"bn{i}")
    if f"{name}downsample.0.weight" in arrays:
        x = conv_norm(x, arrays, name, stride, "downsample.0", "downsample.1")
    else:  # option A
        x = x[::stride, ::stride]
        before = (y.shape[-1] - x.shape[-1]) // 2
        x = np.concatenate(
            [np.zeros((*x.shape[:2], before)), x, np.zeros((*x.shape[:2], before))], axis=-1
        )
    return np.maximum(y + x, 0)


def residual(x, arrays):
    """Of either style; an input of a block is never negative, so that its first ReLU changes nothing."""
    stem_stride = 2 if arrays["conv1.weight"].shape[-1] == 7 else 1
    x = np.maximum(conv_norm(x, arrays, "", stem_stride, "conv1", "bn1"), 0)
    x = max_pool(x) if stem_stride == 2 else x
    names = sorted(
        {key.rsplit(".conv1")[0] for key in arrays if key.startswith("layer") and ".conv1" in key}
    )
    for name in names:
        x = block(
            x, arrays, f"{name}.", 2 if name.endswith(".0") and not name.startswith("layer1") else 1
        )
    return x


def norm_conv(x, arrays, norm_name, conv_name):
    return conv(np.maximum(norm(x, arrays, norm_name), 0), arrays[f"{conv_name}.weight"], 1)


def dense_block(x, arrays, name):
    """Every layer sees all that came before it, kept apart until then."""
    seen = [x]
    for i in range(
        1, 1 + sum(key.startswith(name) and key.endswith("conv1.weight") for key in arrays)
    ):
        layer = f"{name}.denselayer{i}"
        y = norm_conv(np.concatenate(seen, axis=-1), arrays, f"{layer}.norm1", f"{layer}.conv1")
        seen.append(norm_conv(y, arrays, f"{layer}.norm2", f"{layer}.conv2"))
    return np.concatenate(seen, axis=-1)


def transition(x, arrays, name):
    x = norm_conv(x, arrays, f"{name}.norm", f"{name}.conv")
    h, w = x.shape[0] // 2, x.shape[1] // 2
    return x[: 2 * h, : 2 * w].reshape(h, 2, w, 2, -1).mean((1, 3))


def dense(x, arrays):
    x = max_pool(np.maximum(conv_norm(x, arrays, "features.", 2, "conv0", "norm0"), 0))
    for i in range(1, 4):
        x = transition(
            dense_block(x, arrays, f"features.denseblock{i}"), arrays, f"features.transition{i}"
        )
    return np.maximum(
        norm(dense_block(x, arrays, "features.denseblock4"), arrays, "features.norm5"), 0
    )


def features(image, arrays):
    x = (image.astype(float) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return dense(x, arrays) if "features.conv0.weight" in arrays else residual(x, arrays)


def head(x, arrays):
    (name,) = {"fc", "linear", "classifier"} & {key.split(".")[0] for key in arrays}
    return arrays[f"{name}.weight"].astype(float) @ x.mean((0, 1)) + arrays[f"{name}.bias"]


forward = jax.jit(lambda network, image: network.features(image))


def test_network_is_the_one_of_plain_numpy(network, arrays, photo):
    expected = features(photo, arrays)
    found = forward(network, photo)
    assert found.shape == expected.shape
    # float32, a dozen layers
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())
    np.testing.assert_allclose(network.head(found), head(expected, arrays), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("style", "side"), [("cifar", 15), ("cifar", 18), ("dense", 75)])
def test_odd_sizes_are_padded_as_torch_does(randomised, style, side):
    network = randomised(TINY[style])
    photo = np.random.default_rng(0).random((side, side + 1, 3)).astype(np.float32)
    found, expected = forward(network, photo), features(photo, to_state_dict(network))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_running_statistics_serve_one_image_and_a_batch_alike(network, photo):
    batch = forward(network, np.stack([photo, 1 - photo, photo**2]))
    np.testing.assert_allclose(
        batch[0], forward(network, photo), rtol=1e-4, atol=1e-5 * batch.max()
    )


def test_activation_replaces_every_relu(network, photo, style):
    seen = []

    def act(z):
        seen.append(z.shape)
        return jnp.ones_like(z)

    found = jax.jit(lambda x: network.features(x, act=act))(photo)
    np.testing.assert_array_equal(found, np.ones(found.shape))
    assert (
        len(seen)
        == {
            "cifar": 1 + 6 * 2,
            "basic": 1 + 5 * 2,
            "bottleneck": 1 + 5 * 3,
            "dense": 1 + 7 * 2 + 3 + 1,
        }[style]
    )


def test_network_is_a_classifier(network):
    assert isinstance(network, Classifier)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("side", [6, 7])
def test_maxima_of_the_stem_and_their_derivatives_are_those_of_flax(side, dtype):
    x = np.maximum(np.random.default_rng(0).standard_normal((2, side, side + 3, 4)), 0)
    x = jnp.asarray(x, dtype)  # half of it ties, at 0

    def of_flax(x):
        return nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

    values, back = jax.vjp(stem_pool, x)
    expected, back_of_flax = jax.vjp(of_flax, x)
    np.testing.assert_array_equal(values, expected)
    failed = x.at[0, 2, 3].set(np.nan)
    # NumPy does not take NaN of bfloat16 for NaN
    pair = [np.asarray(pool(failed), np.float32) for pool in (stem_pool, of_flax)]
    np.testing.assert_array_equal(*pair)
    # whole numbers: sums of them are exact in any order
    weights = jnp.arange(values.size, dtype=dtype).reshape(values.shape) % 8
    np.testing.assert_array_equal(back(weights)[0], back_of_flax(weights)[0])
    assert "scatter" not in str(jax.make_jaxpr(back)(weights))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ImageNetResNet((1, 1, 1, 1), 1, width=2, num_classes=3, rngs=nnx.Rngs(0)),
        lambda: DenseNet((1, 1, 1, 1), growth=2, width=4, num_classes=3, rngs=nnx.Rngs(0)),
    ],
)
def test_second_derivative_goes_through_pooling(randomised, build):
    network = randomised(build)

    def loss(image):
        return losses.map_l2(interpreters.grad(network, image, 0, act=relu_h), jnp.ones((32, 32)))

    flat, noise = np.full((32, 32, 3), 0.5), np.random.default_rng(0).random((32, 32, 3))
    gradients = jax.jit(jax.vmap(jax.grad(loss)))(np.stack([flat, noise]).astype(np.float32))
    assert jnp.isfinite(gradients).all()  # a flat image ties every maximum
    assert (gradients[1] != 0).any()


PARAMETERS = {
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
}


@cache
def abstract(name):
    return nnx.eval_shape(lambda: models.build(name))


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    network = abstract(name)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
        == PARAMETERS[name]
    )


@pytest.mark.parametrize(
    ("name", "side", "shape"),
    [
        ("cifar_resnet20", 32, (8, 8, 64)),
        ("cifar_resnet20", 64, (16, 16, 64)),
        ("resnet18", 224, (7, 7, 512)),
        ("resnet50", 224, (7, 7, 2048)),
        ("densenet161", 224, (7, 7, 2208)),
    ],
)
def test_shapes(name, side, shape):
    network = abstract(name)
    image = jax.ShapeDtypeStruct((side, side, 3), jnp.float32)
    found = jax.eval_shape(lambda m, x: m.features(x), network, image)
    logits = jax.eval_shape(lambda m, x: m.head(m.features(x)), network, image)
    assert found.shape == shape
    assert logits.shape == ((10,) if "cifar" in name else (1000,))


@pytest.mark.parametrize(
    ("name", "side"), [("cifar_resnet20", 32), ("resnet18", 224), ("densenet121", 224)]
)
def test_image_size_is_a_static_number(name, side):
    assert abstract(name).image_size == side


def test_image_size_is_an_option():
    sizes = [
        nnx.eval_shape(build).image_size
        for build in (lambda: models.build("cifar_resnet20", image_size=40), TINY["dense"])
    ]
    assert sizes == [40, 224]


def test_two_objects_of_one_architecture_are_traced_once(tiny, images):
    traced = []

    @jax.jit
    def logits(network, image):
        traced.append(image)
        return network.head(network.features(image))

    first, second = (logits(tiny(seed), images[0] / np.float32(255)) for seed in (0, 1))
    assert len(traced) == 1
    assert (first != second).any()


# Weights in and out.

KEYS = {
    "cifar": {
        "conv1.weight": (4, 3, 3, 3),
        "bn1.running_var": (4,),
        "layer1.1.conv2.weight": (4, 4, 3, 3),
        "layer2.0.conv1.weight": (8, 4, 3, 3),
        "layer3.1.bn2.bias": (16,),
        "linear.weight": (5, 16),
        "linear.bias": (5,),
    },
    "bottleneck": {
        "conv1.weight": (4, 3, 7, 7),
        "layer1.0.conv3.weight": (16, 4, 1, 1),
        "layer1.0.downsample.0.weight": (16, 4, 1, 1),
        "layer1.0.downsample.1.running_mean": (16,),
        "layer4.0.conv2.weight": (32, 32, 3, 3),
        "fc.weight": (5, 128),
    },
    "dense": {
        "features.conv0.weight": (6, 3, 7, 7),
        "features.norm0.running_mean": (6,),
        "features.denseblock1.denselayer2.norm1.weight": (8,),
        "features.denseblock1.denselayer2.conv1.weight": (8, 8, 1, 1),
        "features.denseblock4.denselayer3.norm2.bias": (8,),
        "features.denseblock4.denselayer3.conv2.weight": (2, 8, 3, 3),
        "features.transition1.norm.running_var": (10,),
        "features.transition1.conv.weight": (5, 10, 1, 1),
        "features.norm5.weight": (8,),
        "classifier.weight": (5, 8),
    },
    "basic": {
        "layer2.0.downsample.0.weight": (8, 4, 1, 1),
        "layer1.1.bn2.weight": (4,),
        "fc.weight": (5, 32),
    },
}


def test_names_and_layouts_are_those_of_torch(arrays, style):
    assert {key: arrays[key].shape for key in KEYS[style]} == KEYS[style]
    assert not any(
        "downsample" in key for key in arrays if style == "cifar" or key.startswith("layer1.1")
    )
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays.values())


def test_state_dict_and_back(network, arrays, style):
    again = from_state_dict(nnx.eval_shape(TINY[style]), arrays)
    assert jax.tree.structure(again) == jax.tree.structure(network)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(network), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert shapes(network) == {key: array.shape for key, array in arrays.items()}
    returned = to_state_dict(again)
    assert returned.keys() == arrays.keys()
    assert all((returned[key] == arrays[key]).all() for key in arrays)


def counters(arrays):
    return {
        key.replace("running_mean", "num_batches_tracked"): np.array(7)
        for key in arrays
        if "_mean" in key
    }


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16])
def test_what_torch_adds_is_passed_over(network, arrays, style, dtype):
    parallel = {f"module.{key}": array for key, array in (arrays | counters(arrays)).items()}
    parallel = {key: array.astype(dtype) for key, array in parallel.items()}
    again = from_state_dict(nnx.eval_shape(TINY[style]), parallel)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(network), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.asarray(expected).astype(dtype))


OLD = {"norm1": "norm.1", "norm2": "norm.2", "conv1": "conv.1", "conv2": "conv.2"}


def old_names(arrays, prefix=""):
    """As in the files that torchvision and timm publish for DenseNets, with counters."""
    old = {}
    for key, array in (arrays | counters(arrays)).items():
        parts = [OLD.get(part, part) if "denselayer" in key else part for part in key.split(".")]
        old[prefix + ".".join(parts)] = array
    return old


@pytest.fixture(scope="module")
def densenet(randomised):
    """A tiny DenseNet and its state dict."""
    network = randomised(TINY["dense"])
    return network, to_state_dict(network)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.densenet121."])
def test_canonical_says_what_it_did(densenet, prefix):
    _, arrays = densenet
    found = canonical(old_names(arrays, prefix))
    assert found.arrays.keys() == arrays.keys()
    assert all(found.arrays[key] is arrays[key] for key in arrays)
    assert found.prefix == prefix
    assert set(found.passed_over) == {prefix + key for key in old_names(counters(arrays))}
    # of each layer two convolutions and four arrays of two BatchNorms
    assert len(found.renamed) == 7 * 10
    first = "features.denseblock1.denselayer1."
    assert found.renamed[f"{first}norm.1.running_var"] == f"{first}norm1.running_var"
    assert found.renamed[f"{first}conv.2.weight"] == f"{first}conv2.weight"


def test_canonical_leaves_alone_what_is_so(arrays):
    found = canonical(arrays)
    assert (found.arrays.keys(), found.prefix, found.passed_over, found.renamed) == (
        arrays.keys(),
        "",
        [],
        {},
    )
    assert found.changes() == []


def test_a_name_before_some_keys_only_stays():
    arrays = {
        "module.conv1.weight": np.ones(1),
        "module.fc.bias": np.ones(1),
        "fc.weight": np.ones(1),
    }
    assert canonical(arrays).arrays == arrays


@pytest.mark.parametrize("keys", [[], ["images"], ["model", "model.bias"]])
def test_at_least_one_name_remains(keys):
    arrays = {key: np.ones(1) for key in keys}
    assert canonical(arrays).arrays == arrays


def test_the_counter_of_an_averaged_model_is_passed_over(arrays):
    found = canonical(
        {"n_averaged": np.array(3)} | {f"module.{key}": array for key, array in arrays.items()}
    )
    assert (found.arrays.keys(), found.prefix, found.passed_over) == (
        arrays.keys(),
        "module.",
        ["n_averaged"],
    )


def test_weights_without_a_head_lack_nothing_else(densenet):
    network, arrays = densenet
    trunk = {key: array for key, array in arrays.items() if key.startswith("features.")}
    with pytest.raises(
        ValueError,
        match=r"^2 of 96 keys do not match: classifier\.bias expected \(5,\) found nothing; classifier",
    ):
        from_state_dict(network, canonical(trunk).arrays)


def test_one_weight_under_two_names_is_refused(densenet):
    _, arrays = densenet
    twice = arrays | {"features.denseblock1.denselayer1.norm.1.bias": np.ones(6, np.float32)}
    with pytest.raises(
        ValueError,
        match=r"^found under two names: features\.denseblock1\.denselayer1\.norm1\.bias$",
    ):
        canonical(twice)


def under(prefix, arrays):
    return {prefix + key: array for key, array in arrays.items()}


NORMALISER = {"mean": np.zeros(3, np.float32), "std": np.ones((3, 1, 1), np.float32)}
WRAPPED = {  # how files hold a network: what is beside its weights, the prefix of these, the keys left out, other prefixes
    "Sequential(normalise, network)": (under("0.", NORMALISER), "1.", 2, []),
    "attribute of a wrapper": (under("module.normalizer.", NORMALISER), "module.model.", 2, []),
    "buffers of the network": (NORMALISER, "", 2, []),
    "projection head": (
        {"projector.0.weight": np.ones((2, 2), np.float32), "queue": np.ones((2, 9))},
        "encoder_q.",
        2,
        [],
    ),
    "weights twice": ("module.attacker.model.", "module.model.", 97, ["module.attacker.model"]),
    "averaged weights": ("model_ema.module.", "model.", 97, ["model_ema.module"]),
    "averaged weights without a prefix": ("ema.", "", 97, ["ema"]),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_are_found_among_other_things(tmp_path, cifar20, caplog, how):
    _, flat = cifar20
    beside, prefix, left_out, others = WRAPPED[how]
    beside = (
        under(beside, {key: array + 1 for key, array in flat.items()})
        if isinstance(beside, str)
        else beside
    )
    write_arrays(tmp_path / "weights.npz", beside | under(prefix, flat | counters(flat)))
    loaded = models.load("cifar_resnet20", tmp_path / "weights.npz")
    assert all((array == flat[key]).all() for key, array in to_state_dict(loaded).items())
    (said,) = caplog.messages
    assert said.startswith(
        f"{tmp_path / 'weights.npz'}: left out, {left_out} in all: {next(iter(beside))}, "
    )
    assert (f"as many keys fit under {', '.join(others)} (--weights-key" in said) == bool(others)
    assert (
        models.convert_file(tmp_path / "weights.npz", "cifar_resnet20", tmp_path / "out.npz")[-2]
        in said
    )


def test_the_largest_set_of_keys_is_taken_wherever_it_stands(cifar20):
    _, flat = cifar20
    part = {key: flat[key] for key in list(flat)[:60]}
    found = canonical(under("first.", part) | under("second.net.", flat), flat)
    assert (found.arrays, found.prefix, found.left_out, found.others) == (
        flat,
        "second.net.",
        list(under("first.", part)),
        [],
    )


def test_what_is_left_out_is_told_where_something_is_missing(tmp_path, cifar20):
    _, flat = cifar20
    renamed = {key.replace("linear.", "head.fc."): array for key, array in flat.items()}
    write_arrays(tmp_path / "weights.npz", under("model.", renamed))
    with pytest.raises(
        ValueError,
        match=r"linear\.weight expected .* found nothing; model\.head\.fc\.weight expected nothing found \(3, 8\)",
    ):
        models.load("cifar_resnet20", tmp_path / "weights.npz")


def test_key_says_which_weights(tmp_path, cifar20, caplog):
    _, flat = cifar20
    wrong = {key: array + 1 for key, array in flat.items()}
    write_arrays(
        tmp_path / "weights.npz", under("model.", wrong) | under("model_ema.module.", flat)
    )
    loaded = models.load("cifar_resnet20", tmp_path / "weights.npz", key="model_ema.")
    assert all((array == flat[key]).all() for key, array in to_state_dict(loaded).items())
    models.convert_file(
        tmp_path / "weights.npz", "cifar_resnet20", tmp_path / "out.npz", key="model_ema"
    )
    assert (read_arrays(tmp_path / "out.npz")["conv1.weight"] == flat["conv1.weight"]).all()
    assert caplog.messages == []
    with pytest.raises(ValueError, match="it holds no weights called 'ema'"):
        models.load("cifar_resnet20", tmp_path / "weights.npz", key="ema")


def test_a_deeper_network_is_not_cut(tmp_path, cifar20):
    _, flat = cifar20
    deeper = flat | {"layer1.3.conv1.weight": flat["layer1.2.conv1.weight"]}
    with pytest.raises(
        ValueError,
        match=r"^1 of 98 keys do not match: layer1\.3\.conv1\.weight expected nothing found",
    ):
        from_state_dict(cifar20[0], deeper)


def test_what_the_file_holds_is_told_beside_what_is_missing(cifar20):
    other = {f"blocks.{i}.attn.weight": np.zeros((2, 2), np.float32) for i in range(50)}
    with pytest.raises(ValueError) as caught:
        from_state_dict(cifar20[0], other)
    shown = str(caught.value)
    assert shown.startswith("147 of 147 keys do not match: ")
    assert shown.count("found nothing") == shown.count("expected nothing found (2, 2)") == 4


def test_names_of_the_module_itself_are_no_prefix():
    class Wrapper(nnx.Module):
        def __init__(self):
            self.model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    wrapper = Wrapper()
    again = from_state_dict(wrapper, to_state_dict(wrapper))
    np.testing.assert_array_equal(again.model.kernel[...], wrapper.model.kernel[...])


@pytest.fixture(scope="module")
def cifar20(randomised):
    """ResNet-20 at width 2 with 3 classes, and its state dict."""
    network = randomised(lambda: models.build("cifar_resnet20", width=2, num_classes=3))
    return network, to_state_dict(network)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_reads_width_and_classes_off_the_file(tmp_path, cifar20, suffix, prefix):
    network, flat = cifar20
    path = tmp_path / f"weights{suffix}"
    flat = {prefix + key: array for key, array in flat.items()}
    if suffix == ".npz":
        np.savez(path, **flat)
    else:
        pytest.importorskip("safetensors.numpy").save_file(flat, path)
    loaded = models.load("cifar_resnet20", path)
    assert jax.tree.structure(loaded) == jax.tree.structure(network)
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(network), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_saved_weights_are_loaded(tmp_path, cifar20, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    network, _ = cifar20
    write_arrays(tmp_path / f"weights{suffix}", to_state_dict(network))
    loaded = models.load("cifar_resnet20", str(tmp_path / f"weights{suffix}"))
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(network), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_every_key_that_does_not_fit_is_listed_with_both_shapes(cifar20):
    network, flat = cifar20
    changed = {key: array for key, array in flat.items() if key != "layer2.1.bn2.bias"}
    changed |= {"linear.weight": np.zeros((4, 8), np.float32), "fc.bias": np.zeros(7, np.float32)}
    with pytest.raises(ValueError) as caught:
        from_state_dict(network, changed)
    assert str(caught.value) == (
        f"3 of {len(flat) + 1} keys do not match: layer2.1.bn2.bias expected (4,) found nothing; "
        "linear.weight expected (3, 8) found (4, 8); fc.bias expected nothing found (7,)"
    )


@pytest.mark.parametrize(
    "value", [np.full(3, np.nan, np.float32), np.ones(3, np.int64), np.array([1, np.inf, 0])]
)
def test_weights_that_are_not_finite_numbers_are_refused(cifar20, value):
    network, flat = cifar20
    with pytest.raises(ValueError, match=r"^not finite floating-point numbers: linear\.bias$"):
        from_state_dict(network, flat | {"linear.bias": value})


def test_weights_of_another_network_name_file_and_network(tmp_path, cifar20):
    np.savez(tmp_path / "weights.npz", **cifar20[1])
    with pytest.raises(
        ValueError,
        match=r"^weights .*weights\.npz do not fit cifar_resnet32: .*layer1\.3\.bn1\.bias",
    ):
        models.load("cifar_resnet32", tmp_path / "weights.npz")


def test_long_lists_are_cut(cifar20, densenet):
    _, arrays = densenet
    with pytest.raises(ValueError) as caught:
        from_state_dict(cifar20[0], arrays)
    assert str(caught.value).startswith(
        f"{len(arrays) + len(cifar20[1])} of {len(arrays) + len(cifar20[1])} keys do not match: "
    )
    assert str(caught.value).count("expected") == 8
    assert str(caught.value).endswith(f" and {len(arrays) + len(cifar20[1]) - 8} more")


@pytest.fixture
def tiny_densenet(monkeypatch):
    """The name under which the tiny DenseNet is known."""
    monkeypatch.setitem(models.MODELS, "tiny_densenet", partial(DenseNet, (2, 1, 1, 3)))
    return "tiny_densenet"


def test_load_reads_growth_off_the_file(tmp_path, densenet, tiny_densenet):
    network, arrays = densenet
    write_arrays(tmp_path / "weights.npz", old_names(arrays, "module."))
    loaded = models.load(tiny_densenet, tmp_path / "weights.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(network)
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(network), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["tiny_densenet", "cifar_resnet20"])
def test_files_of_the_other_family_do_not_fit(tmp_path, cifar20, densenet, tiny_densenet, name):
    arrays = {"tiny_densenet": cifar20[1], "cifar_resnet20": densenet[1]}[name]
    write_arrays(tmp_path / "weights.npz", arrays)
    with pytest.raises(
        ValueError,
        match=rf"^weights .*weights\.npz do not fit {name}: \d+ of \d+ keys do not match: .* more$",
    ):
        models.load(name, tmp_path / "weights.npz")


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_training_checkpoints_of_torch_are_loaded(tmp_path, cifar20, suffix):
    torch = pytest.importorskip("torch")
    network, arrays = cifar20
    tensors = {f"module.{key}": torch.tensor(array).bfloat16() for key, array in arrays.items()}
    torch.save(
        {"epoch": 3, "state_dict": tensors, "optimizer": {"lr": 0.1}}, tmp_path / f"weights{suffix}"
    )
    loaded = models.load("cifar_resnet20", tmp_path / f"weights{suffix}")
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(network), strict=True):
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16).astype(jnp.float32))


def test_convert_file_writes_canonical_keys_and_says_what_it_did(tmp_path, densenet, tiny_densenet):
    _, arrays = densenet
    source, out = tmp_path / "old.npz", tmp_path / "weights.npz"
    write_arrays(source, old_names(arrays, "module.model."))
    assert models.convert_file(source, tiny_densenet, out) == [
        "96 of 96 keys fit tiny_densenet: num classes 5, growth 2, width 6",
        "taken off every key: module.model.",
        "passed over, 19 in all: module.model.features.denseblock1.denselayer1.norm.1.num_batches_tracked, "
        "module.model.features.denseblock1.denselayer1.norm.2.num_batches_tracked and 17 more",
        "renamed, 70 in all: features.denseblock1.denselayer1.conv.1.weight -> features.denseblock1.denselayer1.conv1.weight, "
        "features.denseblock1.denselayer1.conv.2.weight -> features.denseblock1.denselayer1.conv2.weight and 68 more",
        f"written: {out}",
    ]
    written = read_arrays(out)
    assert written.keys() == arrays.keys()
    assert all((written[key] == arrays[key]).all() for key in arrays)


def test_convert_file_has_nothing_to_say_of_a_canonical_file(tmp_path, cifar20):
    write_arrays(tmp_path / "old.npz", cifar20[1])
    lines = models.convert_file(tmp_path / "old.npz", "cifar_resnet20", tmp_path / "new.npz")
    assert lines == [
        "97 of 97 keys fit cifar_resnet20: num classes 3, width 2",
        f"written: {tmp_path / 'new.npz'}",
    ]


def test_convert_file_writes_nothing_that_does_not_fit(tmp_path, cifar20):
    write_arrays(tmp_path / "old.npz", cifar20[1])
    with pytest.raises(ValueError, match="do not fit resnet18"):
        models.convert_file(tmp_path / "old.npz", "resnet18", tmp_path / "new.npz")
    with pytest.raises(
        ValueError,
        match=r"^cannot write .*new\.pth: suffix '\.pth' is not one of \.npz, \.safetensors$",
    ):
        models.convert_file("nowhere.npz", "resnet18", tmp_path / "new.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["old.npz"]


def test_new_head_on_the_same_features(network, arrays):
    first, second = (models.with_new_head(network, 7, seed=seed) for seed in (0, 1))
    changed = to_state_dict(first)
    (name,) = {"fc", "linear", "classifier"} & {key.split(".")[0] for key in arrays}
    assert {key for key in arrays if changed[key].shape != arrays[key].shape} == {
        f"{name}.weight",
        f"{name}.bias",
    }
    assert all((changed[key] == arrays[key]).all() for key in arrays if not key.startswith(name))
    assert changed[f"{name}.weight"].shape == (7, arrays[f"{name}.weight"].shape[1])
    assert (changed[f"{name}.weight"] != to_state_dict(second)[f"{name}.weight"]).any()
    # the old one is as it was
    assert to_state_dict(network)[f"{name}.weight"].shape == arrays[f"{name}.weight"].shape


def test_one_class_is_no_head(model):
    with pytest.raises(ValueError, match=r"^num_classes must be 2 or more, got 1$"):
        models.with_new_head(model, 1)


@pytest.mark.parametrize(
    "call",
    [
        models.build,
        lambda name: models.convert_file("nowhere.npz", name, "out.npz"),
        lambda name: models.load(name, "nowhere.npz"),
    ],
)
def test_unknown_name_lists_the_valid_ones(call):
    with pytest.raises(ValueError, match=r"^model 'resnet51' is not one of ") as caught:
        call("resnet51")
    assert all(name in str(caught.value) for name in models.MODELS)


def test_embedded_network_is_there():
    network = models.embedded()
    assert isinstance(network, CifarResNet)
    assert network.image_size == 64


def test_build_takes_seed_and_options():
    def kernel(seed):
        return models.build("cifar_resnet20", seed=seed, width=2).conv1.kernel[...]

    first, second = jax.jit(lambda: (kernel(0), kernel(1)))()
    assert first.shape == (3, 3, 3, 2)
    assert (first != second).any()


def test_a_file_of_save_says_which_network_it_is(tiny_by_name, tmp_path, images):
    made = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "image_size": 12}
    network = models.build("tiny", width=2, num_classes=3, **made)
    models.save(network, "tiny", tmp_path / "net.npz", classes=("cat", "dog", "ink²"))
    loaded = models.load(None, tmp_path / "net.npz")
    assert {key: getattr(loaded, key) for key in made} == made
    unit = images[0] / np.float32(255)
    np.testing.assert_array_equal(loaded.features(unit), network.features(unit))
    assert models.saved_options(tmp_path / "net.npz") == {
        "name": "tiny",
        "classes": ("cat", "dog", "ink²"),
        **made,
    }
    assert models.load("tiny", tmp_path / "net.npz", mean=(0.0, 0.0, 0.0)).mean == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"net\.npz are of tiny, not of cifar_resnet20$"):
        models.load("cifar_resnet20", tmp_path / "net.npz")
    # converted to its own form it says so still
    models.convert_file(tmp_path / "net.npz", "tiny", tmp_path / "again.npz")
    assert models.saved_options(tmp_path / "again.npz") == models.saved_options(
        tmp_path / "net.npz"
    )
    write_arrays(tmp_path / "bare.npz", to_state_dict(network))
    assert models.saved_options(tmp_path / "bare.npz") == {}
    with pytest.raises(ValueError, match=r"bare\.npz does not say which network .*: name it$"):
        models.load(None, tmp_path / "bare.npz")
    models.convert_file(tmp_path / "bare.npz", "tiny", tmp_path / "bare2.npz")
    assert models.saved_options(tmp_path / "bare2.npz") == {}
