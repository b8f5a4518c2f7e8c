"""What the adversary wants of the class, and several attacks on one image: against what they replace."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_descent import CAM, EPSILON, NUMBERS
from test_run import Mean, coloured

from adv2_jax import attack, cli, descent, explain, losses, metrics, report, threats
from adv2_jax.attacks import gradient_evaluations
from adv2_jax.data import ImageSet
from adv2_jax.descent import Options, Problem
from adv2_jax.interpreters import joint, mask_interpreter
from adv2_jax.presets import from_dict, resolve
from adv2_jax.runs.run import Settings, run
from adv2_jax.runs.schema import Results, read_results
from adv2_jax.runs.transfer import load_run, transfer_matrix, transfer_to

WIDE = threats.linf(0.1)
LABELS = np.array([0, 1, 2, 3])


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def labels(small, images):
    """What the network says of four images."""
    return explain(small, images[:4], LABELS, interpreter="cam")[0].argmax(1)


@pytest.fixture(scope="module")
def image_set(images):
    return ImageSet(images[:5])  # without labels: the network is right about all


def test_the_strongest_other_class_is_that_of_a_loop():
    logits = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 5, 20)
    expected = [
        max((k for k in range(5) if k != label), key=z.__getitem__)
        for z, label in zip(logits, labels, strict=True)
    ]
    assert metrics.strongest_other(logits, labels).tolist() == expected
    assert jax.vmap(losses.strongest_other)(logits, labels).tolist() == expected
    assert not (metrics.success(logits, expected) & metrics.success(logits, labels)).any()


@pytest.mark.parametrize("surrogate", [None, CAM], ids=["pgd", "cam"])
def test_an_untargeted_step_is_a_targeted_one_at_the_strongest_other_class(
    linear, pixels, surrogate
):
    target_map = np.random.default_rng(5).random((4, 4)).astype(np.float32)
    free = Options(threats.linf(EPSILON), surrogate, goal="untargeted", momentum=0.6)
    logits = linear.head(linear.features(pixels))
    problem = Problem(pixels, logits.argmax(), jnp.asarray(target_map))
    steps = {
        one: jax.jit(partial(descent.step, options=one))
        for one in (free, free._replace(goal="targeted"))
    }
    state, wanted, seen = descent.init(pixels, free), descent.init(pixels, free), set()
    for _ in range(6):
        x = np.asarray(pixels + wanted.params)
        other = metrics.strongest_other(
            linear.head(linear.features(x))[None], problem.target[None]
        )[0]
        seen.add(int(other))
        aimed = problem._replace(target=jnp.int32(other))
        state, _ = steps[free](linear, problem, state, NUMBERS)
        wanted, _ = steps[free._replace(goal="targeted")](linear, aimed, wanted, NUMBERS)
        np.testing.assert_array_equal(state.params, wanted.params)
    assert int(problem.target) not in seen


@pytest.mark.parametrize("interpreter", ["cam", "joint", "mask"])
def test_untargeted_images_are_explained_for_the_class_they_are_taken_for(
    small, images, labels, interpreter
):
    one = {"cam": "cam", "joint": joint("cam", "grad"), "mask": mask_interpreter(size=4, steps=3)}[
        interpreter
    ]
    maps = explain(small, images[:4], labels, interpreter=one)[1]
    steps = {"cam": 30, "joint": 80, "mask": 6}[interpreter]
    found = attack(
        small,
        images[:4],
        labels,
        maps,
        interpreter=one,
        threat=WIDE,
        goal="untargeted",
        steps=steps,
    )
    classes = metrics.strongest_other(found.logits, labels)
    left = found.logits.argmax(1) != labels
    assert (left == metrics.success(found.logits, classes)).all() and left.any()
    _, expected = explain(small, found.images, classes, interpreter=one)
    for m, wanted in zip(jax.tree.leaves(found.maps), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(m, wanted, atol=1e-5)


def test_it_costs_a_forward_pass_more_and_plain_pgd_nothing(small):
    shape = (16, 16, 3)
    # a gradient is a forward and a backward pass of the same work
    for name, factor in (("cam", 1.5), (None, 1.0)):
        cost = [
            gradient_evaluations(small, resolve("default", name, steps=30, goal=goal), WIDE, shape)
            for goal in ("targeted", "untargeted")
        ]
        assert cost[0] == pytest.approx(30, rel=0.02)
        assert cost[1] / cost[0] == pytest.approx(factor, rel=0.02)


def value(result, targets, maps):
    """The criterion, from the returned images."""
    f_t = metrics.confidence(result.logits, targets)
    return (
        2 - f_t
        if maps is None
        else np.where(f_t >= 0.8, metrics.map_l1(result.maps, maps), 2 - f_t)
    )


@pytest.mark.parametrize("name", ["cam", None])
def test_the_best_of_several_attacks_is_returned(small, images, name):
    targets = np.array([4, 5, 6, 7])
    maps = None if name is None else explain(small, images[:4], LABELS, interpreter=name)[1]
    run_once = partial(
        attack, small, images[:4], targets, maps, interpreter=name, threat=WIDE, steps=8
    )
    calls = []
    one, many = (run_once(restarts=n, snapshots=2, on_step=calls.append) for n in (1, 4))
    first, best = (value(result, targets, maps) for result in (one, many))
    # the first of several is the attack without restarts, and some image gains by others
    assert (best <= first).all() and (best < first).any()
    same = best == first
    np.testing.assert_array_equal(many.images[same], one.images[same])
    change = many.images.astype(int) - images[:4]
    assert np.abs(change).max() <= 25 and sum(calls) == 8 + 4 * 8
    np.testing.assert_array_equal(many.snapshots[:, -1], many.images[:2])
    assert many.gradient_evaluations == pytest.approx(4 * one.gradient_evaluations, abs=0.2)
    # what is drawn depends on the image alone
    halves = run_once(restarts=4, batch_size=2)
    assert (np.abs(halves.images.astype(int) - many.images) > 0).mean() < 0.02


def test_what_they_take_and_refuse(small, images, tmp_path, image_set):
    still = threats.linf()._replace(noise=None)
    with pytest.raises(ValueError, match=r"restarts = 2 start from noise, and .* 'linf' has none"):
        attack(small, images[:4], LABELS, interpreter=None, threat=still, restarts=2)
    with pytest.raises(ValueError, match=r"restarts = 0 must be a whole number, 1 or more"):
        attack(small, images[:4], LABELS, interpreter=None, restarts=0)
    with pytest.raises(ValueError, match=r"goal 'all' is not one of targeted, untargeted, keep"):
        resolve("default", "cam", goal="all")
    with pytest.raises(ValueError, match=r"cam: goal = \"none\""):
        from_dict("cam", {"goal": "none"})
    with pytest.raises(ValueError, match=r"cam: restarts = 0: must be 1 or more"):
        from_dict("cam", {"restarts": 0})
    settings = Settings(("cam",), WIDE, steps=1, goal="keep")
    with pytest.raises(ValueError, match=r"asks for the image as it is: take image or patch"):
        run(small, image_set, settings, tmp_path)


def test_every_part_of_a_joint_preset_has_the_goal():
    both = resolve("default", joint("cam", "grad"), goal="untargeted", restarts=3)
    assert {part.goal for part in both.parts} == {both.goal} == {"untargeted"}
    assert both.restarts == 3


@pytest.fixture(scope="module")
def untargeted(small, image_set, tmp_path_factory):
    directory = tmp_path_factory.mktemp("untargeted")
    settings = Settings(
        ("cam", "grad"), WIDE, steps=12, batch_size=3, snapshots=2, goal="untargeted", restarts=2
    )
    return directory, run(small, image_set, settings, directory)


def test_rows_of_an_untargeted_run_count_what_leaves_its_class(untargeted, small):
    directory, outcome = untargeted
    results = Results(read_results(directory))
    np.testing.assert_array_equal(results.targets, results.labels)
    for row in outcome.rows:
        attacked = results.attacked(row["interpreter"], row["attack"])
        logits, _ = explain(small, attacked.images, results.labels, interpreter="cam")
        left = logits.argmax(1) != results.labels
        np.testing.assert_array_equal(attacked.success, left)
        assert row["asr"] == pytest.approx(left.mean())
        np.testing.assert_array_equal(
            attacked.classes, metrics.strongest_other(logits, results.labels)
        )
    plain, own = outcome.rows[1], outcome.rows[2]
    assert plain["gradient_evaluations"] == pytest.approx(own["gradient_evaluations"], abs=1.1)
    assert plain["preset"]["restarts"] == own["preset"]["restarts"] == 2
    assert plain["asr"] == 1  # of PGD, at this radius


def test_its_transfer_and_page_speak_of_the_classes_that_were_reached(
    untargeted, small, make_small
):
    directory, outcome = untargeted
    loaded = load_run(directory)
    matrix = transfer_matrix(loaded, small)
    own = [row["map_l1"] for row in outcome.rows if row["attack"] == "adv2"]
    np.testing.assert_allclose([matrix["map_l1"][3][0], matrix["map_l1"][4][1]], own, rtol=1e-5)
    rows = transfer_to(loaded, small, "itself", interpreters=["cam"])
    shares = {row["source"]: row["asr"] for row in rows}
    assert shares["benign"] == 0 and shares["cam"] == outcome.rows[2]["asr"]
    page = report.write(directory).read_text()
    assert "→" not in page[page.index('<h2 id="maps-cam">') :].split("Reproduce")[0]


def test_keep_moves_the_map_alone(small, image_set, tmp_path):
    settings = Settings(("cam",), WIDE, steps=40, goal="keep", target_map="patch")
    noise, plain, own = run(small, image_set, settings, tmp_path).rows
    assert own["asr"] == plain["asr"] == 1
    assert own["map_l1"] < 0.6 * plain["map_l1"] and own["map_l1"] < 0.6 * noise["map_l1"]
    results = Results(read_results(tmp_path))
    np.testing.assert_array_equal(results.targets, results.labels)


def test_keep_with_maps_of_other_images_takes_images_of_other_classes(tmp_path):
    settings = Settings(("cam",), WIDE, steps=1, goal="keep", target_map="image")
    objects = coloured([0, 1, 2], [0, 1, 2])
    moved = [np.roll(image, i, axis=1) for i, image in enumerate(objects.images)]
    run(Mean(), objects._replace(images=np.stack(moved)), settings, tmp_path)
    results = Results(read_results(tmp_path))
    aim = results.aim("cam")
    # the object is elsewhere in each: a target map is that of another image
    assert (np.abs(aim.target_maps - aim.benign_maps).mean((1, 2)) > 0).all()
    np.testing.assert_array_equal(results.targets, results.labels)


def test_the_command_takes_both_and_refuses_in_one_line(tmp_path, capsys):
    words = f"attack --images shapes:4 --limit 2 --steps 2 --snapshots 0 --interpreter cam --out {tmp_path}/a"
    assert cli.main([*words.split(), "--goal", "untargeted", "--restarts", "2"]) == 0
    capsys.readouterr()
    assert cli.main([*words.replace("/a", "/b").split(), "--goal", "keep"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "b" / "summary.json").exists()
