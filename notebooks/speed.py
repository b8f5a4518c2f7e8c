"""Speed on this machine, as ratios within one run: python notebooks/speed.py [--out DIR]

For each network, precision, interpreter and number of devices: one step of the attack, driven by the
host; an attack of n steps as a multiple of n such steps, by the host and as one program
(`lax.fori_loop`); the counted work over the rate of the chip, which is measured too; and, where
torch is installed, the same step in eager PyTorch, on one device. Weights are random. Medians over
repeats; everything is compiled before it is timed.
With --out, `speed.json` and `speed.png` are written.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

import adv2_jax as adv2
from adv2_jax import curvature, precision
from adv2_jax.activations import relu_curved
from adv2_jax.attacks import gradient_evaluations, map_shape
from adv2_jax.cost import multiply_adds
from adv2_jax.crafting import craft, joint_options
from adv2_jax.descent import Numbers, Options, Problem, batched_step, init
from adv2_jax.devices import number_of_devices, replicate, spread
from adv2_jax.models import ClassifierWithMasker, Encoder, Masker, user
from adv2_jax.presets import resolve

NETWORKS = ("cifar_resnet20", "resnet50", "densenet169")
INTERPRETERS = ("pgd", "cam", "grad_cam", "grad", "mask", "rts")


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median wall-clock time of a call, which is made once before."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rates(repeats: int) -> dict[str, float]:
    """Return multiply-adds a second of a matrix product and of a convolution, the larger of two."""
    big = jax.default_backend() != "cpu"
    n, b, c = (8192, 64, 256) if big else (1024, 4, 64)
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((n, n)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((b, 56, 56, c)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((3, 3, c, c)), jnp.float32)
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    best = {}
    for name in precision.PRECISIONS:
        with precision.at(name):
            pairs = [precision.computing(pair, name) for pair in ((a, a), (x, k))]
            programs = jax.jit(jnp.matmul), jax.jit(conv)
            best[name] = max(
                multiply_adds(program, *pair) / median_seconds(partial(program, *pair), repeats)
                for program, pair in zip(programs, pairs, strict=True)
            )
    return best


def networks(names: list[str], weights: str | None) -> dict[str, tuple[Any, int]]:
    """Return networks by name with the side of their images; random weights, or those of a file.

    Each has a masker whose encoder is itself, or a ResNet-50 where it is no ResNet.
    """
    made: dict[str, tuple[Any, int]] = {}
    for name in names:
        if user.is_reference(name):
            made[name.rpartition(":")[2]] = user.load(name, weights), 224
            continue
        model = adv2.models.build(name)
        encoder = model if isinstance(model, Encoder) else adv2.models.build("resnet50")
        masker = Masker(encoder, rngs=nnx.Rngs(0))
        made[name] = ClassifierWithMasker(model, masker), model.image_size
    return made


def measured(
    model: Any, side: int, name: str, asked: str, devices: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the seconds of a step and of attacks under the default preset, a batch on each device.

    `step` is one joint step of many that are dispatched one after the other, without a wait; `host`
    and `fori` are an attack of n steps by these drivers, divided by n, and `seconds` the faster.
    `gradients` is the work of that attack on an image, in gradients of ℓ_prd, divided by n; `rate`
    the multiply-adds a second in it, of a device.
    """
    rng, b, n = np.random.default_rng(0), arguments.batch_size * devices, arguments.steps
    threat, shape = adv2.threats.linf(), (side, side, 3)
    preset = resolve("default", None if name == "pgd" else name, threat=threat, steps=n)
    interpreter, options = preset.interpreter, Options(threat)
    size = (1, 1) if interpreter is None else map_shape(model, shape, interpreter)
    batch = Problem(
        rng.random((b, *shape), np.float32),
        rng.integers(0, 10, b).astype(np.int32),
        rng.random((b, *size), np.float32),
    )
    problems = spread(batch, devices)
    used = replicate(precision.computing(model, asked), devices)
    unit = multiply_adds(jax.grad(lambda x: used.head(used.features(x)).sum()), batch.image[0])
    row: dict[str, Any] = {"interpreter": name, "precision": asked, "devices": devices}
    with precision.at(asked):
        row["gradients"] = gradient_evaluations(model, preset, threat, shape) / n
        if interpreter is None or interpreter.solver is None:
            options = options if interpreter is None else joint_options(preset, threat)
            start = jax.jit(jax.vmap(partial(init, options=options)))(problems.image)
            leaves, step = batched_step(used, options)
            numbers = jax.device_put(Numbers(*np.float32((1 / 255, 1.0, 1e-3))))

            def steps() -> Any:
                states = start
                for _ in range(n):
                    states, info = step(leaves, problems, states, numbers)
                return states.params, info

            row["step"] = median_seconds(steps, arguments.repeats) / n
        attack = partial(craft, used, problems, preset, threat)
        for driver in arguments.drivers:
            row[driver] = median_seconds(partial(attack, driver=driver), arguments.repeats) / n
    row["seconds"] = min(row[driver] for driver in arguments.drivers)
    rate = arguments.batch_size * row["gradients"] * unit / row["seconds"]
    return row | {"images": b, "rate": rate}


