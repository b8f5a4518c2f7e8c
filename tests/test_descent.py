"""One step of equation 4 against plain NumPy, and the two drivers against each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adv2_jax import descent, interpreters, losses, threats
from adv2_jax.descent import Info, Numbers, Options, Problem
from adv2_jax.interpreters import Context, Seen

TARGET = 2
EPSILON = 0.05
CAM = interpreters.cam_interpreter().surrogate
NUMBERS = Numbers(alpha=np.float32(0.02), lam=np.float32(0.7), tau=np.float32(1e-3))

CASES = {
    "prediction alone": Options(threats.linf(EPSILON)),
    "joint": Options(threats.linf(EPSILON), CAM),
    "joint, mean, smoothed": Options(
        threats.linf(EPSILON), CAM, map_loss=losses.map_mse, smoothing=0.2
    ),
    "yielding": Options(threats.linf(EPSILON), CAM, yielding=0.3),
    "momentum": Options(threats.linf(EPSILON), CAM, momentum=0.6),
    "second moment": Options(threats.linf(EPSILON), CAM, momentum=0.6, second_moment=0.95),
    "plain gradient": Options(threats.linf(EPSILON)._replace(steepest=optax.identity), CAM),
    "penalised": Options(
        threats.linf(EPSILON)._replace(penalty=lambda delta: (delta**2).sum()), CAM
    ),
}


@pytest.fixture(scope="module")
def problem(pixels):
    target_map = np.random.default_rng(5).random((4, 4)).astype(np.float32)
    return Problem(pixels, jnp.asarray(TARGET), jnp.asarray(target_map))


def plain_forward(linear, x):
    """Log-probabilities and CAM of the linear classifier of conftest.py, in float64."""
    mix, weights, bias = (np.asarray(leaf, float) for leaf in jax.tree.leaves(linear))
    features = np.einsum("hwc,hwck->hwk", x, mix)
    logits = features.mean((0, 1)) @ weights + bias
    cam = features @ weights[:, TARGET]
    return logits - np.log(np.exp(logits).sum()), (cam - cam.min()) / np.ptp(cam)


def plain_loss(linear, problem, options, x, weight=1.0):
    """Equation 3."""
    log_f, m = plain_forward(linear, x)
    q = np.full(len(log_f), options.smoothing / (len(log_f) - 1))
    q[TARGET] = 1 - options.smoothing
    squares = (m - np.asarray(problem.target_map)) ** 2
    interpretation = squares.mean() if options.map_loss is losses.map_mse else squares.sum()
    return -q @ log_f + (
        0 if options.surrogate is None else weight * float(NUMBERS.lam) * interpretation
    )


def plain_gradient(linear, problem, options, x, weight, h=1e-6):
    gradient = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        e = np.zeros(x.shape)
        e[place] = h
        up, down = (plain_loss(linear, problem, options, x + s * e, weight) for s in (1, -1))
        gradient[place] = (up - down) / (2 * h)
    return gradient


def plain_direction(options, gradient, memory):
    """What a step follows, and what it remembers."""
    if options.threat.steepest is optax.identity:
        return gradient, memory
    if options.momentum is None:
        return np.sign(gradient), memory
    unit = gradient / np.sqrt((gradient**2).sum())
    if options.second_moment:  # Adam (Kingma & Ba 2015, algorithm 1), times ε/8 at a pixel value
        first, second, t = memory if isinstance(memory, tuple) else (0 * unit, 0 * unit, 0)
        first, second, t = 0.6 * first + 0.4 * unit, 0.95 * second + 0.05 * unit**2, t + 1
        direction = (first / (1 - 0.6**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
        return direction * EPSILON / 8 * 255, (first, second, t)
    memory = 0.6 * memory + unit
    return np.sign(memory), memory


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_plain_numpy(linear, problem, case):
    options = CASES[case]
    image = np.asarray(problem.image, float)
    state, delta, memory, weight = (
        descent.init(problem.image, options),
        np.zeros(image.shape),
        np.zeros(image.shape),
        1.0,
    )
    step = jax.jit(partial(descent.step, options=options))
    for _ in range(3):
        gradient = plain_gradient(linear, problem, options, image + delta, weight)
        gradient += 2 * delta if options.threat.penalty is not threats.no_penalty else 0
        holds = np.exp(plain_forward(linear, image + delta)[0][TARGET]) >= options.confidence
        weight = min(1.0, weight * (1 + options.yielding if holds else 1 - options.yielding))
        direction, memory = plain_direction(options, gradient, memory)
        assert np.abs(gradient).min() > 1e-5  # no sign is left to rounding
        delta = np.clip(delta - float(NUMBERS.alpha) * direction, -EPSILON, EPSILON)
        delta = np.clip(image + delta, 0, 1) - image
        state, _ = step(linear, problem, state, NUMBERS)
        np.testing.assert_allclose(state.params, delta, atol=1e-6)  # float32 gradients times 0.02
        assert state.weight == pytest.approx(weight, rel=1e-6)


def test_the_map_yields_until_the_prediction_holds(linear, problem):
    """Weight .9, .81, ... while f_t < confidence; back up to 1, and no further, once it holds."""
    weights = {}
    for confidence in (0.0, 1.1):
        options = Options(threats.linf(EPSILON), CAM, yielding=0.1, confidence=confidence)
        state = descent.init(problem.image, options)._replace(weight=jnp.asarray(0.95))
        for _ in range(2):
            state, _ = descent.step(linear, problem, state, NUMBERS, options)
        weights[confidence] = float(state.weight)
    assert weights == pytest.approx({0.0: 1.0, 1.1: 0.95 * 0.9**2})


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_step_keeps_the_types_of_its_state(linear, problem, case, keep_best):
    """Or the second step would be compiled again."""
    options = CASES[case]._replace(keep_best=keep_best)
    state = descent.init(problem.image, options)
    after, _ = jax.eval_shape(
        partial(descent.step, options=options), linear, problem, state, NUMBERS
    )
    before = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
    assert [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(after)] == before


def test_info_is_that_of_the_iterate_the_step_starts_from(linear, problem):
    options = CASES["joint"]
    _, info = descent.step(linear, problem, descent.init(problem.image, options), NUMBERS, options)
    logits, m, *_ = CAM(linear, problem.image, TARGET, Context(0.0))
    assert info.loss == pytest.approx(
        plain_loss(linear, problem, options, np.asarray(problem.image, float)), rel=1e-5
    )
    assert info.confidence == pytest.approx(float(losses.probability(logits, TARGET)), rel=1e-6)
    assert info.map_l1 == pytest.approx(float(jnp.abs(m - problem.target_map).mean()), rel=1e-6)


def test_surrogate_is_given_the_width_of_the_step(linear, problem):
    def surrogate(model, image, label, context):
        return Seen(model.head(model.features(image)), jnp.full((4, 4), context.tau))

    options = Options(threats.linf(EPSILON), surrogate)
    _, (info, *_) = descent.joint_loss(
        jnp.zeros_like(problem.image), linear, problem, NUMBERS._replace(tau=0.25), options
    )
    assert info.map_l1 == pytest.approx(
        np.abs(0.25 - np.asarray(problem.target_map)).mean(), rel=1e-6
    )


def test_what_the_surrogate_penalises_is_added(linear, problem):
    def surrogate(model, image, label, context):
        return CAM(model, image, label, context)._replace(
            penalty=3 * image.sum() + 5 * (image**2).sum()
        )

    def loss_and_slope(surrogate):
        options = Options(threats.linf(EPSILON), surrogate)
        zero = jnp.zeros_like(problem.image)
        return jax.value_and_grad(
            lambda d: descent.joint_loss(d, linear, problem, NUMBERS, options)[0]
        )(zero)

    (loss, slope), (more, steeper), x = (
        loss_and_slope(CAM),
        loss_and_slope(surrogate),
        np.asarray(problem.image, float),
    )
    assert more - loss == pytest.approx(3 * x.sum() + 5 * (x**2).sum(), rel=1e-5)
    np.testing.assert_allclose(steeper - slope, 3 + 10 * x, rtol=1e-5)


def test_surrogate_is_given_a_key_and_the_number_of_each_step(linear, problem):
    def surrogate(model, image, label, context):
        drawn = jax.random.uniform(context.key, (4, 4))
        return Seen(
            model.head(model.features(image)),
            drawn,
            memory=context.memory.at[context.step].set(drawn),
        )

    options = Options(threats.linf(EPSILON), surrogate)
    problem = problem._replace(key=jax.random.key_data(jax.random.key(7)))
    state = descent.init(problem.image, options, None, jnp.zeros((3, 4, 4)))
    for _ in range(3):
        state, _ = descent.step(linear, problem, state, NUMBERS, options)
    expected = [
        jax.random.uniform(jax.random.fold_in(jax.random.key(7), i), (4, 4)) for i in range(3)
    ]
    np.testing.assert_array_equal(state.memory, np.stack(expected))


def test_rounded_loss_is_that_of_the_8_bit_image_with_a_straight_gradient(linear, problem):
    plain, rounded = (Options(threats.linf(EPSILON), CAM, rounded=flag) for flag in (False, True))
    delta = jnp.asarray(
        np.random.default_rng(0).uniform(-0.03, 0.03, problem.image.shape), jnp.float32
    )
    snapped = np.round(np.asarray(problem.image + delta) * 255) / 255 - problem.image

    def gradient(options, delta):
        return jax.grad(lambda d: descent.joint_loss(d, linear, problem, NUMBERS, options)[0])(
            delta
        )

    np.testing.assert_allclose(
        gradient(rounded, delta), gradient(plain, snapped), rtol=1e-4, atol=1e-6
    )
    assert jnp.abs(gradient(plain, delta) - gradient(plain, snapped)).max() > 1e-4


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_8_bit_images_are_left_as_they_are(level):
    image, threat = jnp.full((2, 2, 3), level / 255), threats.linf(0.1)
    for delta in (jnp.zeros((2, 2, 3)), jnp.full((2, 2, 3), 0.4 / 255)):
        rounded = descent.image_of(delta, image, threat, rounded=True)
        np.testing.assert_allclose(rounded, image, atol=6e-8)  # half an ulp of 1


def test_success_comes_before_the_map():
    failed = [descent.criterion(np.array(f_t), 0.0, f_t >= 0.8) for f_t in (0.1, 0.5, 0.799)]
    succeeded = [
        descent.criterion(np.array(f_t), map_l1, f_t >= 0.8)
        for f_t, map_l1 in ((0.8, 1.0), (1.0, 0.5), (0.9, 0.1))
    ]
    ranking = [float(score) for score in failed + succeeded]
    assert ranking == sorted(ranking, reverse=True)
    assert ranking[3:] == pytest.approx([1.0, 0.5, 0.1])


@pytest.mark.parametrize("keep_best", [True, False])
def test_best_is_the_iterate_of_the_lowest_score(linear, problem, keep_best):
    options = Options(threats.linf(0.5), CAM, confidence=0.5, keep_best=keep_best)
    state, iterates, scores = descent.init(problem.image, options), [], []
    step = jax.jit(partial(descent.step, options=options))
    for alpha in (0.05, 0.1, 0.2, 0.4, 0.02, 0.5):
        iterates.append(state.params)
        state, info = step(linear, problem, state, NUMBERS._replace(alpha=alpha))
        scores.append(descent.criterion(info.confidence, info.map_l1, info.confidence >= 0.5))
    best = int(np.argmin(scores)) if keep_best else 0
    np.testing.assert_array_equal(state.best, iterates[best])
    assert state.lowest == (scores[best] if keep_best else np.inf)
    assert 0 < np.argmin(scores) < 5  # or the test would not tell


def batched(problem_of_image, options, n):
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(problem_of_image, range(n)))
    return problems, jax.vmap(lambda problem: descent.init(problem.image, options))(problems)


@pytest.fixture(scope="module")
def small_steps(images):
    """Problems, states, schedule and options of a descent along the gradient itself: rounding is not amplified by signs."""
    options = Options(
        threats.linf(0.1)._replace(steepest=optax.identity), CAM, keep_best=True, confidence=0.0
    )

    def problem_of_image(i):
        return Problem(images[i] / np.float32(255), np.int32(i), np.full((4, 4), 0.5, np.float32))

    schedule = Numbers(*np.array([[1e-2] * 5, [0.5, 0.6, 0.7, 0.8, 0.9], [1e-3] * 5], np.float32))
    return *batched(problem_of_image, options, 3), schedule, options


def test_both_drivers_give_the_same(model, small_steps):
    reported = {"host": [], "fori": []}
    host, fori = (
        descent.descend(model, *small_steps, driver=driver, on_step=steps.append)
        for driver, steps in reported.items()
    )
    assert jnp.abs(host[0].params).max() > 1e-3
    assert host[1].loss.shape == (3, 5)
    for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(fori), strict=True):
        # float32: XLA sums convolutions in loops in another order
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert reported == {"host": [1] * 5, "fori": [5]}


@pytest.mark.parametrize("driver", ["host", "fori"])
def test_spans_of_a_schedule_are_the_whole_and_share_a_program(model, small_steps, driver):
    problems, states, schedule, options = small_steps
    whole = descent.descend(model, *small_steps, driver=driver)
    programs = descent._programs(jax.tree.structure(model), descent.step_of(options))
    compiled = [program._cache_size() for program in programs]
    infos = []
    for span in ((0, 2), (2, 3), (3, 5)):
        states, info = descent.descend(
            model, problems, states, schedule, options, span=span, driver=driver
        )
        infos.append(info)
    assert [program._cache_size() for program in programs] == compiled
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(
        lambda *parts: np.testing.assert_array_equal(sum(map(np.asarray, parts[:3])), parts[3]),
        *infos,
        whole[1],
    )


def test_the_map_does_not_yield_for_good(linear, problem):
    """A hundred steps that miss the target leave .9^100 = 3e-5 of the weight, and 1.1^k brings it back only after 111 that hit."""
    options = Options(threats.linf(0.1), CAM, yielding=0.1, confidence=1.0)
    state = descent.init(problem.image, options)
    for _ in range(60):
        state, _ = jitted_step(linear, problem, state, options)
    assert state.weight == pytest.approx(descent.LEAST_WEIGHT)


def jitted_step(model, problem, state, options):
    numbers = Numbers(*np.float32([0.01, 1.0, 1e-3]))
    return jax.jit(descent.step, static_argnames="options")(model, problem, state, numbers, options)


def test_plain_pgd_keeps_the_iterate_of_the_least_loss(linear, problem):
    """Along the gradient upwards every step is worse than the start."""
    uphill = threats.linf(0.1)._replace(steepest=lambda: optax.scale(-1.0))
    options = Options(uphill, keep_best=True)
    state = descent.init(problem.image, options)
    losses = []
    for _ in range(4):
        state, info = jitted_step(linear, problem, state, options)
        losses.append(float(info.loss))
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert float(state.lowest) == losses[0] and not np.any(state.best)


def test_descent_is_the_step_repeated(model, small_steps):
    problems, states, schedule, options = small_steps
    leaves, step = descent.batched_step(model, options)
    infos = []
    for i in range(5):
        states, info = step(leaves, problems, states, Numbers(*(values[i] for values in schedule)))
        infos.append(info)
    assert isinstance(info, Info) and info.loss.shape == (3,)
    host, reported = descent.descend(model, *small_steps, driver="host")
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(host), strict=True):
        np.testing.assert_array_equal(a, b)
    for i, info in enumerate(infos):
        for new, all_steps in zip(info, reported, strict=True):
            np.testing.assert_array_equal(new, all_steps[:, i])


def test_no_weight_is_a_constant_of_the_compiled_step(model, small_steps):
    problems, states, schedule, options = small_steps
    leaves, step = descent.batched_step(model, options)
    numbers = Numbers(*(values[0] for values in schedule))
    large_constant = 'dense<"0x'  # how StableHLO writes an array of more than a few numbers
    assert large_constant not in step.lower(leaves, problems, states, numbers).as_text()
    closed_over = jax.jit(lambda *arguments: step(leaves, *arguments))
    assert large_constant in closed_over.lower(problems, states, numbers).as_text()


def test_unknown_driver_lists_the_valid_ones(model, small_steps):
    with pytest.raises(ValueError, match=r"^driver 'scan' is not one of auto, fori, host$"):
        descent.descend(model, *small_steps, driver="scan")


@pytest.mark.parametrize("driver", ["host", "fori"])
def test_no_steps_change_nothing(linear, problem, driver):
    options = CASES["joint"]
    problems, states = batched(lambda i: problem, options, 2)
    after, reported = descent.descend(
        linear, problems, states, Numbers(*np.zeros((3, 0))), options, driver=driver
    )
    assert reported.loss.shape == (2, 0)
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
