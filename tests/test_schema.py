"""The one owner of measures and of the names of arrays."""

import json

import numpy as np
import pytest
from test_run import QUICK, Mean, coloured

from adv2_jax import report
from adv2_jax.files import read_arrays, read_summary, write_arrays
from adv2_jax.runs import schema
from adv2_jax.runs.run import run
from adv2_jax.runs.schema import Aim, Attacked, Images, Measure, Results, Stored
from adv2_jax.runs.tables import after_a_run


def changed_pixels(images, benign):
    return (images != benign).any(-1).mean((1, 2))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """A run of a schema with one measure more."""
    folder = tmp_path_factory.mktemp("run")
    added = Measure("changed", "Changed pixels", changed_pixels, ("images", "benign"), decimals=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "MEASURES", (*schema.MEASURES, added))
        outcome = run(Mean(), coloured([0, 1, 2], [0, 1, 2]), QUICK, folder, publish=report.write)
        yield folder, after_a_run(outcome.rows)


def test_a_measure_is_one_row(more):
    folder, sheet = more
    arrays = read_arrays(folder / "results.npz")
    page = (folder / "report.html").read_text(encoding="utf-8")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row, line in zip(read_summary(folder)["rows"], sheet.lines, strict=True):
        each = changed_pixels(arrays[f"cam/{row['attack']}/images"], arrays["images"])
        assert each.mean() > 0 and row["changed"] == pytest.approx(each.mean())
        low, high = row["ci"]["changed"]
        assert low <= row["changed"] <= high
        shown = f"{each.mean():.5f}"
        assert line[sheet.headings.index("Changed pixels")] == shown and shown in page
        of_batches = [one["changed"] for one in log if one["attack"] == row["attack"]]
        # six digits; batches of two images and of one
        np.testing.assert_allclose(of_batches, [each[:2].mean(), each[2]], atol=1e-6)
    assert page.count("Changed pixels") == 1


def test_every_array_of_a_run_has_its_entry(more):
    arrays = read_arrays(more[0] / "results.npz")
    names = {entry.name for entry in Images.entries()}
    names |= {f"cam/{entry.name}" for entry in Aim.entries()}
    names |= {f"cam/{kind}/{entry.name}" for kind in schema.KINDS for entry in Attacked.entries()}
    assert names >= arrays.keys()
    results = Results(arrays)
    np.testing.assert_array_equal(results.attacked("cam", "adv2").maps, arrays["cam/adv2/maps"])
    np.testing.assert_array_equal(results.aim("cam").target_maps, arrays["cam/target_maps"])
    assert results.names is None and results.attacks("cam") == ["pgd", "adv2"]
    assert results.attacked("cam", "pgd").flow is None and not results.explained("grad")


def test_arrays_are_read_when_they_are_asked_for(tmp_path):
    write_arrays(tmp_path / "a.npz", {"images": np.arange(3), "labels": np.ones(2)})
    stored = Stored(tmp_path / "a.npz")
    assert dict(stored).keys() == {"images", "labels"} and len(stored) == 2
    assert Results(stored).images.tolist() == [0, 1, 2] and Results(stored).masks is None
    with pytest.raises(KeyError, match="targets"):
        _ = Results(stored).targets
    (tmp_path / "a.npz").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*a\.npz"):
        _ = Results(stored).images


def test_arrays_without_a_place_are_not_written():
    assert Aim.named("cam/", benign_maps=1, target_maps=None) == {"cam/benign_maps": 1}
    with pytest.raises(AssertionError, match="'map'"):
        Aim.named(map=np.zeros(3))


def test_keys_are_distinct():
    columns = (
        *schema.COUNTS,
        *schema.MEASURES,
        *schema.CURVATURE,
        *schema.DETECTION,
        *schema.COSTS,
    )
    assert len(schema.columns()) == len(columns)
    entries = set(schema.Evaluated._fields)
    assert all(entries.issuperset(one.of) for one in schema.MEASURES)
