"""MASK against plain NumPy on a linear classifier, its two hypergradients against differences, and the attack that carries it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import attack, data, descent, explain, interpreters, losses, metrics, models, threats
from adv2_jax.activations import relu
from adv2_jax.descent import Numbers, Problem
from adv2_jax.interpreters import Context, MaskObjective, mask_interpreter
from adv2_jax.interpreters.mask_descent import (
    Descent,
    implicit,
    mask_loss,
    start_mask,
    step_mask,
    usual_size,
)
from adv2_jax.presets import Preset, constant

LABEL = 1
MILD = MaskObjective(l1=0.3, tv=0.5, blur=0.3)  # the linear classifier's log-odds are of order 1
OBJECTIVES = {
    "deletion": MILD,
    "preservation": MILD._replace(game="preservation"),
    "smooth": MILD._replace(tv=4.0, beta=2.0),
    "area": MILD._replace(l1=3.0, area=0.4),
    "literal": MILD._replace(score=losses.probability),
    "literal preservation": MILD._replace(score=losses.probability, game="preservation"),
}
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@pytest.fixture
def double_linear(linear, pixels, double):
    """The linear classifier and its image in float64."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), float), (linear, pixels))


@pytest.fixture
def strong(double_linear):
    """A classifier whose every pixel matters."""
    model, image = double_linear
    return replace(model, weights=8 * model.weights), image


@pytest.fixture
def some_map():
    return np.random.default_rng(7).uniform(0.1, 0.9, (2, 2))


# The objective.


def plain_blur(image, sigma):
    """Each pixel is the mean of all, weighted by a Gaussian of their distance."""
    out = np.zeros(image.shape)
    h, w, _ = image.shape
    for i, j in np.ndindex(h, w):
        weights = np.exp(
            [[-((i - k) ** 2 + (j - n) ** 2) / (2 * sigma**2) for n in range(w)] for k in range(h)]
        )
        out[i, j] = np.einsum("hw,hwc->c", weights / weights.sum(), image)
    return out


def plain_upsample(a):
    """[2, 2] -> [4, 4], bilinear: the centres of the four pixels lie at -1/4, 1/4, 3/4 and 5/4, of which the ends are clamped."""
    rows = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    return rows @ a @ rows.T


def plain_loss(linear, image, a, o):
    """Method §5 word for word, on means."""
    mix, weights, bias = (np.asarray(leaf, float) for leaf in jax.tree.leaves(linear))
    visible = plain_upsample(1 - a if o.game == "deletion" else a)[..., None]
    shown = visible * image + (1 - visible) * plain_blur(image, o.blur * 4)
    logits = np.einsum("hwc,hwck->hwk", shown, mix).mean((0, 1)) @ weights + bias
    f_c = np.exp(logits[LABEL]) / np.exp(logits).sum()
    if o.score is losses.probability:
        presence = f_c if o.game == "deletion" else -f_c
    else:
        presence = -np.log(1 - f_c if o.game == "deletion" else f_c)
    variation = (abs(a[1] - a[0]) ** o.beta).sum() + (abs(a[:, 1] - a[:, 0]) ** o.beta).sum()
    return presence + o.l1 * abs(a.mean() - o.area) + o.tv * variation / 4


@EVERY
def test_objective_is_that_of_plain_numpy(double_linear, some_map, objective):
    model, image = double_linear
    actual = mask_loss(model, image, LABEL, jnp.asarray(some_map), objective)
    assert actual == pytest.approx(
        plain_loss(model, np.asarray(image), some_map, objective), rel=1e-10
    )


@EVERY
def test_gradient_is_that_of_central_differences(double_linear, some_map, objective, slope):
    model, image = double_linear
    gradient = jax.jit(jax.grad(partial(mask_loss, objective=objective), argnums=3))(
        model, image, LABEL, jnp.asarray(some_map)
    )
    plain = partial(plain_loss, model, np.asarray(image), o=objective)
    for place in np.ndindex(2, 2):
        e = np.zeros((2, 2))
        e[place] = 1
        assert gradient[place] == pytest.approx(slope(plain, some_map, e), rel=1e-6)