def line(row: dict[str, Any], best: dict[str, float]) -> str:
    """Return a row in words."""
    words = [
        f"{row['network']:15} {row['interpreter']:9} {row['precision']:9} {row['devices']:3} dev.",
        f"{1e3 * row['seconds'] / row['images']:8.3f} ms",
        f"{row['rate'] / best[row['precision']]:5.1%} of the chip's rate",
    ]
    if "step" in row:
        words.append(f"attack/steps {row['seconds'] / row['step']:5.2f}")
    if "host" in row and "fori" in row:
        words.append(f"fori/host {row['fori'] / row['host']:5.2f}")
    if "eager" in row:
        words.append(f"eager PyTorch {row['eager'] / row['seconds']:5.2f} x as long")
    return "  ".join(words)


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


def picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the gradients a second of each row, and of eager PyTorch."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["network"] for row in rows))
    size = {"figsize": (4.5 * len(names), 4), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(names), squeeze=False, **size)
    for axis, name in zip(axes[0], names, strict=True):
        of_network = [row for row in rows if row["network"] == name]
        kinds = list(dict.fromkeys(row["interpreter"] for row in of_network))
        series = {
            f"adv2_jax, {p}, {n} device{'s' * (n > 1)}": ("seconds", p, n)
            for p, n in dict.fromkeys((r["precision"], r["devices"]) for r in of_network)
        }
        series |= {
            f"eager PyTorch, {p}": ("eager", p, 1)
            for p in dict.fromkeys(r["precision"] for r in of_network if "eager" in r)
        }
        for i, (label, (key, *kind)) in enumerate(series.items()):
            shown = [r for r in of_network if [r["precision"], r["devices"]] == kind and key in r]
            axis.bar(
                [kinds.index(r["interpreter"]) + (i + 0.5) / len(series) * 0.8 for r in shown],
                [r["images"] * r["gradients"] / r[key] for r in shown],
                0.8 / len(series),
                label=label,
            )
        axis.set(title=name, yscale="log", ylabel="gradients a second (images x steps)")
        axis.set_xticks([k + 0.4 for k in range(len(kinds))], kinds)
    # of one network: all have the same series, and below, where it hides no bar
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names)
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the arguments, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="or path/to/file.py:name")
    parser.add_argument("--weights", help="file for path/to/file.py:name")
    parser.add_argument("--interpreters", nargs="+", default=INTERPRETERS)
    parser.add_argument("--precisions", nargs="+", default=["highest"])
    everything = number_of_devices()
    counts = [2**k for k in range(everything.bit_length()) if 2**k < everything] + [everything]
    parser.add_argument("--devices", nargs="+", type=int, default=counts, metavar="N")
    # XLA compiles convolutions in loops to slow code for CPUs: minutes for nothing
    drivers = ["host"] if jax.default_backend() == "cpu" else ["host", "fori"]
    parser.add_argument("--drivers", nargs="+", default=drivers, choices=["host", "fori"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-eager", action="store_true", help="leave PyTorch out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    b, repeats = arguments.batch_size, arguments.repeats
    chip, best = jax.devices()[0].device_kind, rates(repeats)
    print(
        f"{chip}, jax {jax.__version__}, batch {b} a device, {arguments.steps} steps; ms an image and step"
    )
    for name, rate in best.items():
        print(f"{name:9} {rate / 1e12:8.3f} Tera multiply-adds a second at best")
    eager = None
    if not arguments.no_eager and importlib.util.find_spec("torch"):
        import eager
    rows = []
    for network, (model, side) in networks(arguments.networks, arguments.weights).items():
        twin = None if eager is None else eager.twin(getattr(model, "classifier", model))
        for asked in arguments.precisions:
            for name, devices in product(arguments.interpreters, arguments.devices):
                row = {"network": network}
                row |= measured(model, side, name, asked, devices, arguments)
                if twin is not None and name in eager.LOSSES and devices == 1:
                    shape, n = (b, side, side, 3), arguments.steps
                    attack = eager.attack_of(twin, name, shape, asked, n)
                    row["eager"] = median_seconds(attack, repeats) / n
                rows.append(row)
                print(line(row, best), flush=True)
    costs = products(adv2.models.build("cifar_resnet20"), 30)
    for name, cost in costs.items():
        print(f"{name:12} one product {cost:5.2f} x forward")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = {"chip": chip, "jax": jax.__version__, "batch_size": b, "steps": arguments.steps}
        found |= {"rates": best, "rows": rows, "products": costs}
        (arguments.out / "speed.json").write_text(json.dumps(found, indent=1))
        picture(rows, f"{chip}, batch {b}", arguments.out / "speed.png")


if __name__ == "__main__":
    main()
