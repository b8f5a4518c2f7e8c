"""What a run keeps, and in which files: the same arrays, whatever their form."""

import json

import numpy as np
import pytest
from test_run import QUICK, Mean, full_disk, varied

from adv2_jax import cli, report
from adv2_jax.files import read_arrays, read_summary
from adv2_jax.runs import store
from adv2_jax.runs.curvature import of_run
from adv2_jax.runs.run import run
from adv2_jax.runs.schema import Results, Stored, read_results, results_path
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
        for attack in ("noise", "pgd", "adv2")
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
    assert others[0] == others[1] and len(others[0]) == 4
    with pytest.raises(
        ValueError,
        match=rf"^{few} holds no maps to compare with: it was made with --keep adversarial$",
    ):
        transfer_matrix(finished, Mean())


def test_keep_is_an_option_of_adv2_attack(brightness, tmp_path):
    command = ["attack", *brightness, "--limit", "1", "--steps", "0", "--warm-steps", "1"]
    command += ["--interpreter", "cam", "--keep", "adversarial", "--out", str(tmp_path)]
    assert cli.main([*command, "--quiet"]) == 0
    assert read_summary(tmp_path)["config"]["keep"] == "adversarial"
    assert "cam/adv2/maps" not in read_arrays(tmp_path / "results.npz")


# --results

SHARDED = QUICK._replace(results="shards")


@pytest.fixture
def three(monkeypatch):
    """Shards of three images, in no step with batches of two."""
    monkeypatch.setattr(store, "SHARD", 3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def sharded(tmp_path, three):
    run(Mean(), varied(), SHARDED, tmp_path, config={"seed": 0}, publish=report.write)
    return tmp_path


def test_shards_hold_the_arrays_of_one_file(whole, sharded):
    assert sorted(path.name for path in sharded.iterdir()) == [
        "log.jsonl",
        "report.html",
        "results",
        "summary.json",
    ]
    index = json.loads((sharded / "results" / "index.json").read_text())
    assert index["shards"] == [
        {"file": f"0000{i}.npz", "images": n} for i, n in enumerate((3, 3, 1))
    ]
    expected, joined = read_arrays(whole / "results.npz"), read_results(sharded)
    assert joined.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(joined[name], values, err_msg=name)
        assert joined[name].dtype == values.dtype
    # pictures of the first images and numbers of all, as from one file
    for pictures in (2, 3, 5, 64):
        few = read_results(sharded, pictures=pictures)
        for name, values in read_arrays(whole / "results.npz", pictures=pictures).items():
            np.testing.assert_array_equal(few[name], values, err_msg=name)
    # a shard is an .npz like another
    second = read_arrays(sharded / "results" / "00001.npz")
    np.testing.assert_array_equal(second["images"], expected["images"][3:6])
    np.testing.assert_array_equal(second["cam/adv2/maps"], expected["cam/adv2/maps"][3:6])


def test_snapshots_of_the_first_images_alone(tmp_path, three):
    settings = QUICK._replace(snapshots=2)
    for form in ("npz", "shards"):
        (tmp_path / form).mkdir()
        run(Mean(), varied(), settings._replace(results=form), tmp_path / form)
    expected, joined = (read_results(tmp_path / form) for form in ("npz", "shards"))
    assert len(expected["cam/adv2/snapshot_images"]) == 2 and joined.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(joined[name], values, err_msg=name)
    assert "cam/adv2/snapshot_images" not in read_arrays(
        tmp_path / "shards" / "results" / "00001.npz"
    )


def test_shards_have_the_same_bytes_whatever_the_batches_and_interrupts(tmp_path, sharded):
    other = tmp_path / "other"
    other.mkdir()
    settings = SHARDED._replace(batch_size=3)

    def interrupt(images, steps, done):
        def tick(new):
            raise KeyboardInterrupt

        return tick if done == 0 else lambda new: None

    with pytest.raises(KeyboardInterrupt):
        run(Mean(), varied(), settings, other, config={"seed": 0}, progress=interrupt)
    run(Mean(), varied(), settings, other, config={"seed": 0})
    assert contents(other / "results") == contents(sharded / "results")


def test_report_transfer_and_curvature_read_either_form(whole, sharded, monkeypatch):
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in (whole, sharded)]
    cards = [page[page.index("<article") : page.rindex("</article>")] for page in pages]
    assert cards[0] == cards[1]
    runs = [load_run(folder) for folder in (whole, sharded)]
    matrices = [transfer_matrix(one, Mean(), batch_size=2) for one in runs]
    for key in ("map_l1", "map_iou75"):
        np.testing.assert_allclose(*(one[key] for one in matrices), atol=1e-6)  # of float32
    others = [transfer_to(one, Mean(), "it", interpreters=["cam"]) for one in runs]
    assert [(row["n"], row["asr"]) for row in others[0]] == [
        (row["n"], row["asr"]) for row in others[1]
    ]
    studies = [of_run(one, "cam", limit=5) for one in runs]
    for sample, expected in zip(studies[1].samples, studies[0].samples, strict=True):
        np.testing.assert_array_equal(sample.images, expected.images)
    # one shard in memory at a time
    monkeypatch.setattr(Stored, "read", limited(Stored.read))
    transfer_matrix(runs[1], Mean(), batch_size=2)


