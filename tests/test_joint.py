"""One image against several interpreters: the step against plain NumPy, the attack, its run and page."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_crafting import CAM as ALONE
from test_descent import CAM, EPSILON, NUMBERS, plain_gradient

from adv2_jax import attack, cli, craft, crafting, descent, explain, losses, report, threats
from adv2_jax.attacks import gradient_evaluations
from adv2_jax.data import ImageSet
from adv2_jax.descent import Numbers, Options, Problem
from adv2_jax.files import read_summary
from adv2_jax.interpreters import cam_interpreter, grad_interpreter, joint, mask_interpreter
from adv2_jax.presets import constant, resolve, to_dict
from adv2_jax.runs.run import Settings, run
from adv2_jax.runs.schema import Results, read_results, row_name
from adv2_jax.runs.transfer import load_run, transfer_matrix

WIDE = threats.linf(0.1)
LABELS, TARGETS = np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7])


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


def test_three_steps_follow_the_sum_of_the_directions_of_each(linear, pixels):
    """Oracle: the loss of each in NumPy, its gradient by differences, its own λ and map loss."""
    maps = np.random.default_rng(6).random((2, 4, 4)).astype(np.float32)
    lam, threat = np.float32([0.7, 40.0]), threats.linf(EPSILON)
    parts = (Options(threat, CAM), Options(threat, CAM, map_loss=losses.map_mse, smoothing=0.2))
    options = Options(threat, momentum=0.6, yielding=0.3, parts=parts)
    problem = Problem(pixels, jnp.asarray(2), tuple(map(jnp.asarray, maps)))
    image = np.asarray(pixels, float)
    state = descent.init(pixels, options, memory=(None, None))
    delta, memory, weight = np.zeros(image.shape), np.zeros(image.shape), 1.0
    step = jax.jit(partial(descent.step, options=options))
    for _ in range(3):
        total = np.zeros(image.shape)
        for part, target_map, factor in zip(parts, maps, lam / NUMBERS.lam, strict=True):
            one = problem._replace(target_map=target_map)
            gradient = plain_gradient(linear, one, part, image + delta, weight * float(factor))
            total += gradient / np.sqrt((gradient**2).sum())
        memory = 0.6 * memory + total / np.sqrt((total**2).sum())
        assert np.abs(memory).min() > 1e-5  # no sign is left to rounding
        weight = min(1.0, weight * (1 - 0.3))  # the target is missed throughout
        delta = np.clip(delta - float(NUMBERS.alpha) * np.sign(memory), -EPSILON, EPSILON)
        delta = np.clip(image + delta, 0, 1) - image
        numbers = Numbers(NUMBERS.alpha, lam, np.float32([1e-3, 1e-3]))
        state, info = step(linear, problem, state, numbers)
        np.testing.assert_allclose(state.params, delta, atol=1e-6)  # float32 gradients times 0.02
        assert state.weight == pytest.approx(weight, rel=1e-6) and info.map_l1.shape == (2,)


def problems_of(model, images, preset):
    maps = explain(model, images[:4], LABELS, interpreter=joint(*preset.interpreters))[1]
    unit, targets = jnp.asarray(images[:4] / np.float32(255)), jnp.asarray(TARGETS, jnp.int32)
    return Problem(unit, targets, tuple(map(jnp.asarray, maps)), jnp.zeros((4, 2), jnp.uint32))


@pytest.mark.parametrize(
    "other",
    [grad_interpreter(), pytest.param(mask_interpreter(size=4, steps=3), marks=pytest.mark.slow)],
    ids=["grad", "mask"],
)
def test_one_program_finds_what_the_host_finds(small, images, other):
    """With MASK iterates are compared apart, by the explained maps of all, and its solver starts anew."""
    parts = (ALONE, replace(ALONE, interpreter=other))
    preset = replace(ALONE, interpreter=None, parts=parts, score_every=2)
    asked = problems_of(small, images, preset)
    fori, host = (
        craft(small, asked, preset, WIDE, driver=driver, pictured=1) for driver in ("fori", "host")
    )
    # one program rounds otherwise than a step at a time, and a sign may then fall the other way
    off = np.abs(
        np.subtract(*(crafting.images_of(asked.image, c.params, WIDE) for c in (fori, host)))
    )
    assert off.max() <= 4.1 / 255 and (off > 1e-6).mean() < 0.01
    np.testing.assert_allclose(fori.curves.map_l1, host.curves.map_l1, atol=1e-3)
    assert host.curves.map_l1.shape == (4, 8, 2) and (host.curves.map_l1[:, 2:] > 0).all()


def test_the_iterate_with_the_best_worst_map_is_returned(small, images):
    """Of the iterates that hit the target; long steps, so that the last is not the best."""
    both = joint("cam", "grad_cam")
    whole = replace(resolve("default", both, steps=40), step_size=constant(4 / 255))
    maps = explain(small, images[:4], LABELS, interpreter=both)[1]
    # whole levels: where x lies between two, float32 and float64 may round it to different ones
    options = {"interpreter": both, "threat": threats.linf(24 / 255)}
    found = attack(small, images[:4], TARGETS, maps, preset=whole, **options)
    f_t, l1 = found.curves.confidence, found.curves.map_l1.mean(-1)
    value = np.where(f_t >= 0.8, l1, 2 - f_t)
    best = value.argmin(1)
    off = np.mean([np.abs(m - t).mean((1, 2)) for m, t in zip(found.maps, maps, strict=True)], 0)
    hit = value.min(1) < 1
    assert hit.any() and best[hit].min() < 35
    np.testing.assert_allclose(off[hit], value.min(1)[hit], atol=1e-5)


def test_each_map_comes_nearer_than_under_pgd(small, images):
    both = joint("cam", "grad")
    maps = explain(small, images[:4], LABELS, interpreter=both)[1]
    found = attack(small, images[:4], TARGETS, maps, interpreter=both, threat=WIDE, steps=60)
    plain = attack(small, images[:4], TARGETS, interpreter=None, threat=WIDE, steps=60)
    hit = (found.logits.argmax(1) == TARGETS) & (plain.logits.argmax(1) == TARGETS)
    assert hit.sum() >= 2
    moved = explain(small, plain.images, TARGETS, interpreter=both)[1]
    for near, far, target_map in zip(found.maps, moved, maps, strict=True):
        off, far_off = (np.abs(m - target_map)[hit].mean() for m in (near, far))
        assert off < 0.7 * far_off  # random weights: GRAD stays at .55, CAM at .3
    # gradients of both in each step: one for CAM, two for GRAD
    preset = resolve("default", both, threat=WIDE, steps=60)
    cost = sum(
        gradient_evaluations(small, replace(part, steps=60), WIDE, (16, 16, 3))
        for part in preset.parts
    )
    assert found.gradient_evaluations == pytest.approx(cost, rel=0.02)


def test_what_it_takes_and_refuses(small, images):
    with pytest.raises(ValueError, match=r"two or more interpreters of different names, got cam"):
        joint("cam")
    with pytest.raises(ValueError, match=r"of different names, got grad, grad"):
        joint("grad", grad_interpreter())
    with pytest.raises(ValueError, match=r"interpreter 'cat' is not one of"):
        resolve("default", joint("cam", "cat"))
    for maps in (None, [np.zeros((4, 16, 16))]):
        with pytest.raises(ValueError, match=r"sequence of an array for each of cam, grad"):
            attack(small, images[:4], TARGETS, maps, interpreter=joint("cam", "grad"))
    with pytest.raises(ValueError, match=r"is not that of the preset"):
        attack(small, images[:4], TARGETS, preset=resolve("quick", joint("cam", "grad")))


@pytest.mark.parametrize("preset", ["default", "quick", "paper"])
def test_its_preset_is_made_of_those_of_its_interpreters(preset):
    both = resolve(preset, joint("grad", "cam"))
    alone = [resolve(preset, name) for name in ("grad", "cam")]
    assert both.parts == tuple(alone) and both.interpreters == tuple(
        one.interpreter for one in alone
    )
    assert both.steps == 1.5 * max(one.steps for one in alone)
    assert resolve(both, joint("grad", "cam")) == both
    assert to_dict(both)["parts"] == [to_dict(one) for one in alone]
    json.dumps(to_dict(both), allow_nan=False)


@pytest.fixture(scope="module")
def finished(small, images, tmp_path_factory):
    directory = tmp_path_factory.mktemp("joint")
    settings = Settings(("cam", "grad"), WIDE, steps=10, batch_size=3, snapshots=2, joint=True)
    outcome = run(small, ImageSet(images[:5]), settings, directory)
    return directory, outcome


def test_a_run_has_a_row_of_it_for_each_interpreter(finished):
    directory, outcome = finished
    names = [(row["interpreter"], row_name(row)) for row in outcome.rows]
    kinds = ("noise", "PGD", "ADV²", "ADV², joint")
    assert names == [(one, kind) for one in ("cam", "grad") for kind in kinds]
    results = Results(read_results(directory))
    first, second = (results.attacked(one, "joint") for one in ("cam", "grad"))
    np.testing.assert_array_equal(first.images, second.images)
    for row in outcome.rows[3::4]:
        attacked = results.attacked(row["interpreter"], "joint")
        target_maps = results.aim(row["interpreter"]).target_maps
        l1 = np.abs(attacked.maps - target_maps).mean((1, 2))
        assert row["attack"] == "adv2" and row["joint"] is True
        assert row["map_l1"] == pytest.approx(l1.mean(), rel=1e-5)
        assert [len(part) for part in (row["preset"]["parts"], attacked.snapshot_images)] == [2, 2]
        # the curve of an interpreter ends near where the attack does
        assert attacked.curve_map_l1.shape == (5, 10)
        assert (attacked.curve_map_l1.min(1) <= l1 + 0.02).all()
    # plain PGD has the work of the most expensive attack beside it
    joint_row, plain = outcome.rows[3], outcome.rows[1]
    # a step of plain PGD is the unit: at most half of one is left
    assert plain["gradient_evaluations"] == pytest.approx(
        joint_row["gradient_evaluations"], abs=0.5
    )
    prices = [row for row in outcome.paired if row.get("joint")]
    assert [(row["interpreter"], row["measure"]) for row in prices] == [
        (one, measure) for one in ("cam", "grad") for measure in ("map_l1", "map_iou75")
    ]
    own, together = outcome.rows[2], outcome.rows[3]
    assert prices[0]["difference"] == pytest.approx(together["map_l1"] - own["map_l1"], abs=1e-6)


def test_transfer_has_a_row_of_it(finished, small):
    directory, outcome = finished
    loaded = load_run(directory)
    assert [one.name for one in loaded.interpreters.values()] == ["cam", "grad"]
    matrix = transfer_matrix(loaded, small)
    assert matrix["sources"] == ["benign", "noise", "pgd", "cam", "grad", "joint"]
    rows = [row["map_l1"] for row in outcome.rows if row.get("joint")]
    np.testing.assert_allclose(matrix["map_l1"][-1], rows, rtol=1e-5)


def test_its_page_shows_one_image_above_all_maps(finished):
    directory, _ = finished
    page = report.write(directory).read_text()
    section = page[page.index('<h2 id="joint">') : page.index('<h2 id="maps-cam">')]
    assert section.count('<article class="card"') == 5 and section.count("ADV², joint") >= 5
    # image and two maps over it in grey, benign and attacked
    assert section.count("<img ") == 5 * 2 * (1 + 2 * 2)
    assert "joint − alone" in page and 'href="#joint"' in page
    assert 'data-attack="joint"' not in page[page.index('<h2 id="maps-cam">') :].split("</main>")[0]


def test_an_interpreter_may_not_be_called_like_an_attack(small, images, tmp_path):
    mine = cam_interpreter()._replace(name="joint")
    with pytest.raises(ValueError, match=r"interpreter 'joint' needs another name"):
        run(small, ImageSet(images[:2]), Settings((mine,), WIDE, steps=1), tmp_path)


def test_the_command_takes_it(tmp_path, capsys):
    words = f"attack --images shapes:4 --limit 2 --steps 2 --snapshots 0 --joint --out {tmp_path}/a"
    assert cli.main([*words.split(), "--interpreter", "cam", "grad_cam"]) == 0
    capsys.readouterr()
    rows = read_summary(tmp_path / "a")["rows"]
    assert [row.get("joint", False) for row in rows] == 2 * [False, False, False, True]
    other = words.replace("/a", "/b").split()
    assert cli.main([*other, "--interpreter", "cam"]) == 2
    assert "joint takes two or more interpreters" in capsys.readouterr().err
    assert not (tmp_path / "b" / "summary.json").exists()
