"""CIFAR ResNet-20 with its published weights against a float64 oracle written in another framework (goldens.md).

A quantity is good if its relative error on the worst image stays within ten times that of the oracle's own float32 run. Where
that run is itself void, since p_c is within 1e-7 of 1 on some image, the error is held against the largest image instead.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import descent, interpreters, losses, maps, models, threats
from adv2_jax.activations import relu, relu_h, relu_sigmoid
from adv2_jax.interpreters.activation_maps import raw_cam, raw_grad_cam

POINTS = ("x0", "xa")
RULES = {"r": relu, "sigma": relu_sigmoid(), "h": relu_h}
VOID = 1e-2  # an error of the oracle's own float32 run beyond this says that float32 holds no digit
# p_t is within 1e-7 of 1 on all four images: nothing is left to compare
SATURATED = {"xa/t/grad_prob", "xa/ce_grad", *(f"xa/hvp_{rule}/prob_t" for rule in RULES)}
DRAWN_IN_FLOAT32 = (
    4e-7  # a column of zeros or of one lucky rounding: no float32 result is held to less than this
)


@pytest.fixture(scope="module")
def goldens(data_dir):
    with np.load(data_dir / "goldens_resnet20.npz") as archive:
        return {key: _channels_last(archive[key]) for key in archive.files}


@pytest.fixture(scope="module")
def published(data_dir):
    """key -> relative error of the oracle's float32 run, from the table of goldens.md."""
    rows = (
        line.split("|")
        for line in (data_dir / "goldens.md").read_text().splitlines()
        if line.startswith("| ")
    )
    cells = {row[1].strip(): row[4].split() for row in rows if len(row) == 7}
    return {key: float(cell[0]) for key, cell in cells.items() if key != "key"}


@pytest.fixture(scope="module")
def resnet20(data_dir):
    return models.load("cifar_resnet20", data_dir / "cifar10_resnet20.npz")


@pytest.fixture(scope="module")
def inputs(goldens):
    """Images, labels, targets, benign CAM, target map and direction at both points, [8, ...] float32."""
    images = np.concatenate([goldens[f"in/{point}"] for point in POINTS])
    others = [goldens[key] for key in ("in/y", "in/t", "x0/y/cam", "target_map", "in/v")]
    y, t, *arrays = (np.concatenate([array, array]) for array in others)
    return (
        images,
        y.astype(np.int32),
        t.astype(np.int32),
        *(array.astype(np.float32) for array in arrays),
    )


def _channels_last(array):
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def _evaluated(one, model, inputs):
    """The dictionary of one image's quantities, for all images at both points, under the names of goldens.md."""
    found = jax.jit(jax.vmap(one, (None, *[0] * len(inputs))))(model, *inputs)
    return {
        f"{point}/{name}": np.asarray(values[4 * i : 4 * i + 4], float)
        for name, values in found.items()
        for i, point in enumerate(POINTS)
    }


@pytest.fixture(scope="module")
def first_order(resnet20, inputs):
    def one(model, image, y, t, benign_cam, target_map, v):
        features = model.features(image)
        gradients = {
            "grad_prob": {"score": losses.probability},
            "grad_logodds": {},
            "grad_logit": {"score": losses.logit},
            "grad_logodds_h": {"act": relu_h},
            "grad_logodds_sigma": {"act": relu_sigmoid()},
        }

        def of_class(label):
            return {
                "cam_raw": raw_cam(model, features, label),
                "cam": interpreters.cam(model, image, label),
                "gradcam_raw": raw_grad_cam(model, features, label),
                "gradcam": interpreters.grad_cam(model, image, label),
                "grad_map": interpreters.grad(model, image, label),
                **{
                    name: interpreters.input_gradient(model, image, label, **options)[0]
                    for name, options in gradients.items()
                },
            }

        found = {"features": features, "logits": model.head(features)}
        for name, (of_y, of_t) in jax.vmap(of_class)(jnp.stack([y, t])).items():
            found |= {f"y/{name}": of_y, f"t/{name}": of_t}
        for name, smoothing in (("ce_grad", 0.0), ("ce_grad_smooth05", 0.05)):
            options = descent.Options(threats.linf(), smoothing=smoothing)
            found[name] = _joint_gradient(model, image, t, target_map, 0.0, options)
        surrogate = interpreters.cam_interpreter().surrogate
        options = descent.Options(threats.linf(), surrogate, map_loss=losses.map_mse)
        found["cam_joint_grad_c5"] = _joint_gradient(model, image, t, benign_cam, 5.0, options)
        return found

    return _evaluated(one, resnet20, inputs)


def _joint_gradient(model, image, target, target_map, balance, options):
    """What the attack's step descends, at zero perturbation."""
    problem, numbers = (
        descent.Problem(image, target, target_map),
        descent.Numbers(0.0, balance, 1e-4),
    )
    return jax.grad(lambda delta: descent.joint_loss(delta, model, problem, numbers, options)[0])(
        jnp.zeros_like(image)
    )


@pytest.fixture(scope="module", params=RULES)
def rule(request):
    return request.param


