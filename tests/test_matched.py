"""Matched widths: what GRAD's surrogate remembers, and that an attack with it is one like any other."""

import dataclasses
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import attack, curvature, explain, maps, presets, threats
from adv2_jax.activations import relu_boxed, relu_curved, squared_width
from adv2_jax.attacks import gradient_evaluations
from adv2_jax.capabilities import logits_of, pre_activations
from adv2_jax.interpreters import Context, grad, grad_interpreter
from adv2_jax.interpreters.gradients import DECAY, LAYER, NEURON
from adv2_jax.losses import logit, map_l2

MATCHED = grad_interpreter(tau="matched")
PRESET = replace(presets.PRESETS["default"]["grad"], interpreter=MATCHED, steps=6)
LABELS, TARGETS = np.array([0, 1, 2]), np.array([4, 5, 6])


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def run(small, images):
    maps = explain(small, images[:3], LABELS, interpreter="grad")[1]

    def attacked(preset=PRESET, **options):
        interpreter = preset.interpreter
        return attack(
            small, images[:3], TARGETS, maps, interpreter=interpreter, preset=preset, **options
        )

    return attacked


def test_widths_are_those_of_the_decayed_sum_of_movements(small, images):
    x = jnp.asarray(images[1] / np.float32(255))
    noise = np.random.default_rng(0).uniform(-0.05, 0.05, (4, *x.shape)).astype(np.float32)
    target = jnp.zeros((16, 16))

    def loss(x, surrogate, context):
        seen = surrogate(small, x, 4, context)
        return map_l2(seen.map, target), seen

    slope = jax.jit(jax.grad(loss, has_aux=True), static_argnames="surrogate")
    memory = MATCHED.init(small, x)
    before = [np.zeros(z.shape) for z in pre_activations(small, x)]
    moved = before
    for step in noise:
        now = [np.asarray(z, np.float64) for z in pre_activations(small, x + step)]
        moved = [DECAY * s + z - last for s, z, last in zip(moved, now, before, strict=True)]
        before = now
        gradient, seen = slope(x + step, MATCHED.surrogate, Context(1.0, memory=memory))
        memory = seen.memory
    widths = iter([(NEURON * s) ** 2 + LAYER**2 * np.mean(s**2, dtype=np.float64) for s in moved])

    def plain(x):
        widths_again = list(widths)
        it = iter(widths_again)
        m = grad(small, x, 4, act=lambda z: relu_curved(z, jnp.float32(next(it))))
        return map_l2(m, target)

    expected = jax.grad(plain)(x + noise[-1])
    assert jnp.abs(expected).max() > 0
    # the mean is a difference of float32 numbers some ten times as large as the movement
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert [z.shape for z in memory] == [z.shape for z in before]


def test_values_are_those_of_the_true_network(small, images):
    x = jnp.asarray(images[1] / np.float32(255))
    memory = MATCHED.init(small, x)
    for context in Context(0.1, memory=memory), Context(0.1):
        seen = MATCHED.surrogate(small, x, 4, context)
        np.testing.assert_array_equal(seen.map, grad(small, x, 4))
        np.testing.assert_array_equal(seen.logits, logits_of(small, x))
    assert MATCHED.faithful


def test_spread_maxima_change_derivatives_only(small, images):
    x = jnp.asarray(images[1] / np.float32(255))
    plain, spread = (grad_interpreter(spread=spread).surrogate for spread in (False, True))
    values, slopes = zip(
        *(
            jax.value_and_grad(lambda x, s=s: (s(small, x, 4, Context(0.1)).map ** 2).sum())(x)
            for s in (plain, spread)
        ),
        strict=True,
    )
    assert values[0] == values[1]
    assert (slopes[0] != slopes[1]).any()
    np.testing.assert_array_equal(
        spread(small, x, 4, Context(0.1)).map, plain(small, x, 4, Context(0.1)).map
    )