def test_an_empty_map_is_pulled_down_by_its_size(linear, pixels):
    """|.| would have no slope there."""
    slope = jax.jit(jax.grad(mask_loss, argnums=3), static_argnames="objective")
    slopes = [
        slope(linear, pixels, LABEL, jnp.zeros((2, 2)), objective=MILD._replace(l1=l1))
        for l1 in (0.0, 4.0)
    ]
    np.testing.assert_allclose(slopes[1] - slopes[0], 1, rtol=1e-6)


def test_log_probabilities_do_not_saturate(linear, pixels):
    """Where f_c rounds to 1 the literal objective has no slope, and its map is empty; that of -log(1 - f_c) is not."""
    certain = replace(linear, bias=linear.bias.at[LABEL].add(40.0), weights=30 * linear.weights)
    away = jnp.asarray(interpreters.mask(certain, pixels, LABEL, size=4, objective=MILD))
    literal = MILD._replace(score=losses.probability)
    logits = certain.head(certain.features(pixels))
    assert losses.probability(logits, LABEL) == 1
    assert interpreters.mask(certain, pixels, LABEL, size=4, objective=literal).max() < 1e-3
    assert away.max() > 0.3


# The descent.


def plain_descent(linear, image, descent, steps):
    """Adam with clamping in NumPy on central differences: the maps after each step."""
    a, first, second, maps = np.full((2, 2), 0.5), 0.0, 0.0, []
    for i in range(steps):
        gradient = np.empty(a.shape)
        for place in np.ndindex(a.shape):
            e = np.zeros(a.shape)
            e[place] = 1e-6
            up, down = (plain_loss(linear, image, a + s * e, descent.objective) for s in (1, -1))
            gradient[place] = 4 * (up - down) / 2e-6  # of the mean's four entries
        first, second = 0.7 * first + 0.3 * gradient, 0.9 * second + 0.1 * gradient**2
        part = 0.5 * (1 + np.cos(np.pi * min(i / descent.steps, 1)))
        rate = descent.learning_rate * (0.1 + 0.9 * part)
        a = a - rate * (first / (1 - 0.7 ** (i + 1))) / (
            np.sqrt(second / (1 - 0.9 ** (i + 1))) + 0.5
        )
        a = np.clip(a, 0, 1)
        maps.append(a)
    return maps


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_steps_are_those_of_plain_adam(strong, game):
    model, image = strong
    options = Descent(2, 6, 0.6, MILD._replace(game=game, l1=0.05))
    expected = plain_descent(model, np.asarray(image), options, 9)
    memory = start_mask(image, options)
    step = jax.jit(partial(step_mask, descent=options))
    for m in expected:
        memory = step(model, image, LABEL, memory)
        np.testing.assert_allclose(memory.map, m, atol=1e-6)  # central differences
    actual = interpreters.mask(
        model, image, LABEL, size=2, steps=6, learning_rate=0.6, objective=options.objective
    )
    np.testing.assert_allclose(actual, expected[5], atol=1e-6)
    assert np.isin(expected, [0, 1]).any()  # or the clamp would not be seen
    assert all(m.any() for m in expected)  # an empty map lies on a kink of the objective


def converged(model, image, objective, a, steps=3000, rate=0.5):
    """The optimum, by projected gradient descent."""
    gradient = jax.grad(mask_loss, argnums=3)

    def body(_, a):
        return jnp.clip(a - rate * gradient(model, image, LABEL, a, objective), 0, 1)

    return jax.lax.fori_loop(0, steps, body, a)


CONVEX = MaskObjective(l1=2.0, tv=0.5, beta=2.0, blur=0.3)


@pytest.fixture
def optimum(strong):
    """A map of 4 x 4 with entries at 0 and entries between."""
    model, image = strong
    a = jax.jit(partial(converged, objective=CONVEX))(model, image, a=jnp.full((4, 4), 0.5))
    free = (a > 1e-3) & (a < 1 - 1e-3)
    assert free.any() and not free.all()
    return model, image, a


def test_a_solve_that_starts_from_the_optimum_stays_there(optimum):
    model, image, a = optimum
    options = Descent(4, 30, 0.2, CONVEX)
    memory = start_mask(image, options)._replace(map=a)
    step = jax.jit(partial(step_mask, descent=options))
    for _ in range(30):
        memory = step(model, image, LABEL, memory)
    np.testing.assert_allclose(memory.map, a, atol=1e-4)


