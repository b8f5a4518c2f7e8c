"""Settings are values: they compare, print and pickle, into another process too; caches are bounded."""

import multiprocessing
import pickle
import re
from dataclasses import replace

import jax
import pytest

from adv2_jax import activations, interpreters, losses, presets, threats
from adv2_jax.interpreters import INTERPRETERS, MaskObjective
from adv2_jax.options import bind, shared
from adv2_jax.presets import PRESETS, constant, decay, geometric, ramp
from adv2_jax.threats import THREATS

OBJECTIVE = MaskObjective(l1=0.5, score=losses.probability, game="preservation")
SETTINGS = {
    **{f"threat {name}": make for name, make in THREATS.items()},
    "threat with a radius": lambda: threats.linf(0.1),
    "threat changed": lambda: threats.l2(0.7)._replace(name="mine"),
    "two options": lambda: threats.linf_flow(0.1, penalty=1e-3),
    **{f"interpreter {name}": make for name, make in INTERPRETERS.items()},
    "pool": lambda: interpreters.grad_interpreter(pool=2),
    "smooth": interpreters.smooth_relu_grad_interpreter,
    "an activation of JAX": lambda: interpreters.smooth_relu_grad_interpreter(act=jax.nn.softplus),
    "an activation of ours": lambda: interpreters.smooth_relu_grad_interpreter(
        act=activations.relu
    ),
    "an activation with an option": lambda: interpreters.smooth_relu_grad_interpreter(
        act=activations.relu_sigmoid(2.0)
    ),
    "mean": lambda: interpreters.rts_interpreter(encoder_loss="mean", encoder_weight=0.3),
    "objective": lambda: interpreters.mask_interpreter(
        objective=OBJECTIVE, steps=7, hypergradient="implicit"
    ),
    "interpreter changed": lambda: interpreters.cam_interpreter()._replace(faithful=False),
    **{
        f"{kind} {name}": (lambda preset=preset: replace(preset))
        for kind, named in PRESETS.items()
        for name, preset in named.items()
    },
    "preset changed": lambda: replace(PRESETS["default"]["cam"], steps=7, tau=geometric(0.1, 1e-3)),
    "activation": lambda: activations.softplus(3.0),
    "constant": lambda: constant(0.5),
    "ramp": lambda: ramp(1.0, 2.0),
    "decay": lambda: decay(2.0, 1.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_compare_print_and_pickle(name):
    setting = SETTINGS[name]()
    assert setting == SETTINGS[name]() and hash(setting) == hash(SETTINGS[name]())
    sent = pickle.loads(pickle.dumps(setting))
    assert sent == setting and hash(sent) == hash(setting) and type(sent) is type(setting)
    assert repr(sent) == repr(setting)
    assert not re.search(r"0x|lambda|<", repr(setting))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (threats.linf(0.1), ["Threat(name='linf'", "epsilon=0.1"]),
        (threats.flow(3e-4), ["name='flow'", "0.0003"]),
        (interpreters.grad_interpreter(pool=2), ["Interpreter(name='grad'", "pool=2"]),
        (interpreters.mask_interpreter(steps=7, free=3), ["name='mask'", "steps=7", "free=3"]),
        (
            interpreters.smooth_relu_grad_interpreter(act=activations.relu_sigmoid(2.0)),
            ["relu_sigmoid", "beta=2.0"],
        ),
        (
            PRESETS["default"]["cam"],
            ["Preset(", "name='cam'", "steps=150", "Course(shape='decay'", "map_mse"],
        ),
        (PRESETS["paper"]["grad"], ["paper_grad_balance"]),
    ],
)
def test_what_is_printed_names_what_was_chosen(setting, words):
    assert [word for word in words if word not in repr(setting)] == []


def test_different_options_are_different_values():
    settings = {name: make() for name, make in SETTINGS.items()}
    same = {repr(setting) for setting in settings.values()}
    assert len(same) == len(set(settings.values()))
    assert threats.linf(0.1) != threats.linf(0.2) and constant(1.0) != ramp(1.0, 2.0)


@pytest.mark.slow
def test_settings_reach_another_process():
    sent = [
        threats.l2(0.7),
        interpreters.smooth_relu_grad_interpreter(act=activations.relu_sigmoid(2.0)),
        PRESETS["default"]["mask"],
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(repr, sent) == [repr(setting) for setting in sent]


def test_schedules_are_those_of_the_name():
    for course, values in (
        (constant(3.0), [3, 3, 3]),
        (ramp(1.0, 3.0), [1, 2, 3]),
        (decay(2.0, 1.0), [2, 1.5, 1]),
        (geometric(4.0, 1.0), [4, 2, 1]),
    ):
        assert [float(course(2)(step)) for step in range(3)] == pytest.approx(values, rel=1e-6)
        assert float(course(0)(0)) == values[0]


def test_a_bound_function_is_the_function_of_its_other_arguments():
    double = bind(lambda x, *, factor, shift=0: factor * x + shift, factor=2)
    assert double(3) == 6 and double(3, shift=1) == 7


def test_factories_remember_a_bounded_number_of_objects():
    made = []

    @shared
    def factory(option):
        made.append(option)
        return [option]

    first = factory(0)
    assert factory(option=0) is first
    for option in range(1000):
        factory(option)
    assert factory(0) is not first
    assert len(made) == 1001


def test_a_name_and_its_interpreter_stand_for_equal_presets():
    assert presets.resolve("default", "cam") == presets.resolve(
        "default", interpreters.cam_interpreter()
    )
