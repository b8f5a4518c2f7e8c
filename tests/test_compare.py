"""Networks side by side: what may differ between their runs, and the numbers of each."""

import json

import numpy as np
import pytest
from test_doubts import IMAGES, LABELS, Colours
from test_report import Page

from adv2_jax import report, threats
from adv2_jax.cli import main
from adv2_jax.data import ImageSet
from adv2_jax.files import read_summary
from adv2_jax.runs.compare import compare
from adv2_jax.runs.run import Settings, run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folders of runs of three networks, the second of which sees half as much."""
    folder = tmp_path_factory.mktemp("runs")
    # the last image is red to some networks only
    odd = np.full((1, 4, 4, 3), 100, np.uint8)
    odd[:, 0, 0, 2] = 255
    images = ImageSet(np.concatenate([IMAGES, odd]), np.append(LABELS, 0).astype(np.int32))
    settings = Settings(("cam",), threats.linf(0.1), steps=3, batch_size=2)
    config = {"interpreter": ["cam"], "epsilon": 0.1, "steps": 3, "model": "colours"}
    for name, scale, epsilon in (("strong", 10.0, 0.1), ("weak", 1.0, 0.1), ("other", 1.0, 0.2)):
        (folder / name).mkdir()
        asked = settings._replace(threat=threats.linf(epsilon))
        run(Colours(scale), images, asked, folder / name, config=config | {"epsilon": epsilon})
    return folder


def test_rows_are_those_of_the_runs(runs):
    both = compare([runs / "strong", runs / "weak"])
    assert [(row["model"], row["images"], row["accuracy"]) for row in both["networks"]] == [
        ("strong", 3, 2 / 3),
        ("weak", 3, 2 / 3),
    ]
    # Wilson's interval of two of three, z = 1.96: (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n)
    assert both["networks"][0]["ci"]["accuracy"] == pytest.approx([0.2077, 0.9385], abs=1e-4)
    for name in ("strong", "weak"):
        rows = [row | {"model": name} for row in read_summary(runs / name)["rows"]]
        assert [row for row in both["rows"] if row["model"] == name] == rows


def test_runs_of_other_attacks_and_what_is_no_run_are_refused(runs, tmp_path):
    # of another goal, or of two numbers
    for change, words in (({"goal": "keep"}, "goal"), ({"steps": 4}, "epsilon was .*; steps")):
        summary = json.loads((runs / "other" / "summary.json").read_text(encoding="utf-8"))
        summary["config"] |= change
        (tmp_path / "changed").mkdir(exist_ok=True)
        (tmp_path / "changed" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        with pytest.raises(
            ValueError, match=rf"^.*changed is a run of another attack than .*strong: {words}"
        ):
            compare([runs / "strong", runs / "weak", tmp_path / "changed"])
    with pytest.raises(ValueError, match="two finished runs or more"):
        compare([runs / "strong"])
    with pytest.raises(ValueError, match="holds no finished run"):
        compare([runs / "strong", tmp_path])
    other = ImageSet(IMAGES[::-1].copy(), LABELS[::-1].astype(np.int32))
    config = {"interpreter": ["cam"], "epsilon": 0.1, "steps": 3, "model": "colours"}
    settings = Settings(("cam",), threats.linf(0.1), steps=3, batch_size=2)
    run(Colours(10.0), other, settings, tmp_path, config=config)
    with pytest.raises(
        ValueError,
        match=r"^.* is a run of another attack than .*: image set was 147 numbers .*, is 98 numbers",
    ):
        compare([runs / "strong", tmp_path])


def test_runs_of_one_network_may_differ_in_one_number(runs, tmp_path, capsys):
    folders = [str(runs / name) for name in ("other", "weak")]
    assert main(["compare", *folders, "--out", str(tmp_path / "sweep")]) == 0
    summary = read_summary(tmp_path / "sweep")
    assert summary["setting"] == "epsilon"
    assert [(row["model"], row["epsilon"]) for row in summary["networks"]] == [
        ("other", 0.2),
        ("weak", 0.1),
    ]
    page = Page((tmp_path / "sweep" / "report.html").read_text(encoding="utf-8"))
    charts = page.inside("desc")
    # of map L1 and of success, from the smaller to the larger
    assert len(charts) == 2 and all(one.endswith("over epsilon 0.1 to 0.2.") for one in charts)
    of = {row["model"]: row for row in summary["rows"] if row["attack"] == "adv2"}
    ends = [of[name]["map_l1"] for name in ("weak", "other")]
    assert f"ADV² from {ends[0]:.3g} to {ends[1]:.3g}" in charts[0]
    assert "Attacks compared" in (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")


def test_equal_names_are_told_apart_by_their_folders(runs, tmp_path):
    (tmp_path / "strong").symlink_to(runs / "weak")
    # a link is what it points to
    names = [row["model"] for row in compare([runs / "strong", tmp_path / "strong"])["networks"]]
    assert names == ["strong", "weak"]
    (tmp_path / "a").mkdir()
    again = tmp_path / "a" / "strong"
    again.mkdir()
    (again / "summary.json").write_bytes((runs / "strong" / "summary.json").read_bytes())
    names = [row["model"] for row in compare([runs / "strong", again])["networks"]]
    assert names == [str(runs / "strong"), str(again)]


def test_the_command_writes_a_table_and_a_page_with_a_picture(runs, tmp_path, capsys):
    out = tmp_path / "compared"
    command = ["compare", str(runs / "strong"), str(runs / "weak"), "--out", str(out)]
    assert main(command) == 0
    assert "strong" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "summary.json",
        "table.md",
    ]
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2].startswith("| network | accuracy | interpreter | attack | n | ASR | Map L1")
    assert len(table) == 4 + 2 * 3 and "| strong | 0.667 | cam | noise | 2 |" in table[4]
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    rows = read_summary(out)["rows"]
    first = next(row for row in rows if row["attack"] == "pgd" and row["model"] == "strong")
    (said,) = page.inside("desc")
    assert f"PGD from {first['map_l1']:.3g} to " in said and said.endswith(
        "over accuracy 0.6 to 0.8."
    )
    assert main(command) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "new"), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_curvature_that_was_measured_stands_beside(runs, tmp_path):
    for name in ("strong", "weak"):
        (tmp_path / name).mkdir()
        summary = json.loads((runs / name / "summary.json").read_text(encoding="utf-8"))
        (tmp_path / name / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    benign = {"images": "benign", "n": 2, "normalised": 3.25, "ci": {"normalised": [3.0, 3.5]}}
    measured = {"schema": summary["schema"], "rows": [{"images": "pgd"}, benign]}
    (tmp_path / "weak" / "curvature.json").write_text(json.dumps(measured), encoding="utf-8")
    both = compare([tmp_path / "strong", tmp_path / "weak"])
    assert [row.get("curvature") for row in both["networks"]] == [None, benign]
    (tmp_path / "summary.json").write_text(
        json.dumps({"schema": summary["schema"], "config": {}, **both}), encoding="utf-8"
    )
    page = report.write_comparison(tmp_path).read_text(encoding="utf-8")
    assert "3.25<small>3 – 3.5</small>" in page