def test_the_descent_ends_near_the_optimum(optimum):
    model, image, a = optimum
    actual = interpreters.mask(model, image, LABEL, size=4, steps=100, objective=CONVEX)
    np.testing.assert_allclose(actual, a, atol=5e-3)


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_area_is_that_asked_for(strong, game):
    model, image = strong
    for area in (0.2, 0.6):
        objective = CONVEX._replace(game=game, l1=20.0, area=area)
        actual = interpreters.mask(model, image, LABEL, size=4, steps=100, objective=objective)
        assert actual.mean() == pytest.approx(area, abs=0.02)  # of the last steps' length


# Hypergradients.


def along(f, x, seed=0):
    """w·f(x) for one fixed w, and a direction v in which to move x."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((4, 4))
    return lambda x: jnp.sum(w * f(x)), rng.standard_normal(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 3])
def test_look_ahead_differentiates_its_steps_and_nothing_before(strong, slope, ahead):
    """Against differences of the steps themselves, with the result of the free steps held."""
    model, image = strong
    interpreter = mask_interpreter(
        size=4, steps=9, learning_rate=0.05, objective=CONVEX, free=2, ahead=ahead
    )
    options = Descent(4, 9, 0.05, CONVEX)
    step = jax.jit(partial(step_mask, descent=options))
    start = step(model, image, LABEL, start_mask(image, options))
    held = start
    for _ in range(2):
        held = step(model, image, LABEL, held)

    def brute(x):
        memory = held
        for _ in range(ahead):
            memory = step(model, x, LABEL, memory)
        return memory.map

    logits, m, _, memory = jax.jit(interpreter.surrogate)(
        model, image, LABEL, Context(1e-3, memory=start)
    )
    np.testing.assert_allclose(m, brute(image), rtol=1e-12)
    np.testing.assert_allclose(memory.map, held.map, rtol=1e-12)
    np.testing.assert_allclose(logits, model.head(model.features(image)), rtol=1e-12)
    f, v = along(brute, image)
    g, _ = along(
        lambda x: interpreter.surrogate(model, x, LABEL, Context(1e-3, memory=start)).map, image
    )
    gradient = jax.jit(jax.grad(g))(image)
    assert jnp.vdot(gradient, v) == pytest.approx(float(slope(f, image, v)), rel=1e-5)
    assert jnp.abs(gradient).max() > 1e-4


@pytest.mark.slow
def test_without_look_ahead_the_map_has_no_slope(double_linear):
    model, image = double_linear
    interpreter = mask_interpreter(size=4, objective=MILD, ahead=0)
    start = interpreter.solver.init(image)

    @jax.jit
    @jax.grad
    def gradient(x):
        return interpreter.surrogate(model, x, LABEL, Context(1e-3, memory=start)).map.sum()

    np.testing.assert_array_equal(gradient(image), 0)


@pytest.mark.slow
def test_implicit_slope_is_that_of_the_optimum(optimum, slope):
    """Against differences of the converged solve."""
    model, image, a = optimum
    options = Descent(4, objective=CONVEX)
    solved = jax.jit(lambda x: converged(model, x, CONVEX, a))
    f, v = along(solved, image)

    def implied(x):
        return implicit(model, x, LABEL, a, options, relu, damping=0.0, iterations=16)

    g, _ = along(implied, image)
    np.testing.assert_array_equal(jax.jit(implied)(image), a)
    assert jnp.vdot(jax.jit(jax.grad(g))(image), v) == pytest.approx(
        float(slope(f, image, v)), rel=1e-3
    )


def test_damping_shortens_the_implicit_slope(optimum):
    model, image, a = optimum
    options = Descent(4, objective=CONVEX)

    def length(damping):
        g, _ = along(lambda x: implicit(model, x, LABEL, a, options, relu, damping=damping), image)
        return float(jnp.abs(jax.jit(jax.grad(g))(image)).sum())

    lengths = [length(damping) for damping in (0.0, 0.1, 10.0)]
    assert lengths[0] > lengths[1] > lengths[2] > 0


# The attack.

MASK = mask_interpreter(steps=5, objective=MaskObjective(l1=0.5, tv=1.0), free=1)
PRESET = Preset(
    MASK, warm_steps=2, steps=6, step_size=constant(1 / 255), balance=constant(300.0), score_every=3
)
WIDE = threats.linf(0.1)


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def asked(small, images):
    """Target classes, and the maps of the labels."""
    logits = jax.jit(jax.vmap(lambda x: small.head(small.features(x))))(images / np.float32(255))
    ranking = np.asarray(logits).argsort(-1)[:, ::-1]
    return ranking[:, 1], explain(small, images, ranking[:, 0], interpreter=MASK)[1]


@pytest.fixture(scope="module")
def run(small, images, asked):
    def call(preset=PRESET, index=slice(None), **changes):
        arguments = {"interpreter": preset.interpreter, "preset": preset, "threat": WIDE, **changes}
        return attack(small, images[index], asked[0][index], asked[1][index], **arguments)

    return call


def test_both_drivers_and_the_plain_function_give_one_map(small, images, asked):
    maps = [
        explain(small, images, asked[0], interpreter=MASK, driver=driver)[1]
        for driver in ("host", "fori")
    ]
    maps.append(explain(small, images, asked[0], interpreter=MASK.explain)[1])
    assert maps[0].shape == (6, 4, 4)
    assert np.ptp(maps[0]) > 0.1
    for other in maps[1:]:
        # float32 convolutions in loops, normalised by Adam
        np.testing.assert_allclose(other, maps[0], atol=1e-4)


@pytest.mark.slow
def test_image_is_attacked_the_same_alone_in_a_batch_and_in_another_order(run):
    together = run().images
    np.testing.assert_array_equal(run(batch_size=1).images, together)
    order = np.array([4, 0, 5, 3, 1, 2])
    np.testing.assert_array_equal(run(index=order).images, together[order])


def test_memory_is_carried_from_step_to_step_and_reset(small, images, asked):
    """After two steps the running map has taken as many free steps, each on the image of its own step."""
    problem = Problem(
        jnp.asarray(images[3] / np.float32(255)), jnp.asarray(asked[0][3]), jnp.asarray(asked[1][3])
    )
    options = descent.Options(WIDE, MASK.surrogate)
    first = MASK.solver.init(problem.image)
    numbers = Numbers(np.float32(1 / 255), np.float32(300.0), np.float32(1e-3))
    state, expected = descent.init(problem.image, options, None, first), first
    step, solve = jax.jit(partial(descent.step, options=options)), jax.jit(MASK.solver.step)
    for _ in range(2):
        expected = solve(small, WIDE.apply(state.params, problem.image), problem.target, expected)
        state, _ = step(small, problem, state, numbers)
    np.testing.assert_allclose(state.memory.map, expected.map, atol=1e-5)
    assert state.memory.optimiser[0].count == 2


def test_look_ahead_changes_the_attack(run):
    options = {"steps": 5, "objective": MaskObjective(l1=0.5, tv=1.0), "free": 1}
    blind = replace(PRESET, interpreter=mask_interpreter(ahead=0, **options))
    other = replace(PRESET, interpreter=mask_interpreter(hypergradient="implicit", **options))
    images = [run(preset).images for preset in (PRESET, blind, other)]
    assert all((images[0] != other).any() for other in images[1:])
    weightless = replace(PRESET, balance=constant(0.0))
    np.testing.assert_array_equal(images[1], run(weightless).images)


@pytest.mark.parametrize("score_every", [0, 2, 3])
def test_a_descent_is_solved_at_the_start_and_whenever_it_is_scored(run, score_every):
    spent = []

    def step(*arguments):
        jax.debug.callback(lambda: spent.append(None))
        return MASK.solver.step(*arguments)

    preset = replace(
        PRESET,
        interpreter=MASK._replace(solver=MASK.solver._replace(step=step)),
        steps=7,
        score_every=score_every,
    )
    run(preset)
    jax.effects_barrier()
    # the result is looked at before and after rounding
    solves = 1 + (len(range(0, 7, score_every)) if score_every else 0) + 2
    assert len(spent) == solves * MASK.solver.steps


@pytest.mark.slow
def test_second_attack_of_the_same_kind_compiles_nothing(run, make_small, images, asked, caplog):
    def compiled(model):
        caplog.clear()
        preset = replace(
            PRESET, interpreter=mask_interpreter(steps=5, objective=MaskObjective(0.5, 1.0), free=1)
        )
        with jax.log_compiles():
            attack(
                model,
                images,
                *asked,
                interpreter=preset.interpreter,
                preset=preset,
                threat=WIDE,
                batch_size=3,
            )
        return [
            record.getMessage()
            for record in caplog.records
            if record.getMessage().startswith("Compiling")
        ]

    assert compiled(make_small(0))
    assert compiled(make_small(1)) == []


# Options.


def test_equal_options_give_the_same_object():
    assert mask_interpreter() is mask_interpreter(size=None, objective=MaskObjective())
    assert mask_interpreter(objective=MaskObjective(l1=2.0)) is mask_interpreter(
        objective=MaskObjective(l1=2)
    )
    assert mask_interpreter(free=3) is not mask_interpreter()


@pytest.mark.parametrize(
    ("side", "size"), [(4, 1), (16, 4), (32, 8), (64, 16), (112, 28), (224, 28), (299, 28)]
)
def test_usual_sizes(side, size):
    assert usual_size(side, side + 8) == size


def test_map_of_an_oblong_image_is_oblong(make_small):
    assert interpreters.mask(make_small(), jnp.full((16, 24, 3), 0.4), LABEL, steps=1).shape == (
        4,
        6,
    )
    assert interpreters.mask(
        make_small(), jnp.full((16, 24, 3), 0.4), LABEL, size=8, steps=1
    ).shape == (8, 12)


WRONG = {
    "game": (MILD._replace(game="chess"), "game 'chess' is not one of deletion, preservation"),
    "l1": (MILD._replace(l1=-1.0), "l1 = -1.0 must be finite and not negative"),
    "tv": (MILD._replace(tv=float("nan")), "tv = nan must be finite and not negative"),
    "beta": (MILD._replace(beta=1.5), "beta = 1.5 must be finite and 2 or more"),
    "blur": (MILD._replace(blur=0.0), "blur = 0.0 must be finite and above 0"),
    "area": (MILD._replace(area=1.5), "area = 1.5 must be in [0, 1]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_objectives_are_one_line_that_names_the_value(linear, pixels, case):
    objective, message = WRONG[case]
    for call in (mask_interpreter, partial(interpreters.mask, linear, pixels, LABEL)):
        with pytest.raises(ValueError) as caught:
            call(objective=objective)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size = 0 must be 1 or more"),
        ({"steps": 0}, "steps = 0 must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 must be finite and above 0"),
        ({"free": -1}, "free = -1 must be 0 or more"),
        ({"ahead": -1}, "ahead = -1 must be 0 or more"),
        ({"hypergradient": "exact"}, "hypergradient 'exact' is not one of unrolled, implicit"),
    ],
)
def test_wrong_options_are_one_line_that_names_the_value(options, message):
    with pytest.raises(ValueError) as caught:
        mask_interpreter(**options)
    assert str(caught.value) == message


def test_map_larger_than_the_image_is_refused(linear, pixels):
    with pytest.raises(
        ValueError, match=r"^size = 5 must be at most 4, the shorter side of the image$"
    ):
        interpreters.mask(linear, pixels, LABEL, size=5)


# Does it explain?


@pytest.mark.slow
def test_mask_finds_the_object_of_the_embedded_set():
    scenes = data.shapes.generate(16, seed=11)
    _, maps = explain(models.embedded(), scenes.images, scenes.labels, interpreter="mask")
    assert np.mean(metrics.pointing_game(maps, scenes.objects)) >= 0.9
    upsampled = np.asarray(
        jax.image.resize(maps, scenes.objects.shape, "bilinear", antialias=False)
    )
    assert upsampled[scenes.objects].mean() > 5 * upsampled[~scenes.objects].mean()
    assert maps.max((1, 2)).min() > 0.2
