"""What a run keeps, and in which files: the same arrays, whatever their form."""

import numpy as np
import pytest
from test_run import QUICK, Mean, varied

from adv2_jax import cli, report
from adv2_jax.files import read_arrays, read_summary
from adv2_jax.runs.curvature import of_run
from adv2_jax.runs.run import run
from adv2_jax.runs.transfer import load_run, transfer_matrix, transfer_to


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    run(Mean(), varied(), QUICK, directory, config={"seed": 0}, publish=report.write)
    return directory


# --keep


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    directory = tmp_path_factory.mktemp("few")
    settings = QUICK._replace(keep="adversarial")
    run(Mean(), varied(), settings, directory, config={"keep": settings.keep}, publish=report.write)
    return directory


def test_adversarial_images_alone_are_those_of_a_run_that_keeps_everything(whole, few):
    everything, kept = (read_arrays(folder / "results.npz") for folder in (whole, few))
    assert {"images", "labels", "targets", "indices", "masks"} < kept.keys() < everything.keys()
    assert {name for name in kept if "/" in name} == {
        f"cam/{attack}/{name}"
        for attack in ("pgd", "adv2")
        for name in ("images", "confidence", "success", "map_l1", "map_iou75")
    }
    for name, values in kept.items():
        np.testing.assert_array_equal(values, everything[name], err_msg=name)
    rows, expected = (read_summary(folder)["rows"] for folder in (few, whole))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]


def test_a_run_without_maps_is_reported_studied_and_shown_to_others_and_says_what_it_lacks(
    whole, few
):
    page = (few / "report.html").read_text(encoding="utf-8")
    assert "none: --keep adversarial keeps no maps" in page and 'class="card"' not in page
    assert 'class="card"' in (whole / "report.html").read_text(encoding="utf-8")
    complete, finished = load_run(whole), load_run(few)
    for sample, expected in zip(
        of_run(finished, "cam").samples, of_run(complete, "cam").samples, strict=True
    ):
        np.testing.assert_array_equal(sample.images, expected.images)
    others = [transfer_to(one, Mean(), "it", interpreters=["cam"]) for one in (finished, complete)]
    assert others[0] == others[1] and len(others[0]) == 3
    with pytest.raises(
        ValueError,
        match=rf"^{few} holds no maps to compare with: it was made with --keep adversarial$",
    ):
        transfer_matrix(finished, Mean())


def test_keep_is_an_option_of_adv2_attack(tmp_path):
    command = ["attack", "--images", "shapes:3", "--limit", "1", "--steps", "0", "--warm-steps"]
    command += ["1", "--interpreter", "cam", "--keep", "adversarial", "--out", str(tmp_path)]
    assert cli.main([*command, "--quiet"]) == 0
    assert read_summary(tmp_path)["config"]["keep"] == "adversarial"
    assert "cam/adv2/maps" not in read_arrays(tmp_path / "results.npz")
