"""Every interpreter is explained and attacked under JAX's global settings, and on networks of every precision."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from flax import nnx

from adv2_jax import attack, explain, models, threats
from adv2_jax.interpreters import (
    INTERPRETERS,
    MaskObjective,
    joint,
    mask_interpreter,
    rts_interpreter,
    smooth_relu_grad_interpreter,
)
from adv2_jax.presets import PRESETS, resolve

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def strict():
    """All at once: NaN, ranks and transfers that nobody asked for are errors, and a new array has 64 bits."""
    with (
        jax.debug_nans(True),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
        enable_x64(True),
    ):
        yield


SETTINGS = {"strict": strict, "disable_jit": jax.disable_jit}
SHORT = {"warm_steps": 1, "steps": 2}
MASK = mask_interpreter(steps=3, free=1)
OTHER = {
    "smooth_relu_grad": smooth_relu_grad_interpreter(),
    "encoder mean": rts_interpreter(encoder_loss="mean"),
    "mask implicit": mask_interpreter(
        steps=3, free=1, hypergradient="implicit", objective=MaskObjective(game="preservation")
    ),
}
# those of transformers are made of the same operations
CONVOLUTIONAL = {name: make() for name, make in INTERPRETERS.items() if "rollout" not in name}
EVERY = {**CONVOLUTIONAL, "mask": MASK, **OTHER}


def plan(name, preset="default"):
    """The plan of an interpreter, scored and reset once on the way where it is scored apart."""
    own = EVERY[name]
    return dataclasses.replace(
        resolve(preset, own, **SHORT), score_every=min(resolve(preset, own).score_every, 1)
    )


@pytest.fixture(scope="module")
def pair(masker, make_small):
    """A network of one convolution, as more bring no other types, and a masker whose features have had their means taken."""
    small = make_small()
    shallow = dataclasses.replace(small, kernels=small.kernels[:1], weights=small.weights[:8])
    means = np.random.default_rng(3).uniform(0.5, 1, masker.means.shape).astype(np.float32)
    copy = nnx.clone(masker)
    copy.means[...] = jnp.asarray(means)
    return models.ClassifierWithMasker(shallow, copy)


def cast(model, dtype):
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, model
    )


def look_and_attack(model, images, interpreter, **options):
    """An explanation and an attack; all numbers are finite and float32, and the image changes."""
    labels, targets = np.zeros(len(images), int), np.ones(len(images), int)
    logits, maps = explain(model, images, labels, interpreter=interpreter.interpreter or "grad")
    result = attack(
        model,
        images,
        targets,
        maps,
        interpreter=interpreter.interpreter,
        preset=interpreter,
        **options,
    )
    for array in (
        logits,
        maps,
        result.logits,
        result.maps,
        result.float_logits,
        result.float_maps,
        result.float_images,
    ):
        assert array.dtype == np.float32 and np.isfinite(array).all()
    assert not result.failed.any()
    assert (result.images != images).any()
    return result


@pytest.fixture(scope="module")
def two(images):
    return images[2:4]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for setting in SETTINGS
        for name in (CONVOLUTIONAL if setting == "disable_jit" else EVERY)
    ],
)
def test_every_interpreter_under_every_setting(pair, two, name, setting):
    preset = plan(name)
    if setting == "disable_jit":  # runs every operation on its own: dear, and the same at each step
        preset = dataclasses.replace(preset, steps=1)
    with SETTINGS[setting]():
        look_and_attack(pair, two, preset)


def test_several_interpreters_any_class_and_restarts_under_strict_settings(pair, two):
    several, labels = joint("cam", "grad", "rts"), np.zeros(2, int)
    with strict():
        _, maps = explain(pair, two, labels, interpreter=several)
        options = {"goal": "untargeted", "restarts": 2, **SHORT}
        result = attack(pair, two, labels, maps, interpreter=several, **options)
    assert [m.dtype for m in result.maps] == [np.float32] * 3 and not result.failed.any()
    assert np.isfinite(result.curves.map_l1[:, 1:]).all() and (result.images != two).any()


@pytest.mark.parametrize(
    ("threat", "setting"),
    # linf+flow runs every operation of linf and of flow
    [
        *((name, "strict") for name in threats.THREATS),
        *((n, "disable_jit") for n in ("l2", "linf+flow")),
    ],
)
def test_every_threat_under_every_setting(pair, two, threat, setting):
    with SETTINGS[setting]():
        look_and_attack(pair, two, plan("grad_cam"), threat=threats.THREATS[threat]())


@pytest.mark.parametrize("name", ["grad", "mask"])
def test_the_loop_under_strict_settings(pair, two, name):
    with strict():
        look_and_attack(pair, two, plan(name), driver="fori")


@pytest.mark.parametrize("setting", SETTINGS)
def test_plain_pgd_under_every_setting(pair, two, setting):
    with SETTINGS[setting]():
        for preset in PRESETS:
            look_and_attack(pair, two, resolve(preset, None, **SHORT))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.bfloat16) for name in ("grad", "rts", "mask")),
        *((name, jnp.float16) for name in EVERY),
    ],
)
def test_half_precision_under_every_interpreter(pair, two, name, dtype):
    half = Typed(cast(pair, dtype), dtype)
    look_and_attack(half, two, plan(name))
    if name in INTERPRETERS:
        _, exact = explain(pair, two, [0, 0], interpreter=EVERY[name])
        _, found = explain(half, two, [0, 0], interpreter=EVERY[name])
        assert abs(found - exact).mean() < 0.1  # bfloat16 has three digits


@pytest.mark.parametrize("threat", threats.THREATS)
def test_half_precision_under_every_threat(pair, two, threat):
    half = Typed(cast(pair, jnp.bfloat16), jnp.bfloat16)
    look_and_attack(half, two, plan("grad"), threat=threats.THREATS[threat](), driver="fori")


@pytest.mark.parametrize("name", EVERY)
def test_float64_networks(pair, two, name):
    with enable_x64(True):
        wide = Typed(cast(pair, jnp.float64), jnp.float64)
        for driver in ("fori", "host") if name == "grad" else ("fori",):
            look_and_attack(wide, two, plan(name), driver=driver)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Typed:
    """A network that is given images, and gives features and logits, of its own type."""

    own: models.ClassifierWithMasker
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def masker(self):
        return self.own.masker

    def features(self, image, act=jax.nn.relu):
        return self.own.features(image.astype(self.dtype), act=act)

    def head(self, features):
        return self.own.head(features)


def test_the_command_line_under_every_setting(tmp_path):
    variables = {
        "JAX_DEBUG_NANS": "1",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as tests/conftest.py has it
    }
    line = [
        "attack",
        "--images",
        "shapes:8",
        "--batch-size",
        "2",
        "--limit",
        "2",
        "--steps",
        "2",
        "--quiet",
        "--interpreter",
        "cam",
        "--out",
        "run",
    ]
    program = "import sys; from adv2_jax.cli import script; sys.exit(script())"
    finished = subprocess.run(
        [sys.executable, "-c", program, *line],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "summary.json").exists()
