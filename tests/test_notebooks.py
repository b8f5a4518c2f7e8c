"""Notebooks as scripts run from the first cell to the last, at a size that a test can wait for."""

import runpy
from pathlib import Path

import numpy as np
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.slow
def test_the_hessian_of_a_grad_attack(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADV2_SMOKE", "1")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(NOTEBOOKS / "hessian.py"))
    # what its text says of one image
    values = np.asarray(names["exact"].values)
    assert (values < 1e-3).all() and (values < -1e-3).sum() == 8
    assert abs(names["top"].values[0]) > 2 * abs(values[0])
    assert {row["images"] for row in names["laboratory"].summary["rows"]} == {
        "benign",
        "pgd",
        "adv2",
    }
    assert "report: hessian-run/report.html" in capsys.readouterr().out