def test_spread_max_shares_its_derivative_by_powers():
    values = jnp.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    maximum = partial(maps.spread_max, power=2)
    np.testing.assert_array_equal(maximum(values), [2, 0])
    slope = jax.grad(lambda v: maximum(v).sum())(values)
    # 1/4, 1 and 1, divided by their sum; where all are 0, equal shares
    np.testing.assert_allclose(slope, [[1 / 9, 4 / 9, 4 / 9], [1 / 3] * 3], rtol=1e-6)
    # of a power without end that of the maximum
    sharp = jax.grad(lambda v: maps.spread_max(v, 100).sum())(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(sharp, [0, 1], atol=1e-6)


def test_outside_of_an_attack_the_width_is_that_of_the_context(small, images):
    x = jnp.asarray(images[1] / np.float32(255))
    v = jnp.ones_like(x)
    matched, plain = (
        curvature.map_jacobian(interpreter, small, x, 4, Context(0.01))(v)
        for interpreter in (MATCHED, grad_interpreter())
    )
    assert jnp.abs(plain).max() > 0
    np.testing.assert_array_equal(matched, plain)


def test_the_loop_does_what_the_host_does_at_any_batch_size(run):
    # a warm start too: the memory begins after it
    options = {"preset": replace(PRESET, warm_steps=2)}
    host = run(**options, driver="host")
    for other in (run(**options, driver="fori"), run(**options, driver="host", batch_size=2)):
        np.testing.assert_array_equal(other.images, host.images)
        np.testing.assert_allclose(other.curves.map_l1, host.curves.map_l1, atol=1e-5)


def test_an_attack_depends_on_its_movements_but_not_on_tau(run):
    schedule = presets.constant(3.0)
    matched, other = run(), run(replace(PRESET, tau=schedule))
    np.testing.assert_array_equal(matched.images, other.images)
    plain = replace(PRESET, interpreter=grad_interpreter())
    assert (run(plain).images != matched.images).any()


def test_pieces_of_an_attack_carry_the_memory(run):
    """Snapshots cut the loop into chunks."""
    np.testing.assert_array_equal(run(snapshots=1).images, run().images)


def test_costs_what_a_schedule_costs(small):
    plain = replace(PRESET, interpreter=grad_interpreter())
    costs = [gradient_evaluations(small, p, threats.linf(), (16, 16, 3)) for p in (PRESET, plain)]
    assert costs[0] == costs[1]


def test_makes_no_nan_and_moves_nothing_unasked(run):
    # a step of size 0: neurons are at rest, and their layers with them
    still = replace(
        PRESET,
        interpreter=grad_interpreter(tau="matched", spread=True),
        step_size=presets.constant(0.0),
        steps=3,
    )
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow"):
        result = run(still)
    assert not result.failed.any()


@pytest.mark.parametrize("threat", [threats.l2(1.0), threats.flow()], ids=["l2", "flow"])
def test_other_threat_models(run, threat):
    result = run(threat=threat)
    assert not result.failed.any()
    assert np.isfinite(result.maps).all()


def test_half_precision_remembers_in_float32(small, images):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small)
    x = jnp.asarray(images[1] / 255, jnp.bfloat16)
    memory = MATCHED.init(half, x)
    seen = MATCHED.surrogate(half, x, 4, Context(0.1, memory=memory))
    assert {z.dtype for z in [*memory, *seen.memory]} == {jnp.dtype("float32")}


def test_json_and_refusals(small, images):
    written = json.loads(json.dumps(presets.to_dict(PRESET)))
    assert written["interpreter"] == {
        "kind": "grad",
        "pool": None,
        "tau": "matched",
        "spread": False,
    }
    assert presets.from_dict("grad", written) == PRESET
    assert grad_interpreter() == grad_interpreter(tau=None) != MATCHED
    with pytest.raises(ValueError, match="'wide' is neither None"):
        grad_interpreter(tau="wide")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Closed:
        inner: object

        def logits(self, image):
            return logits_of(self.inner, image)

    with pytest.raises(ValueError, match="Closed does not pass act on: 2 ReLUs"):
        attack(Closed(small), images[:3], TARGETS, np.zeros((3, 16, 16)), interpreter=MATCHED)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneLayer:
    first: jax.Array  # [D, hidden]
    second: jax.Array  # [hidden, K]

    def logits(self, image, act=jax.nn.relu):
        return act(image.ravel() @ self.first) @ self.second


def test_at_one_layer_a_box_sees_exactly_what_the_step_meets():
    rng = np.random.default_rng(0)
    model = OneLayer(
        *(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in [(48, 64), (64, 3)])
    )
    x = jnp.asarray(rng.uniform(size=(4, 4, 3)), jnp.float32)
    v = jnp.asarray(rng.choice([-1.0, 1.0], x.shape), jnp.float32)
    # of a logit, since other scores have a softmax term that is not linear in a long step
    secant = curvature.secant(model, x, 1, step=0.3, score=logit)(v)
    box = curvature.Matched(kernel=relu_boxed).activations(model, x, v, 0.3)
    assert jnp.abs(secant).max() > 0
    # float32 sums over 64 neurons
    np.testing.assert_allclose(
        curvature.hessian(model, x, 1, act=box, score=logit)(v), secant, rtol=1e-4, atol=1e-4
    )


def test_a_layer_at_rest_has_a_width():
    tau = squared_width(jnp.zeros(3), neuron=1.0, layer=1.0)
    assert jnp.isfinite(
        jax.grad(lambda z: jax.grad(lambda z: relu_curved(z, tau).sum())(z).sum())(jnp.zeros(3))
    ).all()


def test_the_file_of_the_guide_is_the_preset_that_was_measured():
    read = presets.read(Path(__file__).parents[1] / "notebooks" / "matched.json")["grad"]
    assert read.interpreter == grad_interpreter(tau="matched", spread=True)
    default = presets.PRESETS["default"]["grad"]
    assert (read.steps, read.momentum) == (default.steps, default.momentum)
    np.testing.assert_allclose(read.step_size(300)(0), 0.5 / 255, rtol=1e-3)
    np.testing.assert_allclose(read.step_size(300)(300), 0.01 / 255, rtol=1e-3)
