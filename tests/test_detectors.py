"""Detectors against plain NumPy, their files, and attacks that evade them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import median_filter
from scipy.optimize import minimize

from adv2_jax import attack, descent, detectors, explain, interpreters, metrics, threats
from adv2_jax.attacks import gradient_evaluations
from adv2_jax.capabilities import pre_activations
from adv2_jax.descent import Numbers, Options, Problem, criterion
from adv2_jax.detectors import Features, Guarded, Record
from adv2_jax.files import read_arrays, write_arrays
from adv2_jax.identity import tree_fingerprint
from adv2_jax.options import bind
from adv2_jax.presets import resolve

WIDE = threats.linf(0.1)
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def scenes():
    """Sixty smooth images: noise of 4 x 4, enlarged."""
    coarse = np.random.default_rng(3).integers(0, 256, (60, 4, 4, 3))
    return coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8)


def unit(images):
    return jnp.asarray(images / np.float32(255))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def fitted(kind, model, images, attacked=None):
    """Fit on images: the first twenty are the reference, the others set the threshold."""
    x, reference = unit(images), ()
    if kind.look:
        seen = jax.jit(jax.vmap(partial(kind.look, model)))(x[:20])
        classes = jax.vmap(lambda i: model.head(model.features(i)).argmax())(x[:20])
        reference = kind.gather(seen, np.asarray(classes), 10)
    compute = jax.jit(jax.vmap(lambda image: kind.compute(model, image, reference)))
    taught = None if attacked is None else np.asarray(compute(unit(attacked)))
    return detectors.fit(kind, reference, np.asarray(compute(x[20:])), taught)


def score_of(detector, model, images):
    return np.asarray(jax.jit(jax.vmap(partial(detector.score, model)))(unit(images)))


@pytest.mark.parametrize("side", [2, 3, 4])
def test_median_is_that_of_scipy(side):
    image = RNG.random((7, 9, 3)).astype(np.float32)
    expected = median_filter(image, (side, side, 1), mode="reflect")
    np.testing.assert_array_equal(detectors.median(jnp.asarray(image), side), expected)


def test_the_derivative_of_the_median_is_its_own(double, slope):
    image, along = RNG.random((6, 6, 3)), RNG.standard_normal((6, 6, 3))

    def total(x):
        return (detectors.median(x, 3) ** 2).sum()

    exact = float((jax.grad(total)(jnp.asarray(image)) * along).sum())
    assert exact == pytest.approx(float(slope(total, image, along, 1e-7)), rel=1e-6)


def test_squeezing_against_numpy(small, images):
    kind = detectors.squeezing(bits=(1, 4), medians=(2,))
    found = jax.jit(jax.vmap(lambda image: kind.compute(small, image, ())))(unit(images))
    for image, features in zip(images / np.float32(255), found, strict=True):
        squeezed = [np.round(image), np.round(image * 15) / 15]
        squeezed.append(median_filter(image, (2, 2, 1), mode="reflect"))
        f, *others = (
            softmax(np.asarray(small.head(small.features(x)))) for x in (image, *squeezed)
        )
        # two softmaxes in float32
        np.testing.assert_allclose(features, [np.abs(f - g).sum() for g in others], atol=1e-5)
    assert found.max() > 0.5


def test_squeezing_has_a_slope_where_both_are_confident(make_small, scenes):
    """There an L1 distance of 2 is flat in float32, and an attack would not know where to go."""
    sure = dataclasses.replace(make_small(), weights=1e3 * make_small().weights)
    kind = detectors.squeezing(bits=(1,), medians=())
    features = jax.jit(jax.vmap(lambda x: kind.compute(sure, x, ())[0]))(unit(scenes))
    place = int(features.argmax())
    assert features[place] == 2
    slope = jax.grad(lambda x: kind.compute(sure, x, ())[0])(unit(scenes)[place])
    assert np.isfinite(slope).all() and jnp.linalg.norm(slope) > 1


def test_dimension_against_numpy_and_on_a_plane():
    others, point = RNG.standard_normal((40, 5)), RNG.standard_normal(5)
    r = np.sort(np.linalg.norm(others - point, axis=1))[:8]
    expected = -1 / np.log(r / r[-1]).mean()
    found = detectors.dimension(jnp.float32(point), jnp.float32(others), 8)
    assert found == pytest.approx(expected, rel=1e-4)  # logarithms of float32 distances
    # uniform on a plane in five dimensions; the estimate from 100 neighbours is good to a tenth
    plane = np.zeros((5000, 5))
    plane[:, :2] = RNG.uniform(-1, 1, (5000, 2))
    around = [detectors.dimension(jnp.zeros(5), jnp.float32(plane), 100)]
    assert np.mean(around) == pytest.approx(2, rel=0.3)


def test_lid_looks_at_every_relu(small, scenes):
    kind = detectors.lid(k=5)
    x = unit(scenes)
    reference = jax.vmap(partial(kind.look, small))(x[:20])
    found = kind.compute(small, x[30], reference)
    for i, z in enumerate(pre_activations(small, x[30])):
        before = np.stack(
            [np.asarray(pre_activations(small, image)[i])[0].mean((0, 1)) for image in x[:20]]
        )
        r = np.sort(np.linalg.norm(before - np.asarray(z)[0].mean((0, 1)), axis=1))[:5]
        assert found[i] == pytest.approx(-1 / np.log(r / r[-1]).mean(), rel=1e-3)
    assert len(found) == 2


def plain_overlap(a, b):
    k = round(0.1 * len(a))
    first, second = (set(np.argsort(m)[::-1][:k]) for m in (a, b))
    return len(first & second) / len(first | second)


def test_measures_of_agreement_against_numpy():
    a, noise = RNG.random((2, 100)).astype(np.float32)
    for b in (noise, (0.8 * a + 0.2 * noise).astype(np.float32)):
        pair = jnp.asarray(a), jnp.asarray(b)
        assert detectors._overlap(*pair) == pytest.approx(plain_overlap(a, b), abs=1e-6)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert detectors._cosine(*pair) == pytest.approx(cosine, abs=1e-5)
        assert detectors._rank_correlation(*pair) == pytest.approx(
            metrics.rank_correlation(a, b), abs=1e-5
        )
    empty = jnp.zeros(100)
    assert detectors._overlap(empty, empty) == 1 and detectors._overlap(empty, a) == 0
    assert np.isfinite(detectors._rank_correlation(empty, a))


def test_their_slopes_bring_maps_together():
    """Rank correlation and IoU have none of their own; that of a correlation must lead to them."""
    a, b = (jnp.asarray(m) for m in RNG.random((2, 100)).astype(np.float32))
    for measure in (detectors._overlap, detectors._rank_correlation):
        rise = jax.jit(jax.grad(measure, argnums=1))
        moved = b
        for _ in range(60):
            slope = rise(a, moved)
            moved = moved + 0.1 * slope / jnp.linalg.norm(slope)
        assert measure(a, b) < 0.3 and measure(a, moved) > 0.8


def test_agreement_and_discrepancy_against_numpy(small, scenes):
    x = unit(scenes[:24])
    logits = np.stack([small.head(small.features(image)) for image in x])
    classes = logits.argmax(-1)
    maps = [
        np.asarray(jax.jit(jax.vmap(one, (None, 0, 0)))(small, x, classes))
        for one in (interpreters.cam, interpreters.grad_cam)
    ]
    names = ("cam", "grad_cam")
    kind = detectors.agreement(interpreters=names)
    found = jax.jit(partial(kind.compute, reference=()))(small, x[0])
    a, b = (m[0].reshape(-1) for m in maps)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found[1:] == pytest.approx([1 - cosine, 1 - metrics.rank_correlation(a, b)], abs=1e-4)
    kind = detectors.discrepancy(interpreters=names)
    seen = jax.jit(jax.vmap(partial(kind.look, small)))(x[:20])
    reference = kind.gather(seen, classes[:20], 10)
    found = jax.jit(jax.vmap(lambda image: kind.compute(small, image, reference)))(x[20:])
    several = np.bincount(classes[:20], minlength=10) > 1
    assert 0 < several.sum() < 10  # classes with statistics of their own, and others
    for c, values, drawn in zip(classes[20:], found, np.stack(maps, 1)[20:], strict=True):
        expected = []
        for m, benign in zip(drawn, maps, strict=True):
            of = benign[:20][classes[:20] == c] if several[c] else benign[:20]
            mean, spread = of.mean(0), np.maximum(of.std(0), 0.05)
            cosine = (m * mean).sum() / np.sqrt((m**2).sum() * (mean**2).sum())
            expected += [(np.abs(m - mean) / spread).mean(), 1 - cosine]
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_threshold_passes_all_but_five_in_a_hundred():
    kind = detectors.squeezing()
    features = RNG.random((40, 2)).astype(np.float32)
    found = detectors.fit(kind, (), features)
    above = (features.max(1) > found.threshold).mean()
    assert above == 0.05 and found.weights is None
    z = (features - features.mean(0)) / features.std(0)
    mean = detectors.fit(kind._replace(largest=False), (), features)
    np.testing.assert_allclose(mean.scores(features[0]), [z[0].mean()], rtol=1e-4)
    for few, reason in (
        (features[:19], "20 benign images, there are 19"),
        (features * np.nan, "finite"),
    ):
        with pytest.raises(ValueError, match=reason):
            detectors.fit(kind, (), few)


def test_logistic_head_against_scipy():
    x = RNG.standard_normal((50, 3))
    y = np.arange(50) >= 35
    x[y] += [1.0, -2.0, 0.0]

    def loss(w):
        losses = np.logaddexp(0, np.where(y, -1, 1) * (x @ w[:3] + w[3]))
        heavy = np.where(y, 25 / y.sum(), 25 / (~y).sum())
        return (heavy * losses).sum() + (w[:3] ** 2).sum() / 2

    best = minimize(loss, np.zeros(4)).x[:3]
    np.testing.assert_allclose(detectors.logistic_weights(x, y), best, atol=2e-3)
    benign = RNG.standard_normal((80, 3)).astype(np.float32)
    taught = detectors.fit(detectors.lid(), (), benign, benign[:30] + np.float32([2, 0, 0]))
    assert taught.weights[0] > 5 * np.abs(taught.weights[1:]).max()
    scores = np.array([taught.scores(one)[0] for one in benign[1::2]])
    assert (scores > taught.threshold).mean() == 0.05  # of images that taught it nothing
    flat = detectors.fit(
        detectors.lid(), (), benign, benign[:9], logistic=lambda x, y: np.ones(x.shape[1])
    )
    np.testing.assert_array_equal(flat.weights, 1)


def test_area_under_the_curve_counts_pairs():
    a, b = RNG.integers(0, 6, (2, 30)).astype(float)
    pairs = [1.0 if q > p else 0.5 if q == p else 0.0 for p in a for q in b]
    assert metrics.roc_auc(a, b) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert metrics.roc_auc(np.ones(4), np.ones(5)) == 0.5


@pytest.mark.parametrize("name", detectors.DETECTORS)
def test_files_hold_whole_detectors(name, small, scenes, tmp_path):
    detector = fitted(detectors.DETECTORS[name](), small, scenes)
    record = Record(tree_fingerprint(small), np.arange(4), ("pgd",))
    detectors.save(path := tmp_path / "d.npz", detector, record)
    read, about = detectors.load(path)
    assert read.kind is detector.kind and about[::2] == record[::2]
    np.testing.assert_array_equal(about.seen, record.seen)
    assert tree_fingerprint(read) == tree_fingerprint(detector)
    np.testing.assert_array_equal(
        score_of(read, small, scenes[:4]), score_of(detector, small, scenes[:4])
    )
    detectors.check(read, about, small, (16, 16, 3))


def test_damaged_files_and_other_networks_are_refused(small, make_small, scenes, tmp_path):
    detector = fitted(detectors.lid(), small, scenes)
    record = Record(tree_fingerprint(small), np.arange(4))
    detectors.save(path := tmp_path / "d.npz", detector, record)
    arrays = read_arrays(path)
    damages = {
        "threshold": None,
        "about": np.array("{}"),
        "centre": np.full(2, np.nan),
        "reference/000": None,
        "spread": np.ones(2, np.float32),
        "seen": np.array("cat"),
    }
    for key, value in damages.items():
        changed = {name: array for name, array in arrays.items() if name != key}
        write_arrays(other := tmp_path / "e.npz", changed | ({} if value is None else {key: value}))
        with pytest.raises(ValueError, match=r"cannot read|does not fit"):
            detectors.check(*detectors.load(other), small, (16, 16, 3))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot read .*d\.npz"):
        detectors.load(path)
    with pytest.raises(ValueError, match="detector is of a network of"):
        detectors.check(detector, record, make_small(1), (16, 16, 3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: detectors.squeezing(bits=(8,)), r"bits = \(8,\) must be 1 to 7"),
        (lambda: detectors.squeezing(bits=(), medians=()), "must be 1 to 7"),
        (lambda: detectors.lid(k=1), "k = 1 must be 2 or more"),
        (lambda: detectors.agreement(interpreters=("cam",)), "two interpreters or more"),
        (lambda: detectors.discrepancy(interpreters=("mask",)), "not 'mask'"),
    ],
)
def test_options_out_of_range_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def brightness(model, image, reference):
    return image.mean()[None]


def watched(model, threshold):
    kind = Features("bright", brightness, made=bind(brightness))
    arrays = (jnp.float32([0]), jnp.float32([1]), None, jnp.float32(threshold), jnp.float32(0.1))
    return Guarded(model, detectors.Detector(kind, (), *arrays))


def test_a_step_adds_the_direction_of_the_detector(linear, pixels):
    """As long as that of the loss; and none below the threshold."""
    options = Options(WIDE)
    problem = Problem(pixels, jnp.asarray(2), jnp.zeros((1, 1)))
    numbers = Numbers(np.float32(0.01), np.float32(0), np.float32(0))
    state = descent.init(pixels, options)
    gradient = jax.grad(lambda p: descent.joint_loss(p, linear, problem, numbers, options)[0])
    own = np.asarray(gradient(state.params))
    total = own / np.linalg.norm(own) + np.full(own.shape, own.size**-0.5)
    assert (np.sign(total) != np.sign(own)).mean() > 0.1
    step = jax.jit(partial(descent.step, options=options))
    moved, _ = step(watched(linear, -1.0), problem, state, numbers)
    expected = np.asarray(pixels) - 0.01 * np.sign(total)
    np.testing.assert_allclose(pixels + moved.params, np.clip(expected, 0, 1), atol=1e-6)
    unseen, _ = step(watched(linear, 2.0), problem, state, numbers)
    blind, _ = step(linear, problem, state, numbers)
    np.testing.assert_array_equal(unseen.params, blind.params)


def test_the_best_iterate_evades_first():
    order = [(0.9, 0.3, -1.0), (0.9, 0.9, 0.0), (0.9, 0.1, 0.1), (0.9, 0.1, 9.0), (0.7, 0.0, -1.0)]
    values = [
        float(criterion(*(np.float32(x) for x in one[:2]), one[0] >= 0.8, np.float32(one[2])))
        for one in order
    ]
    assert values == sorted(values) and len(set(values)) == 5
    assert criterion(np.float32(0.9), np.float32(0.3), True) == np.float32(0.3)


@pytest.fixture(scope="module")
def under_attack(small, scenes):
    labels = explain(small, scenes[:8], np.zeros(8, int), interpreter="cam")[0].argmax(1)
    _, benign = explain(small, scenes[:8], labels, interpreter="cam")
    options = {"interpreter": "cam", "threat": threats.linf(0.2), "preset": "quick", "steps": 60}
    targets = (labels + 1) % 10
    return targets, benign, partial(attack, images=scenes[:8], targets=targets, **options)


@pytest.mark.parametrize(
    "kind",
    [detectors.squeezing(medians=(2, 3)), detectors.discrepancy()],
    ids=["squeezing", "maps"],
)
def test_an_attack_that_knows_the_detector_evades_it(kind, small, scenes, under_attack):
    targets, benign, attacked = under_attack
    detector = fitted(kind, small, scenes)
    # strict: more than the blind attack leaves
    blind = attacked(small, target_maps=benign)
    scores = score_of(detector, small, blind.images)
    detector = dataclasses.replace(detector, threshold=jnp.float32(np.quantile(scores, 0.25)))
    guarded = Guarded(small, detector)
    knowing = attacked(guarded, target_maps=benign)
    seen = score_of(detector, small, knowing.images) > detector.threshold
    assert (scores > detector.threshold).sum() == 6
    assert metrics.success(blind.logits, targets).all()
    evades = metrics.success(knowing.logits, targets) & ~seen
    assert evades.sum() >= 7
    again = attacked(guarded, target_maps=benign, restarts=2)
    evades_again = metrics.success(again.logits, targets) & (
        score_of(detector, small, again.images) <= detector.threshold
    )
    assert (evades_again >= evades).all()  # the best of two includes the first


def test_an_attack_evades_several_detectors_at_once(small, scenes, under_attack):
    targets, benign, attacked = under_attack
    alone = attacked(watched(small, 0.45), target_maps=benign)
    dark, simple = watched(small, 0.45).detector, fitted(detectors.squeezing(), small, scenes)
    scores = score_of(simple, small, alone.images)
    simple = dataclasses.replace(simple, threshold=jnp.float32(np.quantile(scores, 0.25)))
    both = detectors.Ensemble((dark, simple))
    image = jnp.asarray(scenes[0] / np.float32(255))
    apart = [one.excess(small, image) for one in both.members]
    np.testing.assert_array_equal(both.excess(small, image), np.concatenate(apart))
    found = attacked(Guarded(small, both), target_maps=benign)

    def evades(one, result):
        return score_of(one, small, result.images) <= one.threshold

    # what evades one is seen by the other
    assert evades(simple, alone).sum() == 2
    assert (evades(dark, found) & evades(simple, found)).sum() >= 6
    assert metrics.success(found.logits, targets).all()


def test_whatever_may_be_changed_evades(small, scenes, under_attack):
    """ε = 1: any image of the target class will do, and flat ones survive every squeezing."""
    targets, _, attacked = under_attack
    detector = fitted(detectors.squeezing(), small, scenes)
    guarded = Guarded(small, dataclasses.replace(detector, threshold=jnp.float32(0.05)))
    found = attacked(guarded, interpreter=None, threat=threats.linf(1.0), steps=100)
    assert metrics.success(found.logits, targets).all()
    assert (score_of(guarded.detector, small, found.images) <= 0.05).all()


def test_iterates_of_a_map_that_is_drawn_apart_are_judged_too(small, scenes, under_attack):
    targets, _, attacked = under_attack
    _, benign = explain(small, scenes[:8], targets, interpreter="smooth_grad")
    found = attacked(watched(small, 0.45), target_maps=benign, interpreter="smooth_grad", steps=60)
    hit = metrics.confidence(found.logits, targets) >= 0.8
    dark = found.images.mean((1, 2, 3)) <= 0.45 * 255
    assert hit.sum() >= 4 and dark[hit].all()
    assert (scenes[:8].mean((1, 2, 3)) > 0.45 * 255)[hit].any()


def test_work_is_counted_in_gradients_of_the_network_alone(small):
    plain = resolve("default", None, steps=10)
    guarded = Guarded(small, fitted_without_images(detectors.squeezing()))
    shape = (16, 16, 3)
    assert gradient_evaluations(small, plain, WIDE, shape) == 10
    # its own pass, and three in the detector: the image and two that are squeezed
    assert gradient_evaluations(guarded, plain, WIDE, shape) == pytest.approx(40, rel=0.05)


def fitted_without_images(kind):
    features = RNG.random((20, 2)).astype(np.float32)
    return detectors.fit(kind, (), features)


def test_what_a_threshold_would_not_survive_is_refused(small, scenes, under_attack):
    _, benign, attacked = under_attack
    guarded = Guarded(small, fitted_without_images(detectors.squeezing()))
    with pytest.raises(ValueError, match="rounds a detector's threshold"):
        attacked(guarded, target_maps=benign, precision="bfloat16")