def test_a_shard_on_which_another_network_is_always_wrong(sharded):
    path = sharded / "results" / "00000.npz"
    arrays = read_arrays(path)
    np.savez(path, **(arrays | {"labels": (arrays["labels"] + 1) % 3}))
    finished = load_run(sharded)
    joined = finished._replace(results=Results(read_results(sharded)))
    rows, expected = (
        transfer_to(one, Mean(), "it", interpreters=["cam"]) for one in (finished, joined)
    )
    assert len(rows) == len(expected) == 4
    for row, other in zip(rows, expected, strict=True):
        assert row["n"] == other["n"] == 4 and row["asr"] == other["asr"]
        assert row["map_l1"] == pytest.approx(other["map_l1"], abs=1e-6)  # of float32


def limited(read):
    def read_few(self, name, pictures=None):
        values = read(self, name, pictures)
        assert values.ndim < 3 or len(values) <= 3, name
        return values

    return read_few


def test_large_results_become_shards_of_themselves(tmp_path, three, monkeypatch):
    for large, form in ((10**9, "results.npz"), (1000, "results")):
        monkeypatch.setattr(store, "LARGE", large)
        run(Mean(), varied(), QUICK, tmp_path)  # over the other form
        assert results_path(tmp_path).name == form
        assert {"results", "results.npz"} & {path.name for path in tmp_path.iterdir()} == {form}
    before = contents(tmp_path / "results")
    run(Mean(), varied(), QUICK, tmp_path)  # shards over shards
    assert contents(tmp_path / "results") == before
    run(Mean(), varied(), QUICK._replace(results="npz"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.jsonl",
        "results.npz",
        "summary.json",
    }


def test_a_full_disk_leaves_the_results_that_were_there(tmp_path, three, whole, monkeypatch):
    run(Mean(), varied(), QUICK, tmp_path, config={"seed": 0})
    with monkeypatch.context() as patch:
        full_disk(patch, store, "write_streams", 2)
        with pytest.raises(
            ValueError,
            match=r"^cannot write .*results: No space left on device; 12 of 12 parts are kept",
        ):
            run(Mean(), varied(), SHARDED, tmp_path, config={"seed": 0})
    assert (tmp_path / "results.npz").read_bytes() == (whole / "results.npz").read_bytes()
    assert not (tmp_path / "results").exists()
    # the form may change when a run is resumed
    run(Mean(), varied(), SHARDED, tmp_path, config={"seed": 0, "results": "shards"}, resume=True)
    assert not (tmp_path / "results.npz").exists() and len(read_results(tmp_path)["images"]) == 7


def test_a_folder_of_somebody_is_left_alone(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.txt").write_text("mine")
    run(Mean(), varied(), QUICK, tmp_path)
    assert contents(tmp_path / "results") == {"mine.txt": b"mine"}
    assert results_path(tmp_path) == tmp_path / "results.npz"
    with pytest.raises(ValueError, match=rf"^cannot write {tmp_path}.results: .*; 12 of 12 parts"):
        run(Mean(), varied(), SHARDED, tmp_path)
    assert contents(tmp_path / "results") == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "00001.npz").unlink(),
        lambda folder: (folder / "00001.npz").write_bytes(b"PK"),
        lambda folder: (folder / "index.json").write_text('{"schema": 1}'),
        lambda folder: (folder / "index.json").write_text('{"schema": 1, "shards": [{"file": 3}]}'),
        lambda folder: np.savez(folder / "00001.npz", images=np.zeros((3, 5, 5, 3), np.uint8)),
    ],
)
def test_damaged_shards_are_named_in_one_line(sharded, damage):
    damage(sharded / "results")
    for read in (load_run, report.write):
        with pytest.raises(ValueError, match=rf"^cannot read {sharded}") as error:
            read(sharded)
        assert "results" in str(error.value) and "\n" not in str(error.value)


def test_finished_shards_are_not_overwritten_unless_told(tmp_path, capsys):
    command = ["attack", "--images", "shapes:3", "--limit", "1", "--steps", "0", "--warm-steps"]
    command += ["1", "--interpreter", "cam", "--results", "shards", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert f"results: {tmp_path / 'results'}, a folder of shards" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "holds a finished run (summary.json, results/index.json, report.html)" in (
        capsys.readouterr().err
    )
