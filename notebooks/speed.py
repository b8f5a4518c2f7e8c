"""Speed on this machine, as ratios within one run: python notebooks/speed.py [--batch-size 16] [--steps 30]

Prints, for a CIFAR ResNet-20 with random weights: one forward pass; one step of PGD, CAM, Grad-CAM and
GRAD as a multiple of it; an attack of n steps as a multiple of n such steps; and products of Hessians
(`adv2_jax.curvature`), of one image, in forward passes of one image. Medians over repeats; everything
is compiled before it is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import adv2_jax as adv2
from adv2_jax import curvature
from adv2_jax.activations import relu_curved
from adv2_jax.crafting import joint_options
from adv2_jax.descent import Numbers, Options, Problem, batched_step, descend, init


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median wall-clock time of a call, which is made once before."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ratios(
    model: adv2.Classifier, name: str, batch_size: int, steps: int, repeats: int
) -> tuple[float, float]:
    """Return the seconds of one step under the default preset, and of an attack of `steps` steps."""
    rng = np.random.default_rng(0)
    side = {"pgd": 1, "grad": 32}.get(name, 8)
    preset, threat = adv2.presets.PRESETS["default"][name], adv2.threats.linf()
    options = Options(threat) if preset.interpreter is None else joint_options(preset, threat)
    problems = Problem(
        jnp.asarray(rng.random((batch_size, 32, 32, 3), np.float32)),
        jnp.asarray(rng.integers(0, 10, batch_size)),
        jnp.asarray(rng.random((batch_size, side, side), np.float32)),
    )
    states = jax.jit(jax.vmap(lambda problem: init(problem, options)))(problems)
    numbers = Numbers(*np.float32((1 / 255, 1.0, 1e-3)))
    schedule = Numbers(*(np.full(steps, value) for value in numbers))
    leaves, step = batched_step(model, options)
    one = median_seconds(lambda: step(leaves, problems, states, numbers), repeats)
    whole = median_seconds(
        lambda: descend(model, problems, states, schedule, options), max(3, repeats // 6)
    )
    return one, whole


def products(model: adv2.Classifier, repeats: int) -> dict[str, float]:
    """Return the cost of a product of each operator, in forward passes of one image."""
    image = jnp.asarray(np.random.default_rng(0).random((32, 32, 3), np.float32))
    label = jnp.int32(3)
    act = Partial(relu_curved, tau=0.01)
    forward = jax.jit(lambda m, x: m.head(m.features(x)))
    unit = median_seconds(lambda: forward(model, image), repeats)
    operators = {
        "hessian": curvature.hessian(model, image, label, act=act),
        "softmax_term": curvature.softmax_term(model, image, label),
        "secant": curvature.secant(model, image, label, step=1 / 255),
    }
    return {
        name: median_seconds(lambda one=one: one(image), repeats) / unit
        for name, one in operators.items()
    }


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    b, n = options.batch_size, options.steps
    model = adv2.models.build("cifar_resnet20")
    images = jnp.zeros((b, 32, 32, 3)) + 0.5
    forward = jax.jit(jax.vmap(lambda m, x: m.head(m.features(x)), (None, 0)))
    unit = median_seconds(lambda: forward(model, images), options.repeats)
    print(
        f"{jax.devices()[0].device_kind}, batch {b}: one forward pass {1e3 * unit / b:.3f} ms an image"
    )
    for name in ("pgd", "cam", "grad_cam", "grad"):
        one, whole = ratios(model, name, b, n, options.repeats)
        print(
            f"{name:9} one step {one / unit:5.2f} x forward   attack of {n} steps {whole / (n * one):5.3f} x {n} steps"
        )
    for name, cost in products(model, options.repeats).items():
        print(f"{name:12} one product {cost:5.2f} x forward")


if __name__ == "__main__":
    main()
