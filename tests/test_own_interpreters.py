"""A user's own interpreter: from a function, from a file, and what it is attacked with."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import attack, cli, explain, interpreters, maps, presets, threats
from adv2_jax.activations import relu_curved
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters import Context, from_explain, grad_interpreter, mask_interpreter
from adv2_jax.losses import log_odds
from adv2_jax.runs.run import interpreter_of

FILE = Path(__file__).parents[1] / "notebooks" / "integrated_gradients.py"
WIDE = threats.linf(0.1)


def centre(model, image, label):
    """How bright each pixel is."""
    return maps.min_max(image.mean(axis=-1))


def scaled(model, image, label, act=None):
    return maps.min_max(
        jnp.abs(interpreters.input_gradient(model, image, label, act=act)[0]).sum(-1)
    )


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


def test_the_surrogate_is_the_function_itself(small, images):
    image = images[2] / np.float32(255)
    interpreter = from_explain("bright-1", centre)
    seen = interpreter.surrogate(small, image, 3, Context(1e-3))
    np.testing.assert_array_equal(seen.map, centre(small, image, 3))
    np.testing.assert_array_equal(seen.logits, logits_of(small, image))
    assert (
        interpreter == from_explain("bright-1", centre)
        and interpreter.name == "bright-1"
        and interpreter.needs == ()
    )


def test_a_function_that_takes_an_activation_is_given_a_curved_one(small, images):
    image = jnp.asarray(images[2] / np.float32(255))
    interpreter = from_explain("scaled", scaled)

    def drawn(draw):
        """A map, and the gradient of the sum of its squares."""
        map_, pull = jax.vjp(draw, image)
        return map_, pull(2 * map_)[0]

    (map_, actual), (_, expected), (plain_map, plain) = (
        jax.jit(partial(drawn, draw))()
        for draw in (
            lambda x: interpreter.surrogate(small, x, 3, Context(1e-2)).map,
            lambda x: scaled(small, x, 3, act=lambda z: relu_curved(z, 1e-2)),
            lambda x: scaled(small, x, 3),
        )
    )
    np.testing.assert_allclose(map_, plain_map, atol=1e-6)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(actual - plain).max() > 0.1 * np.abs(actual).max()
    assert interpreter.needs == ("act",)


def test_what_no_preset_knows_takes_the_numbers_of_its_like():
    for name, interpreter in {
        "cam": from_explain("own", centre),
        "grad": from_explain("own", scaled),
        "mask": mask_interpreter()._replace(name="own"),
    }.items():
        for preset, known in presets.PRESETS.items():
            actual = presets.resolve(preset, interpreter)
            assert (actual.interpreter, actual.steps, actual.balance) == (
                interpreter,
                known[name].steps,
                known[name].balance,
            )
    assert presets.resolve("default", grad_interpreter()) == presets.PRESETS["default"]["grad"]


def test_names_are_those_of_folders():
    with pytest.raises(
        ValueError, match=r"^interpreter name '\.\./x' may have letters, digits, _ and - only$"
    ):
        from_explain("../x", centre)


def test_integrated_gradients_are_the_mean_over_the_path(linear):
    interpreter = interpreter_of(f"{FILE}:interpreter")
    image = jnp.asarray(np.random.default_rng(0).random((4, 4, 3)), jnp.float32)
    actual = interpreter.explain(linear, image, 1)
    shares = (np.arange(8) + 0.5) / 8
    slopes = [
        jax.grad(lambda x: log_odds(linear.head(linear.features(x)), 1))(np.float32(share) * image)
        for share in shares
    ]
    np.testing.assert_allclose(
        actual, maps.min_max(jnp.abs(image * np.mean(slopes, axis=0)).sum(-1)), atol=1e-6
    )


def test_it_is_attacked_by_name_of_its_file(small, images):
    interpreter = interpreter_of(f"{FILE}:interpreter")
    logits, _ = explain(small, images[1:5], np.zeros(4, int), interpreter="grad")
    labels, targets = logits.argsort(1)[:, -1], logits.argsort(1)[:, -2]
    _, benign = explain(small, images[1:5], labels, interpreter=interpreter)
    joint = attack(
        small, images[1:5], targets, benign, interpreter=interpreter, threat=WIDE, steps=80
    )
    plain = attack(small, images[1:5], targets, interpreter=None, threat=WIDE, steps=80)
    _, moved = explain(small, plain.images, targets, interpreter=interpreter)
    assert np.abs(joint.maps - benign).mean() < 0.6 * np.abs(moved - benign).mean()
    # a gradient of a gradient at each of eight points
    assert joint.gradient_evaluations > 2 * 8 * 80


@pytest.mark.slow
def test_the_command_line_takes_it_and_transfers_it(brightness, tmp_path):
    out, few = tmp_path / "out", ["--limit", "2", "--steps", "2", "--snapshots", "0", "--quiet"]
    words = [*brightness, *few, "--out", str(out)]
    assert cli.main(["attack", "--interpreter", f"{FILE}:interpreter", "cam", *words]) == 0
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["interpreter"] for row in rows] == ["mine"] * 3 + ["cam"] * 3
    assert cli.main(["transfer", str(out), *brightness[:2], "--quiet"]) == 0
    transfer = json.loads((out / "summary.json").read_text())["transfer"]
    assert "mine" in transfer["interpreters"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"own.py has no 'mine'; it has nothing of its own"),
        (
            "mine = 3",
            r"own.py:mine is neither an adv2_jax Interpreter nor a function that makes one, but int",
        ),
        (
            "def mine(model, image, label): return image",
            r"a function that makes one of nothing: TypeError: mine\(\) missing 3",
        ),
        (
            "def mine(): return 1",
            r"neither an adv2_jax Interpreter nor a function that makes one, but int",
        ),
        ("mine = 1 / 0", r"cannot import .*own.py: ZeroDivisionError"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, capsys, text, message):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        interpreter_of(f"{tmp_path}/own.py:mine")
    assert "\n" not in str(caught.value)
    words = ["--images", "shapes:6", "--out", str(tmp_path / "out")]
    assert cli.main(["attack", "--interpreter", f"{tmp_path}/own.py:mine", *words]) == 2
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count("\n") == 1
