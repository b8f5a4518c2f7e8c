"""The attack from end to end on a tiny network: what it promises about images, batches, scores, costs and errors."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from adv2_jax import attack, explain, interpreters, metrics, presets, threats
from adv2_jax.attacks import count_steps, gradient_evaluations
from adv2_jax.crafting import snapshot_steps
from adv2_jax.interpreters import (
    INTERPRETERS,
    PAPER,
    Interpreter,
    cam_interpreter,
    smooth_relu_grad_interpreter,
)
from adv2_jax.models import ClassifierWithMasker
from adv2_jax.presets import PRESETS, Preset, constant, resolve

PIXEL = 1 / 255
CAM = Preset(
    cam_interpreter(), warm_steps=3, steps=6, step_size=constant(PIXEL), balance=constant(1.0)
)
PGD = replace(CAM, interpreter=None)
# scored apart from its steps, every second one, as a surrogate must be whose map is not the explained one
APART = replace(CAM, interpreter=cam_interpreter()._replace(faithful=False), score_every=2)
PLANS = pytest.mark.parametrize("plan", [CAM, APART, PGD], ids=["cam", "apart", "pgd"])
WIDE = threats.linf(0.1)
NAMES = ", ".join(INTERPRETERS)


@pytest.fixture(scope="module")
def model(make_small, masker):
    return ClassifierWithMasker(make_small(), masker)


@pytest.fixture(scope="module")
def ranking(model, images):
    """Classes from the most to the least likely: the first is the label, the second the target."""
    logits = jax.jit(jax.vmap(lambda x: model.head(model.features(x))))(images / np.float32(255))
    return np.asarray(logits).argsort(-1)[:, ::-1]


@pytest.fixture(scope="module")
def labels(ranking):
    return ranking[:, 0]


@pytest.fixture(scope="module")
def targets(ranking):
    return ranking[:, 1]


@pytest.fixture(scope="module")
def benign(model, images, labels):
    """interpreter name -> benign maps, drawn when they are first asked for."""

    class Maps(dict):
        def __missing__(self, name):
            explainer = INTERPRETERS[name]().explain
            self[name] = explain(model, images, labels, interpreter=explainer)[1]
            return self[name]

    return Maps()


@pytest.fixture(scope="module")
def run(model, images, targets, benign):
    """attack() on the six images with their benign CAMs as target maps; any argument can be another."""

    def call(plan=CAM, **changes):
        name = plan.interpreter.name if plan.interpreter else "cam"
        arguments = {
            "model": model,
            "images": images,
            "targets": targets,
            "target_maps": benign[name],
            **changes,
        }
        return attack(preset=plan, interpreter=plan.interpreter, **arguments)

    return call


@pytest.fixture(scope="module")
def result(run):
    return run()


# Images, logits and maps.


@pytest.mark.slow
def test_shapes_and_types(result):
    assert result.images.shape == result.float_images.shape == (6, 16, 16, 3)
    assert result.images.dtype == np.uint8 and result.float_images.dtype == np.float32
    assert result.logits.shape == result.float_logits.shape == (6, 10)
    assert result.maps.shape == result.float_maps.shape == (6, 4, 4)


def test_images_are_the_8_bit_rounding(result):
    np.testing.assert_array_equal(result.images, np.round(result.float_images * np.float32(255)))


def test_logits_and_maps_are_those_of_the_images_delivered(model, result, targets):
    @jax.jit
    @jax.vmap
    def look(image, label):
        return model.head(model.features(image)), interpreters.cam(model, image, label)

    for images, logits, maps in (
        (result.images / np.float32(255), result.logits, result.maps),
        (result.float_images, result.float_logits, result.float_maps),
    ):
        expected_logits, expected_maps = look(images, targets)
        np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)  # float32
        np.testing.assert_allclose(maps, expected_maps, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.031, 8 / 255, 0.1])
@pytest.mark.parametrize("plan", [CAM, replace(CAM, rounded=True)], ids=["float", "8-bit"])
def test_radius_is_used_and_holds(run, images, epsilon, plan):
    result = run(plan, threat=threats.linf(epsilon), steps=20, warm_steps=20)
    assert metrics.linf(result.images, images).max() == int(epsilon * 255 + 1e-9) / 255 <= epsilon
    assert np.abs(result.float_images - images / np.float32(255)).max() <= epsilon + 1e-7
    assert result.float_images.min() >= 0 and result.float_images.max() <= 1


@pytest.mark.parametrize("threat", [threats.linf(7.3 / 255), threats.l2(0.3)], ids=["linf", "l2"])
def test_radius_holds_around_images_off_the_8_bit_grid(run, images, threat):
    off = np.clip(
        images / 255 + np.random.default_rng(0).uniform(-0.4, 0.4, images.shape) / 255, 0, 1
    ).astype(np.float32)
    result = run(images=off, threat=threat, steps=10)
    norm, epsilon = (metrics.linf, 7.3 / 255) if threat.name == "linf" else (metrics.l2, 0.3)
    assert (norm(result.images, off) <= epsilon).all() and (
        norm(result.images, off) > 0.8 * epsilon
    ).all()


def test_an_image_that_no_8_bit_image_is_near_enough_to_is_refused(run, images):
    with pytest.raises(
        ValueError, match=r"from the nearest 8-bit image, more than epsilon = 0\.02"
    ):
        run(images=np.clip(images + 0.5, 0, 255) / 255, threat=threats.l2(0.02))


def test_float_images_are_the_same_images(run, images, result):
    again = run(images=images / np.float32(255))
    np.testing.assert_array_equal(again.images, result.images)


def test_default_threat_is_the_ball_of_the_paper(run, result):
    np.testing.assert_array_equal(run(threat=threats.linf(8 / 255)).images, result.images)


def test_attack_without_interpreter_needs_no_maps_and_gives_none(run, targets):
    result = run(PGD, target_maps=None, steps=20)
    assert result.maps.shape == (6, 0, 0)
    assert metrics.success(result.logits, targets).mean() > 0.5


# No image sees another, and the driver changes nothing.


@pytest.mark.parametrize("plan", [CAM, APART], ids=["cam", "apart"])
def test_image_is_attacked_the_same_alone_in_a_batch_and_in_another_order(
    run, images, targets, benign, plan
):
    together = run(plan).images
    for batch_size in (1, 4):
        np.testing.assert_array_equal(run(plan, batch_size=batch_size).images, together)
    order = np.array([4, 0, 5, 3, 1, 2])
    change = {
        "images": images[order],
        "targets": targets[order],
        "target_maps": benign["cam"][order],
    }
    np.testing.assert_array_equal(run(plan, **change).images, together[order])


@PLANS
def test_both_drivers_deliver_the_same(run, plan):
    host, fori = run(plan, driver="host"), run(plan, driver="fori")
    differs = np.abs(host.images.astype(int) - fori.images)
    # a sign may flip where float32 rounds around zero
    assert differs.max() <= 2 and (differs > 0).mean() < 0.01


@pytest.mark.parametrize("driver", ["fori", "host"])
@pytest.mark.parametrize(("warm_steps", "steps", "change"), [(0, 6, 6), (3, 0, 3), (0, 0, 0)])
def test_stages_may_be_left_out(run, images, warm_steps, steps, change, driver):
    result = run(driver=driver, warm_steps=warm_steps, steps=steps)
    assert np.abs(result.images.astype(int) - images).max() == change


# Compilation.


def test_second_attack_of_the_same_kind_compiles_nothing(run, make_small, masker, images, caplog):
    def compiled(**changes):
        caplog.clear()
        with jax.log_compiles():
            run(**{"batch_size": 5, **changes})
        return [
            record.getMessage()
            for record in caplog.records
            if record.getMessage().startswith("Compiling")
        ]

    assert compiled(threat=threats.linf(8 / 255))
    other = ClassifierWithMasker(make_small(1), masker)
    assert compiled(threat=threats.linf(8 / 255), model=other, images=images[::-1].copy()) == []
    other_numbers = replace(CAM, balance=constant(3.0), step_size=constant(PIXEL / 2))
    assert compiled(threat=threats.linf(8 / 255), plan=other_numbers) == []


# Keep-best.


def delivered_score(result, targets, target_maps):
    f_t, l1 = metrics.confidence(result.logits, targets), metrics.map_l1(result.maps, target_maps)
    return np.where(f_t >= 0.8, l1, 2 - f_t)


@pytest.mark.parametrize(
    ("plan", "unscored"),
    [(replace(CAM, score_every=1, rounded=True), 1), (APART, 0)],
    ids=["faithful", "apart"],
)
@pytest.mark.parametrize("steps", [2, 20])
def test_best_iterate_is_never_worse_than_the_last_that_was_scored(
    run, targets, benign, plan, unscored, steps
):
    """A faithful step scores the iterate it starts from: where the last step leads is never seen, and never delivered."""
    options = {"threat": WIDE, "warm_steps": 20}
    fixed = replace(plan, balance=presets.constant(1.0), step_size=presets.constant(1 / 255))
    last = delivered_score(
        run(replace(fixed, score_every=0), steps=steps - unscored, **options),
        targets,
        benign["cam"],
    )
    best = delivered_score(run(fixed, steps=steps, **options), targets, benign["cam"])
    assert (last < 1).any()
    assert (best <= last + 1e-5).all()  # float32 maps
    assert steps == 2 or (best < last - 1e-4).any()


# Costs.


@pytest.fixture(scope="module")
def calls():
    """The width of every surrogate that the interpreter below computed, and an entry for every explanation."""
    return {"surrogate": [], "explain": []}


@pytest.fixture(scope="module")
def counted(calls):
    """CAM that writes down how often a batch goes through it."""

    def explain(model, image, label):
        jax.debug.callback(lambda: calls["explain"].append(None))
        return interpreters.cam(model, image, label)

    def surrogate(model, image, label, context):
        jax.debug.callback(lambda width: calls["surrogate"].append(float(width)), context.tau)
        return cam_interpreter().surrogate(model, image, label, context)

    return Interpreter("cam", explain, surrogate)


@pytest.mark.parametrize("score_every", [0, 1, 3])
@pytest.mark.parametrize("faithful", [True, False])
def test_gradient_evaluations_are_those_spent(run, model, calls, counted, faithful, score_every):
    """A step on CAM is a gradient of the network, and the weights of the head; a fresh look runs forward twice."""
    widths = presets.ramp(1.0, 8.0)
    plan = replace(
        CAM,
        interpreter=counted._replace(faithful=faithful),
        score_every=score_every,
        steps=7,
        tau=widths,
    )
    gradient_evaluations(model, plan, threats.linf(), (16, 16, 3))  # is traced here, and kept
    for values in calls.values():
        values.clear()
    result = run(plan)
    jax.effects_barrier()
    # the other two look at the result, before and after rounding
    scorings = len(calls["explain"]) - 2
    assert scorings == (0 if faithful or not score_every else -(-7 // score_every))
    spent = plan.warm_steps + len(calls["surrogate"]) + scorings
    assert result.gradient_evaluations == pytest.approx(spent, rel=0.05)
    # each step by its place in the schedule
    np.testing.assert_allclose(sorted(calls["surrogate"]), range(1, 8), rtol=1e-6)


@PLANS
def test_progress_adds_up_to_the_steps_announced(run, plan):
    seen = []
    run(plan, batch_size=4, on_step=seen.append)
    assert sum(seen) == count_steps(plan, 6, 4) == 2 * (3 + 6)


# What the joint loss buys.


def test_joint_stage_without_weight_is_pgd(run):
    unweighted = replace(CAM, balance=constant(0.0))
    np.testing.assert_array_equal(run(unweighted).images, run(PGD).images)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("mask", "rts", "occlusion") else ())
        for name in INTERPRETERS
        if "rollout" not in name  # of transformers: test_vit.py
    ],
)
def test_adv2_shows_the_target_map_where_pgd_does_not(model, images, targets, benign, name):
    # the derivative in z of guided back-propagation is invented throughout: it takes longer
    options = {"steps": 150 if name == "guided_backprop" else 60, "threat": WIDE}
    plain = attack(model, images, targets, interpreter=None, **options)
    joint = attack(model, images, targets, benign[name], interpreter=name, **options)
    _, plain_maps = explain(model, plain.images, targets, interpreter=INTERPRETERS[name]().explain)
    distances = [metrics.map_l1(maps, benign[name]).mean() for maps in (plain_maps, joint.maps)]
    assert distances[1] < 0.8 * distances[0]


# Presets.


def test_every_preset_has_every_interpreter():
    for preset, table in PRESETS.items():
        assert table.keys() == {"pgd", *(PAPER if preset == "paper" else INTERPRETERS)}
        assert all(plan.interpreter.name == name for name, plan in table.items() if name != "pgd")
        assert table["pgd"].interpreter is None


@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_schedules_of_every_preset_are_finite_and_positive(n):
    for plan in (plan for table in PRESETS.values() for plan in table.values()):
        numbers = np.array(
            [
                [schedule(n)(i) for i in range(n)]
                for schedule in (plan.step_size, plan.balance, plan.tau)
            ]
        )
        assert np.isfinite(numbers).all() and (numbers >= 0).all()
        assert (numbers[[0, 2]] > 0).all()


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (presets.constant(3.0), [3, 3, 3, 3]),
        (presets.ramp(2.0, 6.0), [2, 3, 4, 5]),
        (presets.decay(2.0, 1.0), [2, 1.5 + 0.25 * 2**0.5, 1.5, 1.5 - 0.25 * 2**0.5]),
        (presets.geometric(16.0, 1.0), [16, 8, 4, 2]),
    ],
)
def test_schedules_stretch_between_their_ends(schedule, values):
    np.testing.assert_allclose([schedule(4)(i) for i in range(4)], values, rtol=1e-6)


def test_weights_of_the_released_grad_code():
    weights = [float(presets.paper_grad_balance(704)(i)) for i in range(704)]
    expected = [0.001] * 301 + [0.004] * 201 + [0.01] * 101 + [0.05] * 101
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_steps_take_the_place_of_the_presets():
    plan = presets.resolve("default", "cam", warm_steps=2, steps=5)
    assert (plan.warm_steps, plan.steps) == (2, 5)
    assert presets.resolve("default", "cam") == PRESETS["default"]["cam"]


def test_steps_of_the_released_flow_code():
    plans = [
        presets.resolve("paper", name, threat=threats.flow()) for name in (None, *INTERPRETERS)
    ]
    assert [(plan.warm_steps, plan.steps) for plan in plans] == [(0, 800)] + [(200, 600)] * len(
        INTERPRETERS
    )
    assert all(
        plan.step_size(600)(i) == PIXEL == plan.warm_step_size for plan in plans for i in (0, 599)
    )
    assert all(plan.momentum is None for plan in plans)


def test_interpreters_without_numbers_of_the_paper_take_those_of_the_most_similar():
    for name, like in {"grad_cam_pp": "cam", "layer_cam": "cam", "occlusion": "mask"}.items():
        expected = replace(PRESETS["paper"][like], interpreter=INTERPRETERS[name]())
        assert presets.resolve("paper", name) == expected
    with pytest.raises(ValueError, match=r"^interpreter 'ig' is not one of grad, cam, grad_cam, "):
        presets.resolve("paper", "ig")


def test_other_numbers_for_a_flow_only(run, targets):
    assert presets.resolve("default", "cam", threat=threats.flow()).steps == 300
    for threat in (
        None,
        threats.linf(0.2),
        threats.l2(),
        threats.Threat("mine", *threats.flow()[1:]),
    ):
        assert presets.resolve("default", "cam", threat=threat) == PRESETS["default"]["cam"]
    assert presets.resolve(CAM, "cam", threat=threats.flow()) == CAM
    result = run(CAM, threat=threats.flow())
    assert result.gradient_evaluations == pytest.approx(9, rel=0.02) and result.params.shape == (
        6,
        16,
        16,
        2,
    )


def test_own_interpreter_takes_the_numbers_found_for_its_name():
    own = smooth_relu_grad_interpreter(pool=4)
    assert presets.resolve("paper", own) == replace(PRESETS["paper"]["grad"], interpreter=own)
    assert presets.resolve(CAM, own) == replace(CAM, interpreter=own)


# Bad input.

PHOTO = np.zeros((6, 16, 16, 3), np.float32)
WRONG = {
    "not a number": (
        {"images": np.full_like(PHOTO, np.nan)},
        "images must lie in [0, 1], got nan..nan",
    ),
    "out of range": ({"images": PHOTO + 2}, "images must lie in [0, 1], got 2.0..2.0"),
    "negative": ({"images": PHOTO - 0.5}, "images must lie in [0, 1], got -0.5..-0.5"),
    "integers": (
        {"images": PHOTO.astype(int)},
        "images must be uint8, or floating point in [0, 1], got int64",
    ),
    "one image": ({"images": PHOTO[0]}, "images must be [N, H, W, 3] with N >= 1, got [16, 16, 3]"),
    "channels first": (
        {"images": PHOTO.transpose(0, 3, 1, 2)},
        "images must be [N, H, W, 3] with N >= 1, got [6, 3, 16, 16]",
    ),
    "no image": (
        {"images": PHOTO[:0]},
        "images must be [N, H, W, 3] with N >= 1, got [0, 16, 16, 3]",
    ),
    "too few targets": (
        {"targets": [1, 2]},
        "targets must be integers [6], one an image, got int64 [2]",
    ),
    "fractions": (
        {"targets": np.ones(6)},
        "targets must be integers [6], one an image, got float64 [6]",
    ),
    "class 10": (
        {"targets": [0, 1, 2, 3, 4, 10]},
        "targets must lie in 0..9, the model's classes, got 0..10",
    ),
    "class -1": (
        {"targets": [0, 1, 2, 3, 4, -1]},
        "targets must lie in 0..9, the model's classes, got -1..4",
    ),
    "no maps": ({"target_maps": None}, "target_maps must be [6, 4, 4] for cam, got []"),
    "large maps": (
        {"target_maps": np.zeros((6, 8, 8))},
        "target_maps must be [6, 4, 4] for cam, got [6, 8, 8]",
    ),
    "bright maps": (
        {"target_maps": np.full((6, 4, 4), 1.5)},
        "target_maps must lie in [0, 1], got 1.5..1.5",
    ),
    "void maps": (
        {"target_maps": np.full((6, 4, 4), np.nan)},
        "target_maps must lie in [0, 1], got nan..nan",
    ),
    "interpreter": ({"interpreter": "lime"}, f"interpreter 'lime' is not one of {NAMES}"),
    "preset": ({"preset": "best"}, "preset 'best' is not one of paper, default, auto, quick"),
    "driver": ({"driver": "scan"}, "driver 'scan' is not one of auto, fori, host"),
    "batch size": ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
    "steps": ({"steps": -1}, "steps = -1 must be a whole number, 0 or more"),
    "half a step": ({"steps": 2.5}, "steps = 2.5 must be a whole number, 0 or more"),
    "warm steps": ({"warm_steps": -5}, "warm_steps = -5 must be a whole number, 0 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line_that_names_the_value(model, images, targets, benign, case):
    change, message = WRONG[case]
    arguments = {
        "images": images,
        "targets": targets,
        "target_maps": benign["cam"],
        "steps": 1,
        "warm_steps": 0,
    }
    with pytest.raises(ValueError) as caught:
        attack(model, **{**arguments, **change})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 2, 3, 4, 10]}, "0..9"),
        ({"labels": [0, 1]}, r"\[6\]"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_wrong_arguments_of_explain(model, images, change, message):
    arguments = {"labels": [0, 1, 2, 3, 4, 5], "interpreter": interpreters.cam, **change}
    with pytest.raises(ValueError, match=message):
        explain(model, images, **arguments)


def test_explain_gives_logits_and_maps_in_any_batch_size(model, images, labels, benign):
    for batch_size in (1, 4, 64):
        logits, maps = explain(
            model, images, labels, interpreter=interpreters.cam, batch_size=batch_size
        )
        np.testing.assert_array_equal(logits.argmax(-1), labels)
        np.testing.assert_allclose(maps, benign["cam"], atol=1e-5)  # float32


@pytest.mark.parametrize(
    ("preset", "interpreter", "message"),
    [
        (CAM, "grad", "interpreter 'grad' is not that of the preset, 'cam'"),
        (PRESETS["paper"]["pgd"], "cam", "interpreter 'cam' is not that of the preset, None"),
        ("default", "pgd", f"interpreter 'pgd' is not one of {NAMES}"),
        ("best", "cam", "preset 'best' is not one of paper, default, auto, quick"),
    ],
)
def test_presets_that_do_not_fit_are_refused(preset, interpreter, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        presets.resolve(preset, interpreter)


def test_no_interpreter_is_plain_pgd():
    assert presets.resolve(CAM, None).interpreter is None
    assert presets.resolve("paper", None) == PRESETS["paper"]["pgd"]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 704])
def test_lambda_of_the_paper_ends_where_it_should(n):
    schedule = presets.paper_grad_balance(n)
    assert float(schedule(n)) == pytest.approx(0.05)


def test_explain_takes_names_interpreters_and_functions(model, images, labels):
    maps = [
        explain(model, images, labels, interpreter=interpreter)[1]
        for interpreter in ("cam", cam_interpreter(), interpreters.cam)
    ]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])
    with pytest.raises(ValueError, match=f"^interpreter 'lime' is not one of {NAMES}$"):
        explain(model, images, labels, interpreter="lime")


# Curves and snapshots.


def test_snapshots_change_nothing_and_end_with_what_is_delivered(run, images, result):
    watched = run(batch_size=4, snapshots=5)
    np.testing.assert_array_equal(watched.images, result.images)
    steps = snapshot_steps(resolve(CAM, CAM.interpreter))
    assert watched.snapshots.shape == (5, len(steps), 16, 16, 3) and result.snapshots.shape[0] == 0
    np.testing.assert_array_equal(watched.snapshots[:, 0], images[:5])
    np.testing.assert_array_equal(watched.snapshots[:, -1], watched.images[:5])
    assert run(snapshots=99).snapshots.shape[0] == 6
    # batches without snapshots after one with them
    few = run(batch_size=4, snapshots=2).snapshots
    np.testing.assert_array_equal(few, watched.snapshots[:2])


def test_snapshots_are_the_iterates(run):
    constant_steps = replace(
        CAM, warm_steps=2, steps=6, step_size=constant(PIXEL), balance=constant(1.0), score_every=0
    )
    assert snapshot_steps(constant_steps) == [0, 2, 3, 4, 5, 6, 7, 8]
    whole = run(constant_steps, snapshots=6)
    for i, steps in ((1, 0), (3, 2), (5, 4)):
        np.testing.assert_array_equal(
            whole.snapshots[:, i], run(replace(constant_steps, steps=steps)).images
        )


def test_curves_begin_at_the_benign_image(run, model, images, targets, benign, result):
    n = CAM.warm_steps + CAM.steps
    assert result.curves.loss.shape == (6, n)
    f_t = metrics.confidence(explain(model, images, targets, interpreter="cam")[0], targets)
    np.testing.assert_allclose(result.curves.confidence[:, 0], f_t, atol=1e-5)
    drawn = ~np.isnan(result.curves.map_l1)
    assert (drawn == (np.arange(n) >= CAM.warm_steps)).all()
    assert np.isnan(run(replace(CAM, interpreter=None)).curves.map_l1).all()


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (replace(CAM, warm_steps=0, steps=0), [0]),
        (replace(CAM, warm_steps=0, steps=300), [0, 50, 100, 150, 200, 250, 300]),
        (replace(CAM, warm_steps=0, steps=140), [0, 20, 40, 60, 80, 100, 120, 140]),
        (replace(CAM, warm_steps=40, steps=1), [0, 40, 41]),
        (replace(APART, warm_steps=0, steps=103, score_every=10), [0, 20, 40, 60, 80, 100, 103]),
    ],
)
def test_snapshots_are_about_eight_and_evenly_apart(plan, expected):
    assert snapshot_steps(plan) == expected
