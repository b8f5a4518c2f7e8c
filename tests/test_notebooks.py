"""Notebooks are what their scripts say, and run from the first cell to the last, at a size that a test can wait for."""

import json
import re
import runpy
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from make_notebooks import FOLDER, REPOSITORY, SOURCES, notebook

import adv2_jax as adv2

STORED = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.ipynb")
}
RESULTS = ("outputs", "execution_count")  # of a cell that was run


@pytest.mark.parametrize("name", {**SOURCES, **STORED})
def test_a_notebook_is_what_its_script_says(name):
    stored, made = STORED[name], notebook(name)
    # lines in the file, one text in the making
    cells = [
        {key: value for key, value in cell.items() if key not in RESULTS}
        | {"source": "".join(cell["source"])}
        for cell in stored["cells"]
    ]
    wanted = [
        {key: value for key, value in cell.items() if key not in RESULTS} for cell in made["cells"]
    ]
    assert cells == wanted, f"`python tests/make_notebooks.py {name}` writes it anew"
    assert {**stored, "cells": []} == {**made, "cells": []}


@pytest.mark.parametrize("name", STORED)
def test_a_notebook_is_stored_as_it_ran(name):
    _, _, install, *cells = (cell for cell in STORED[name]["cells"])
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert install["execution_count"] is None and install["outputs"] == []
    # from top to bottom, in a fresh kernel
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert "stderr" not in {output.get("name") for output in outputs}
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000


@pytest.mark.parametrize("name", SOURCES)
def test_a_notebook_asks_one_question(name):
    cells = notebook(name)["cells"]
    title = cells[1]["source"]
    assert re.match(r"# \w", title) and title.count("?**") == 1
    assert f"github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb" in cells[0]["source"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """name -> the names of a notebook after its last cell, and what it printed."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    monkeypatch.setenv("ADV2_SMOKE", "1")
    monkeypatch.chdir(tmp_path)
    return lambda name: SimpleNamespace(
        **runpy.run_path(str(SOURCES[name])), printed=capsys.readouterr().out
    )


@pytest.mark.slow
def test_quick_start(run):
    ran = run("quick_start")
    assert (ran.success["PGD"], ran.success["ADV²"]) == (1, 1)
    assert ran.share < 0.2 and "\nYes, at 16/255 with cam: 100% of 2 images" in ran.printed
    # what may be chosen is there
    choices = re.findall(r"# @param (\[.*\])", SOURCES["quick_start"].read_text(encoding="utf-8"))
    names, maps, chosen = (set(json.loads(choice)) for choice in choices)
    assert names < set(adv2.interpreters.INTERPRETERS) and maps == {*adv2.data.targets.TARGET_MAPS}
    assert chosen == set(adv2.presets.PRESETS)


@pytest.mark.slow
def test_own_network(run):
    ran = run("own_network")
    assert ran.success == 1 and ran.distance < 0.05
    # the same network as the package's
    theirs = adv2.models.embedded()
    x = jnp.asarray(ran.images[0], jnp.float32) / 255
    features = theirs.features(x)
    # 20 layers of float32
    np.testing.assert_allclose(ran.model.features(x), features, atol=1e-4 * float(features.max()))
    np.testing.assert_allclose(
        ran.model.head(features), theirs.head(features), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_hessian(run):
    ran = run("hessian")
    # what its text says of one image
    values = np.asarray(ran.exact.values)
    assert (values < 1e-3).all() and (values < -1e-3).sum() == 8
    assert abs(ran.top.values[0]) > 2 * abs(values[0])
    assert {row["images"] for row in ran.laboratory.summary["rows"]} == {"benign", "pgd", "adv2"}
    assert "report: hessian-run/report.html" in ran.printed


@pytest.mark.slow
def test_interpreters_and_threats(run):
    ran = run("interpreters_and_threats")
    assert ran.by_threat.keys() == ran.THREATS.keys() and max(ran.shares.values()) < 0.5
    assert all(after < before for before, after in ran.by_threat.values())
    # each attack fools the interpreter it was made for, and the joint one fools all
    assert all(ran.transfer[name][k] == ran.table[name][1] for k, name in enumerate(ran.TOGETHER))
    assert ran.worst < 0.5 and ran.fooled == list(ran.INTERPRETERS)


@pytest.mark.slow
def test_rts(run):
    ran = run("rts")
    assert len(ran.losses) == 2 and ran.losses[1] < ran.losses[0]
    assert ran.success["rts"] == 1 and ran.share["rts"] < 0.5


@pytest.mark.slow
def test_detectors(run):
    ran = run("detectors")
    detector, rows, found = (of["squeezing"] for of in (ran.fitted, ran.table, ran.adaptive))
    # of some twenty images one may be above the threshold, which is the score of the next
    assert (ran.scores(detector, ran.others.images[1::2]) > 1e-3).sum() == 1
    assert rows["ADV²"]["AUC"] == 1 and rows["ADV²"]["detected"].all()
    assert not rows["noise"]["detected"].any()
    # the same threat, class and map, but unseen
    assert rows["adaptive"]["evades"].all() and not rows["adaptive"]["detected"].any()
    assert adv2.metrics.linf(found.images, ran.images).max() <= 16 / 255 + 1e-6
    for image in found.images:
        assert detector.score(ran.model, image / np.float32(255)) < detector.threshold
    assert "Yes, and no, here: squeezing sees ADV² best, on 100%" in ran.printed


@pytest.mark.slow
def test_many_images(run):
    ran = run("many_images")
    assert (ran.finished, ran.resumed, ran.same) == (0, 0, True)
    assert (np.sort(ran.distances["ADV²"]) < np.sort(ran.distances["PGD"])).all()
    assert "the resumed run has the same bytes as one" in ran.printed
    assert "here 1 of 6 parts" in ran.printed