@pytest.fixture(scope="module")
def second_order(rule, resnet20, inputs):
    act = RULES[rule]

    def one(model, image, y, t, benign_cam, target_map, v):
        def gradient(x, k):
            """Of one of the four scores; k is mapped over, so that they share their compilation."""
            scores = (
                (losses.probability, t),
                (losses.probability, y),
                (losses.log_odds, t),
                (losses.logit, t),
            )

            def chosen(logits, _):
                return jnp.stack([score(logits, label) for score, label in scores])[k]

            return interpreters.input_gradient(model, x, t, act=act, score=chosen)[0]

        def forward_over_reverse(k):
            return jax.jvp(lambda x: gradient(x, k), (image,), (v,))[1]

        def reverse_over_reverse(k):
            return jax.grad(lambda x: jnp.vdot(gradient(x, k), v))(image)

        def map_loss(x):
            return losses.map_l2(interpreters.grad(model, x, t, act=act), target_map)

        found = {}
        for mode in (forward_over_reverse, reverse_over_reverse):
            products = jax.vmap(mode)(jnp.arange(4))
            for name, product in zip(
                ("prob_t", "prob_y", "logodds_t", "logit_t"), products, strict=True
            ):
                found[f"hvp_{rule}/{name} {mode.__name__}"] = product
        found[f"grad_{rule}/int_loss"], found[f"grad_{rule}/int_grad"] = jax.value_and_grad(
            map_loss
        )(image)
        options = descent.Options(
            threats.linf(), interpreters.smooth_relu_grad_interpreter(act=act).surrogate
        )
        found[f"grad_{rule}/joint_grad"] = _joint_gradient(
            model, image, t, target_map, 0.05, options
        )
        return found

    return _evaluated(one, resnet20, inputs)


@pytest.fixture(scope="module")
def flows(goldens):
    """What a flow makes of the benign images, its penalty, and the gradients of both."""

    def one(image, flow, v):
        penalty, penalty_gradient = jax.value_and_grad(threats.flow_penalty)(flow)
        warped, pull = jax.vjp(lambda flow: threats.warp(image, flow), flow)
        return {
            "warp": warped,
            "flow_loss": penalty,
            "flow_loss_grad": penalty_gradient,
            "warp_vjp": pull(v)[0],
        }

    arrays = (jnp.asarray(goldens[f"in/{name}"], jnp.float32) for name in ("x0", "flow", "v"))
    return {
        f"stadv/{name}": np.asarray(values, float)
        for name, values in jax.vmap(one)(*arrays).items()
    }


def norm(values):
    """Of each image: [4, ...] -> [4]."""
    return np.sqrt((values**2).reshape(4, -1).sum(1))


def beyond_float32(found, goldens, published):
    """key -> (error, what is allowed) of everything that is off."""
    off = {}
    for name, values in found.items():
        key = name.split()[0]
        assert values.shape == goldens[key].shape
        if key in SATURATED:
            continue
        error, scale = norm(values - goldens[key]), norm(goldens[key])
        if published[key] > VOID:
            error, allowed = error / scale.max(), 1e-3
        else:
            error, allowed = (
                error / np.where(scale > 0, scale, 1),
                10 * max(published[key], DRAWN_IN_FLOAT32),
            )
        if not error.max() <= allowed:
            off[name] = (error.max(), allowed)
    return off


def test_first_order(first_order, goldens, published):
    assert beyond_float32(first_order, goldens, published) == {}


def test_second_order(second_order, goldens, published):
    assert beyond_float32(second_order, goldens, published) == {}


def test_flows(flows, goldens, published):
    assert beyond_float32(flows, goldens, published) == {}


def test_logits_of_a_piecewise_linear_network_have_no_curvature(second_order, rule):
    curvature = max(
        np.abs(values).max() for name, values in second_order.items() if "logit_t" in name
    )
    assert (curvature == 0) == (rule == "r")


def test_every_quantity_is_compared(first_order, flows, goldens):
    ours = {*first_order, *flows}
    for point in POINTS:
        for name in RULES:
            ours |= {
                f"{point}/hvp_{name}/{score}"
                for score in ("prob_t", "prob_y", "logodds_t", "logit_t")
            }
            ours |= {
                f"{point}/grad_{name}/{part}" for part in ("int_loss", "int_grad", "joint_grad")
            }
    theirs = {key for key in goldens if not key.startswith("in/")}
    assert theirs - ours == {"target_map"} and ours <= theirs


def test_target_map_is_the_benign_map_made_larger(goldens, published):
    found = [maps.resize(jnp.asarray(m, jnp.float32), (32, 32)) for m in goldens["x0/y/cam"]]
    error = norm(np.asarray(found) - goldens["target_map"]) / norm(goldens["target_map"])
    assert error.max() <= 10 * published["target_map"]


def test_probability_maps_are_noise_where_the_network_is_sure_and_log_odds_maps_are_not(
    resnet20, inputs, goldens
):
    """Why GRAD differentiates the log-odds: the same map, but for the digits that float32 cannot hold."""
    images, _, targets, *_ = inputs

    @jax.jit
    @jax.vmap
    def both(image, label):
        logits = resnet20.head(resnet20.features(image))
        literal = interpreters.grad(resnet20, image, label, score=losses.probability)
        return losses.probability(logits, label), literal, interpreters.grad(resnet20, image, label)

    f_t, literal, m = both(images[4:], targets[4:])
    sure = np.asarray(f_t) == 1
    assert sure.any()
    error = np.abs(np.asarray([literal, m], float) - goldens["xa/t/grad_map"]).mean((2, 3))[:, sure]
    assert (error[0] > 0.01).all()
    assert (error[1] < 1e-5).all()
