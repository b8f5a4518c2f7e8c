"""Batches, devices and drivers under XLA's default flags, in a process of its own.

All other tests run with `jax_disable_most_optimizations` (conftest.py), which no user sets, and on
one device. This file is also the program of that process: it prints what the tests below check.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adv2_jax as adv2
from adv2_jax.crafting import joint_options, tabulate
from adv2_jax.descent import Problem, descend, init
from adv2_jax.devices import SHARDS, spread
from adv2_jax.presets import resolve

MAP_SHAPES = {"cam": (4, 4), "grad": (16, 16)}
STEPS = 4
WIDE = adv2.threats.linf(0.1)
TARGETS = np.arange(5) % 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Net:
    """Two convolutions and a linear head, 3 classes."""

    kernels: list[jax.Array]
    weights: jax.Array

    def features(self, image, act=jax.nn.relu):
        x = image[None] - 0.5
        for kernel in self.kernels:
            numbers = ("NHWC", "HWIO", "NHWC")
            x = act(
                jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)
            )
        return x[0]

    def head(self, features):
        return features.mean((0, 1)) @ self.weights


def drawn():
    """A network, and five images of 16 x 16 pixels."""
    rng = np.random.default_rng(0)
    *kernels, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((3, 3, 3, 8), (3, 3, 8, 16), (16, 3))
    )
    return Net(kernels, weights), rng.integers(0, 256, (5, 16, 16, 3), np.uint8)


def equal(one, other):
    """Whether all arrays of two pytrees have the same bits."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def report(name):
    """Everything that the tests below look at, for one interpreter."""
    (model, images), preset = drawn(), resolve("default", name, steps=STEPS)
    maps = np.random.default_rng(1).random((5, *MAP_SHAPES[name]), np.float32)

    def attacked(batch_size):
        options = {"interpreter": name, "threat": WIDE, "steps": STEPS, "batch_size": batch_size}
        result = adv2.attack(model, images, TARGETS, maps, **options)
        return result.images, result.float_images

    five, two, one = (attacked(batch_size) for batch_size in (5, 2, 1))

    unit = images[:4] / np.float32(255)
    problems = jax.device_put(Problem(unit, TARGETS[:4].astype(np.int32), maps[:4]))
    # down the gradient, not its sign, which rounding may turn
    options = joint_options(preset, adv2.threats.l2(2.0))._replace(rounded=False)
    schedule = tabulate(STEPS, preset.step_size, preset.balance, preset.tau)
    start = jax.jit(jax.vmap(partial(init, options=options)))(problems.image)

    def moved(driver, steps):
        run = partial(descend, model, problems, start, schedule, options, span=(0, steps))
        return np.asarray(run(driver=driver)[0].params - start.params)

    return {
        "changed": bool((five[0] != images).any()),
        "batches": [equal(five, two), equal(five, one)],
        "drivers": [off(moved("host", steps), moved("fori", steps)) for steps in (1, STEPS)],
        **(on_two_devices(model, problems, preset) if SHARDS else {}),
    }


def on_two_devices(model, problems, preset):
    """`craft` of four images on one device, and on two with two images each."""
    sharded = spread(problems, 2)
    craft = jax.jit(lambda model, problems: adv2.craft(model, problems, preset, WIDE))
    programs = [craft.lower(model, asked).compile() for asked in (problems, sharded)]
    alone, shared = (
        program(model, asked) for program, asked in zip(programs, (problems, sharded), strict=True)
    )
    return {
        "devices": [len(crafted.params.sharding.device_set) for crafted in (alone, shared)],
        "images": equal((alone.params, alone.last), (shared.params, shared.last)),
        "curves": off(alone.curves.loss, shared.curves.loss),
        "collectives": sorted(set(re.findall(COLLECTIVE, programs[1].as_text()))),
    }


def off(one, other):
    """The largest difference of two arrays, as a share of the largest value."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).max() / np.abs(one).max())


pytestmark = pytest.mark.slow  # compiles two dozen programs, and compiles them well
COLLECTIVE = r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+)\b"


@pytest.fixture(scope="module")
def reports():
    """Output of the program: interpreter -> what `report` found."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(adv2.__file__).parents[1]),
    }
    command = [sys.executable, "-W", "error", __file__]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("name", MAP_SHAPES)
def test_batch_size_changes_no_bit(reports, name):
    assert reports[name]["changed"]
    assert reports[name]["batches"] == [True, True]


@pytest.mark.skipif(not SHARDS, reason="jax 0.7 cannot differentiate sharded convolutions")
@pytest.mark.parametrize("name", MAP_SHAPES)
def test_two_devices_change_no_bit_of_the_images_and_need_no_collectives(reports, name):
    assert reports[name]["devices"] == [1, 2]
    assert reports[name]["images"]
    # two images at a time round otherwise than four: float32, a few steps
    assert reports[name]["curves"] < 1e-5
    assert reports[name]["collectives"] == []


@pytest.mark.parametrize("name", MAP_SHAPES)
def test_drivers_differ_by_rounding(reports, name):
    first, last = reports[name]["drivers"]
    assert first < 2e-6  # a few roundings of float32
    assert last < 1e-4  # they grow from step to step


if __name__ == "__main__":
    print(json.dumps({name: report(name) for name in MAP_SHAPES}))
