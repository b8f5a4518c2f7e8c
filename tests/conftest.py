"""What the tests share: where the real data are, and networks small enough to be checked by hand."""

import dataclasses
import gc
import os
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adv2_jax import models
from adv2_jax.activations import relu

# before jax 0.8 it is experimental
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

# most programs run once: compiling them well does not pay
jax.config.update("jax_disable_most_optimizations", True)
# GPUs and TPUs round the factors of float32 products unless told otherwise, and references too
jax.config.update("jax_default_matmul_precision", "highest")
# Two thirds of the time of the suite is XLA's, which compiles a third of the programs again and again: one cache for all processes
# of a run, those that pytest starts (`-n 2`) among them. It starts empty
CACHE = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.TemporaryDirectory()
for name, value in {
    "jax_compilation_cache_dir": CACHE.name if CACHE else os.environ["JAX_COMPILATION_CACHE_DIR"],
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: the collector, which JAX makes run often, need not look through it


@pytest.fixture(scope="session")
def data_dir():
    """Real images and weights; never part of the repository."""
    path = Path(os.environ.get("ADV2_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no test data in {path}: set ADV2_TEST_DATA")
    return path


def _draw(kind, shape, rng):
    """Weights at which every term of a network is seen: no BatchNorm is the identity, no bias is zero."""
    if kind == "kernel":
        return rng.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5
    if kind in ("var", "scale"):
        return rng.uniform(0.5, 1.5, shape)
    return 0.3 * rng.standard_normal(shape)


@pytest.fixture(scope="session")
def randomised():
    """(build, seed) -> the network that build() would make, with NumPy's numbers; initialising one in JAX takes seconds."""

    def make(build, seed=0):
        rng = np.random.default_rng(seed)
        graph, state = nnx.split(nnx.eval_shape(build))
        flat = nnx.to_flat_state(state)
        drawn = [
            jnp.asarray(_draw(path[-1], variable.shape, rng), jnp.float32)
            for path, variable in flat
        ]
        return nnx.merge(
            graph,
            nnx.from_flat_state(
                [(path, v.replace(a)) for (path, v), a in zip(flat, drawn, strict=True)]
            ),
        )

    return make


@pytest.fixture(scope="session")
def tiny(randomised):
    """seed -> a CIFAR ResNet of eight layers and 4, 8, 16 channels."""
    return lambda seed=0: randomised(lambda: models.CifarResNet(1, width=4, rngs=nnx.Rngs(0)), seed)


@pytest.fixture(scope="module")
def tiny_by_name():
    """A network that compiles in seconds, known by the name "tiny"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", partial(models.CifarResNet, 1))
        yield


@pytest.fixture(scope="session")
def masker(randomised):
    """The masker of a classifier of 10 classes, on an encoder like `tiny`."""
    return randomised(
        lambda: models.Masker(models.CifarResNet(1, width=4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        12,
    )


@pytest.fixture(scope="session")
def model(tiny):
    return tiny()


@pytest.fixture(scope="session")
def images():
    """Six 8-bit images of 16 x 16 pixels, from very dark to very light."""
    noise = np.random.default_rng(1).integers(-60, 60, (6, 16, 16, 3))
    return np.clip(noise + np.linspace(0, 255, 6)[:, None, None, None], 0, 255).astype(np.uint8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """Classifier whose features are linear in each pixel: everything about it is known in closed form.

    features[h, w, k] = sum_c mix[h, w, c, k] image[h, w, c]; head: mean over positions, then weights [k, K] and bias [K].
    """

    mix: jax.Array
    weights: jax.Array
    bias: jax.Array

    def features(self, image, act=relu):
        return jnp.einsum("hwc,hwck->hwk", image, self.mix)

    def head(self, features):
        return features.mean((0, 1)) @ self.weights + self.bias


@pytest.fixture(scope="session")
def make_linear():
    """seed -> a linear classifier of 4 x 4 images, 5 features and 3 classes; class 0 is the likely one."""

    def make(seed=0):
        rng = np.random.default_rng(seed)
        shapes = {"mix": (4, 4, 3, 5), "weights": (5, 3), "bias": (3,)}
        return Linear(
            **{
                name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
                for name, shape in shapes.items()
            }
        )

    return make


@pytest.fixture(scope="session")
def linear(make_linear):
    return make_linear()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Small:
    """Classifier of two 3 x 3 convolutions at stride 2: compiles in a third of the time of the tiny ResNet."""

    kernels: tuple[jax.Array, jax.Array]
    weights: jax.Array

    def features(self, image, act=relu):
        x = 4 * image[None] - 2
        for kernel in self.kernels:
            x = act(
                jax.lax.conv_general_dilated(
                    x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return x[0]

    def head(self, features):
        return features.mean((0, 1)) @ self.weights


@pytest.fixture(scope="session")
def make_small():
    """seed -> a classifier of 10 classes whose features are a quarter of the image's size."""

    def make(seed=0):
        rng = np.random.default_rng(seed)
        shapes = [(3, 3, 3, 8), (3, 3, 8, 16), (16, 10)]
        *kernels, weights = (
            jnp.asarray(_draw("kernel", shape, rng), jnp.float32) for shape in shapes
        )
        return Small(tuple(kernels), 6 * weights)

    return make


class Normed(nnx.Module):
    """One convolution, BatchNorm and a linear layer, for images of any size and 3 classes: what training is tested on."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def features(self, image, act=nnx.relu):
        return act(self.bn(self.conv(image)))

    def head(self, features):
        return self.linear(features.mean((-3, -2)))


@pytest.fixture(scope="session")
def normed():
    return Normed(nnx.Rngs(0))


def colours():
    """64 noisy images; the class is the channel that is a little brighter than the others."""
    labels = np.arange(64) % 3
    images = np.random.default_rng(0).integers(0, 156, (64, 8, 8, 3), np.uint8)
    images[range(64), :, :, labels] += 60
    return images, labels


@pytest.fixture(scope="session")
def coloured():
    return colours()


BRIGHTNESS = """
import jax

@jax.tree_util.register_static
class Brightness:
    def features(self, image, act=jax.nn.relu):
        return act(image - 0.5)

    def head(self, features):
        return 10 * features.mean((0, 1))

network = Brightness()
"""


@pytest.fixture(scope="session")
def brightness(coloured, tmp_path_factory):
    """--model and --images of a network that compiles in no time, and of images that it gets right."""
    folder = tmp_path_factory.mktemp("brightness")
    # a module of its own, which is imported once: JAX knows the network again in the next command
    (folder / "only_brightness.py").write_text(BRIGHTNESS)
    (folder / "network.py").write_text("from only_brightness import network")
    np.savez(folder / "images.npz", images=coloured[0], labels=coloured[1])
    return ["--model", f"{folder}/network.py:network", "--images", f"{folder}/images.npz"]


@pytest.fixture(scope="session")
def pixels():
    """One float image of 4 x 4 pixels, for the linear classifier."""
    return jnp.asarray(np.random.default_rng(2).uniform(0.1, 0.9, (4, 4, 3)), jnp.float32)


@pytest.fixture
def double():
    """Runs a test in float64, where central differences are good to nine digits."""
    with enable_x64(True):
        yield


@pytest.fixture(scope="session")
def slope():
    """(f, x, v) -> central difference of f at x along v, for float64 arguments."""
    return lambda f, x, v, step=1e-5: (f(x + step * v) - f(x - step * v)) / (2 * step)
