"""Devices, precision and the cache of programs; several devices are simulated in a process of their own.

This file is also the program of that process: it prints what the tests below check.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Normed
from flax import nnx

import adv2_jax as adv2
from adv2_jax import devices, precision
from adv2_jax.data import ImageSet
from adv2_jax.runs.run import Settings, run
from adv2_jax.training.classifier import train_classifier


def drawn():
    """A network with BatchNorm, and 7 images of 16 x 16 pixels with its own predictions as labels."""
    model = Normed(nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    return model, ImageSet(images)


def results(model, images, count):
    """The bytes of results.npz of a run in batches of two, on so many devices."""
    options = {"steps": 2, "batch_size": 2, "snapshots": 3, "devices": count}
    settings = Settings(["cam"], adv2.threats.linf(), **options)
    with tempfile.TemporaryDirectory() as out:
        run(model, images, settings, Path(out))
        return (Path(out) / "results.npz").read_bytes()


def losses(count):
    """The losses of a training in batches of four, on so many devices."""
    model, images = drawn()
    labels = np.arange(7) % 3
    options = {"epochs": 3, "batch_size": 4, "devices": count}
    return train_classifier(model, images.images, labels, **options)[1].tolist()


pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def report():
    """Output of the program on four simulated devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(adv2.__file__).parents[1]),
    }
    finished = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.slow  # compiles the programs of a run for one, two and four devices
@pytest.mark.skipif(not devices.SHARDS, reason="jax 0.7 cannot differentiate sharded convolutions")
class TestSeveralDevices:
    def test_results_have_the_same_bytes(self, report):
        one, two, four = report["results"]
        assert one == two == four

    def test_training_has_the_same_losses_to_rounding(self, report):
        one, two, four = report["losses"]
        assert one[0] > 1
        # sums of four terms in another order, and what a few steps make of them
        np.testing.assert_allclose([two, four], [one, one], rtol=1e-4)

    def test_too_many_are_refused(self, report):
        assert report["refused"] == [
            "5 devices are asked for, JAX sees 4 on this host",
            "batch_size must be a multiple of the 3 devices, got 4",
        ]


def test_an_old_jax_uses_one_device_and_says_so(monkeypatch):
    monkeypatch.setattr(devices, "SHARDS", False)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert devices.number_of_devices() == 1
    with pytest.raises(ValueError, match=r"2 devices are asked for, and jax .* splits no batch"):
        devices.number_of_devices(2)


def test_bfloat16_narrows_the_weights_and_no_image(tiny):
    model = tiny(0)
    narrow = precision.computing(model, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow) if leaf.dtype != jnp.uint32} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert precision.computing(model, "high") is model
    image = jnp.full((16, 16, 3), 0.7001, jnp.float32)
    # the network computes in bfloat16 from its first convolution on
    assert jax.eval_shape(narrow.features, image).dtype == jnp.bfloat16
    # .7 has steps of 1/256 in bfloat16: a change of a tenth of a pixel value would be lost
    moved = jax.jit(lambda x: narrow.head(narrow.features(x)))
    assert (moved(image) != moved(image + 0.004)).any()


def test_steps_in_bfloat16_find_what_float32_reports(tiny):
    model, images = tiny(0), np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    maps = np.random.default_rng(1).random((2, 4, 4), np.float32)
    options = {"interpreter": "cam", "steps": 4, "threat": adv2.threats.linf(0.1)}
    found = {
        name: adv2.attack(model, images, [1, 2], maps, precision=name, **options)
        for name in ("highest", "bfloat16")
    }
    half = found["bfloat16"]
    assert half.logits.dtype == half.float_images.dtype == np.float32
    logits, shown = adv2.explain(model, half.images, [1, 2], interpreter="cam")
    np.testing.assert_array_equal(half.logits, logits)
    np.testing.assert_array_equal(half.maps, shown)
    # other steps were taken, towards the same classes
    assert (half.images != found["highest"].images).any()
    np.testing.assert_allclose(half.curves.loss, found["highest"].curves.loss, rtol=0.2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoCast:
    """A network that hands its image to a convolution as it is, which takes one type only."""

    kernel: jax.Array

    def logits(self, image, act=jax.nn.relu):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            image[None], self.kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return act(x)[0].mean((0, 1))


def test_a_network_that_does_not_cast_its_image_is_refused_in_one_line():
    model = NoCast(jnp.ones((3, 3, 3, 4)))
    images = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"precision 'bfloat16' needs a network that casts"
    ) as error:
        adv2.attack(model, images, [1], interpreter=None, steps=1, precision="bfloat16")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="precision 'half' is not one of highest, high"):
        adv2.attack(model, images, [1], interpreter=None, steps=1, precision="half")


@pytest.fixture
def settings_of_jax():
    """Put JAX's settings of the cache back after a test."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: jax.config.values[name] for name in names}
    yield names
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache(settings_of_jax, tmp_path, monkeypatch):
    for name in settings_of_jax:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = jax.config.values["jax_compilation_cache_dir"]
    devices.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == mine  # the user's own setting wins
    jax.config.update("jax_compilation_cache_dir", None)
    devices.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "adv2_jax")
    assert (tmp_path / "adv2_jax").is_dir()


def test_a_cache_that_cannot_be_made_is_done_without(settings_of_jax, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    devices.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.slow  # two processes
def test_the_second_run_of_a_command_compiles_nothing(brightness, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    } | {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_LOG_COMPILES": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    words = "--quiet --overwrite --limit 1 --steps 1 --snapshots 0 --interpreter cam"
    command = [sys.executable, "-m", "adv2_jax", "attack", *brightness, *words.split()]
    counts = []
    for _ in range(2):
        out = ["--out", str(tmp_path / "run")]
        ended = subprocess.run(command + out, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr
        asked = ended.stderr.count("Finished XLA compilation of")
        counts.append((asked, ended.stderr.count("Persistent compilation cache hit")))
    (asked, hits), (again, found) = counts
    assert asked > hits  # the first compiles
    assert again == found > 0


if __name__ == "__main__":
    model, images = drawn()
    runs = [results(model, images, count) for count in (1, 2, 4)]
    refused = []
    for call in (lambda: results(model, images, 5), lambda: losses(3)):
        try:
            call()
        except ValueError as error:
            refused.append(str(error))
    print(
        json.dumps(
            {
                "results": [one.hex() for one in runs],
                "losses": [losses(count) for count in (1, 2, 4)],
                "refused": refused,
            }
        )
    )
