"""Work counted in traced programs, against closed forms, and against XLA's own count of the lowered programs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.sparse.linalg import cg

from adv2_jax import models, threats
from adv2_jax.attacks import gradient_evaluations, map_shape
from adv2_jax.cost import multiply_adds
from adv2_jax.crafting import joint_options
from adv2_jax.descent import Numbers, Problem, init, step
from adv2_jax.interpreters import (
    INTERPRETERS,
    guided_backprop_interpreter,
    integrated_gradients_interpreter,
    mask_interpreter,
    smooth_grad_interpreter,
    smooth_relu_grad_interpreter,
)
from adv2_jax.presets import resolve


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel, stride=1, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, **options
    )


CONV = conv, ones(1, 8, 8, 3), ones(3, 3, 3, 5)
FORMS = {
    "dot": ((jnp.matmul, ones(3, 4), ones(4, 5)), 3 * 4 * 5),
    "batched dot": ((jnp.matmul, ones(7, 3, 4), ones(7, 4, 5)), 7 * 3 * 4 * 5),
    "einsum": (
        (lambda a, b: jnp.einsum("hwc,hwck->hwk", a, b), ones(4, 4, 3), ones(4, 4, 3, 5)),
        4 * 4 * 3 * 5,
    ),
    "convolution": (CONV, 8 * 8 * 5 * 9 * 3),
    "strided": ((lambda x, k: conv(x, k, 2), *CONV[1:]), 4 * 4 * 5 * 9 * 3),
    "its gradient in the image": (
        (jax.grad(lambda x, k: (conv(x, k, 2) ** 2).sum()), *CONV[1:]),
        2 * 4 * 4 * 5 * 9 * 3,
    ),
    "depthwise": (
        (lambda x, k: conv(x, k, feature_group_count=4), ones(1, 8, 8, 4), ones(3, 3, 1, 4)),
        8 * 8 * 4 * 9,
    ),
    "no work": ((lambda x: jnp.sin(x).sum(), ones(9)), 0),
    "jit and checkpoint": ((jax.jit(jax.checkpoint(jnp.matmul)), ones(3, 4), ones(4, 5)), 60),
    "scan": (
        (lambda a: jax.lax.scan(lambda x, _: (x @ x, None), a, None, length=6)[0], ones(3, 3)),
        6 * 27,
    ),
    "fori_loop": ((lambda a: jax.lax.fori_loop(2, 9, lambda _, x: x @ x, a), ones(3, 3)), 7 * 27),
    "while": (
        (lambda a: jax.lax.while_loop(lambda x: x.sum() < 1.5, lambda x: x @ x, a), ones(3, 3)),
        27,
    ),
    "cond": (
        (lambda a: jax.lax.cond(a.sum() > 0, lambda x: x @ x, lambda x: x, a), ones(3, 3)),
        27,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_closed_forms(form):
    (f, *arguments), expected = FORMS[form]
    assert multiply_adds(f, *arguments) == expected


def test_conjugate_gradients_are_charged_for_all_their_iterations():
    size = 50
    one = size**2

    def solve(a, b):
        return cg(lambda v: a @ v, b, maxiter=10)[0]

    # the first residual, then one an iteration
    products = multiply_adds(solve, ones(size, size), ones(size)) / one
    # scalar products of vectors come on top: 1/50 each
    assert products == pytest.approx(11, abs=0.7)


def flops_of_a_step(model, preset, shape):
    """XLA's count for the lowered step, elementwise operations included."""
    image, label = ones(*shape), jax.ShapeDtypeStruct((), jnp.int32)
    options, numbers, interpreter = (
        joint_options(preset, threats.linf()),
        Numbers(*np.ones(3, np.float32)),
        preset.interpreter,
    )
    drawn = (1, 1) if interpreter is None else map_shape(model, shape, interpreter)
    memory = (
        None
        if interpreter is None or interpreter.solver is None
        else jax.eval_shape(interpreter.solver.init, image)
    )

    def one(model, problem, memory):
        return step(model, problem, init(problem.image, options, None, memory), numbers, options)

    return (
        jax.jit(one)
        .lower(model, Problem(image, label, ones(*drawn)), memory)
        .cost_analysis()["flops"]
    )


SHAPE = (32, 32, 3)
# those of transformers cost a pass through another network
COSTS = {name: (make, None) for name, make in INTERPRETERS.items() if "rollout" not in name} | {
    "smooth relu grad": (smooth_relu_grad_interpreter, 3.0),
    "mask, two ahead": (lambda: mask_interpreter(free=1, ahead=2), 6.0),
    "guided_backprop": (guided_backprop_interpreter, 3.0),
    # two gradients of each of two images, and the logits
    "integrated_gradients": (integrated_gradients_interpreter, 5.0),
    "one image": (lambda: smooth_grad_interpreter(draws=1, samples=8), 3.0),
    # in two groups, each gradient taken once more when it is differentiated
    "eight images": (lambda: integrated_gradients_interpreter(draws=8), 25.0),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_joint_step_costs_what_xla_counts(randomised, masker, name):
    """Width 16, so that what is no convolution is a few percent."""
    model = models.ClassifierWithMasker(
        randomised(lambda: models.CifarResNet(1, width=16, rngs=nnx.Rngs(0))), masker
    )
    factory, known = COSTS[name]
    preset = replace(resolve("default", factory(), warm_steps=0), score_every=10)
    costs = [
        gradient_evaluations(
            model, resolve(preset, preset.interpreter, steps=n), threats.linf(), SHAPE
        )
        for n in (20, 40)  # whole periods of comparisons
    ]
    scored = 0 if preset.interpreter.faithful else 20 / preset.score_every * scoring(model, preset)
    counted = (costs[1] - costs[0] - scored) / 20
    pgd = resolve("default", None)
    expected = flops_of_a_step(model, preset, SHAPE) / flops_of_a_step(model, pgd, SHAPE)
    assert counted == pytest.approx(expected, rel=0.05)
    assert known is None or counted == pytest.approx(known, rel=0.05)
    assert gradient_evaluations(model, pgd, threats.linf(), SHAPE) == pgd.steps


def scoring(model, preset):
    """A fresh look at logits and map: the gradients of the map, those of a solver, and half of one."""
    explain, solver = preset.interpreter.explain, preset.interpreter.solver
    averaged = [value for name, value in explain.options if name in ("points", "samples")]
    # occlusion goes forward only, seven positions a step
    work = 3.5 if preset.interpreter.name == "occlusion" else 1
    return 0.5 + (sum(averaged) or 1 if solver is None else work * solver.steps)
