"""`adv2 detect`: rows against plain counts, who may be judged, files, page and messages."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import cli, detectors, report, threats
from adv2_jax.data import ImageSet
from adv2_jax.detectors import Guarded
from adv2_jax.files import read_summary
from adv2_jax.interpreters import cam_interpreter
from adv2_jax.runs import detection, schema
from adv2_jax.runs.run import Settings, run
from adv2_jax.runs.schema import read_results
from adv2_jax.runs.transfer import add, check_network, load_run

WIDE = threats.linf(0.1)


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def benign():
    coarse = np.random.default_rng(3).integers(0, 256, (110, 4, 4, 3))
    return ImageSet(coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8))


def attacked(model, images, directory):
    directory.mkdir()
    settings = Settings(
        (cam_interpreter(), "grad_cam"), WIDE, "quick", steps=20, snapshots=0, joint=True
    )
    run(model, images, settings, directory)
    return load_run(directory)


@pytest.fixture(scope="module")
def blind(small, benign, tmp_path_factory):
    return attacked(small, benign.take(np.arange(8)), tmp_path_factory.mktemp("d") / "blind")


@pytest.fixture(scope="module")
def fitted(small, benign, blind):
    chosen = detection.unseen(small, benign, [blind])
    return detection.fit_detector(small, detectors.squeezing(), chosen)


@pytest.fixture(scope="module")
def adaptive(small, benign, fitted, tmp_path_factory):
    guarded = Guarded(small, fitted[0])
    return attacked(guarded, benign.take(np.arange(8)), tmp_path_factory.mktemp("d") / "adaptive")


def test_rows_against_plain_counts(small, blind, fitted):
    detector, record = fitted
    rows = detection.judge(small, detector, record, blind)
    kinds = [("noise", None), ("pgd", None), ("adv2", None), ("adv2", True)]
    assert [(row["interpreter"], row["attack"], row.get("joint")) for row in rows] == [
        (None, "benign", None),
        *((name, *kind) for name in ("cam", "grad_cam") for kind in kinds),
    ]
    arrays = read_results(blind.directory)

    def scores(images):
        score = jax.vmap(lambda image: detector.score(small, image))
        return np.asarray(score(jnp.asarray(images / np.float32(255))))

    clean = scores(arrays["images"])
    assert rows[0]["detected"] == (clean > detector.threshold).mean() and rows[0]["n"] == 8
    for row in rows[1:]:
        prefix = f"{row['interpreter']}/{'joint' if row.get('joint') else row['attack']}"
        found = scores(arrays[f"{prefix}/images"])
        seen = found > detector.threshold
        pairs = [(q > p) + 0.5 * (q == p) for p in clean for q in found]
        assert row["auc"] == pytest.approx(np.mean(pairs), abs=1e-6)
        assert row["ci"]["auc"][0] <= row["auc"] <= row["ci"]["auc"][1]
        good = arrays[f"{prefix}/success"] & (arrays[f"{prefix}/map_iou75"] >= 0.5)
        assert row["detected"] == seen.mean() and row["evades"] == (good & ~seen).mean()
        assert row["asr"] == arrays[f"{prefix}/success"].mean()
        assert (row["head"], row["adaptive"], row["fitted"]) == ("threshold", False, False)
        # the curve begins and ends in the corners, and holds the threshold of each image
        false, true = row["roc"]["false"], row["roc"]["true"]
        assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(true, false) == pytest.approx(row["auc"], abs=0.02)  # four digits
    assert sum(row["detected"] > 0 for row in rows[1:]) > 2


def test_intervals_of_the_area_draw_images_with_what_was_made_of_them():
    scores = np.linspace(0, 1, 40)
    same = schema.roc_auc(scores, scores + 1e-3, seed=1)
    free = np.random.default_rng(0).permutation(scores)
    low, high = schema.roc_auc(scores, free, seed=1)["ci"]
    # what moves together varies less: only ties of an image drawn twice are left
    assert same["ci"][1] - same["ci"][0] < 0.3 * (high - low) and low < 0.5 < high
    assert schema.roc_auc(scores[:1], scores[:1]) == {"auc": 0.5, "ci": None}
    assert schema.roc_auc(scores[:0], scores[:0]) == {"auc": None, "ci": None}


def test_an_attack_that_knows_the_detector_is_told_from_others(small, fitted, adaptive, blind):
    detector, record = fitted
    prints = adaptive.summary["fingerprints"]
    assert set(prints) == {"network", "image set", "detector"}
    check_network(adaptive, small)  # the same network, with or without a detector
    knowing = detection.judge(small, detector, record, adaptive)
    assert all(row["adaptive"] for row in knowing)
    other = detectors.fit(detector.kind, (), np.random.default_rng(0).random((40, 2)))
    assert not detection.judge(small, other, record, adaptive)[1]["adaptive"]
    plain = {(row["interpreter"], row["attack"]): row for row in blind.summary["rows"]}
    for row in adaptive.summary["rows"]:
        if row["attack"] == "pgd":  # the budget of the joint attack, which pays for the detector
            assert (
                row["gradient_evaluations"]
                > 1.3 * plain[row["interpreter"], "pgd"]["gradient_evaluations"]
            )
            joint = next(one for one in adaptive.summary["rows"] if one.get("joint"))
            assert row["gradient_evaluations"] == pytest.approx(
                joint["gradient_evaluations"], rel=0.03
            )
    before = detection.judge(small, detector, record, blind)
    shares = [
        np.mean([row["detected"] for row in rows if row["attack"] == "adv2"])
        for rows in (before, knowing)
    ]
    assert shares[1] < 0.5 * shares[0]


def test_a_detector_that_looks_at_nothing_sees_nothing(small, blind):
    kind = detectors.squeezing()
    features = np.random.default_rng(0).random((40, 2)).astype(np.float32)
    nothing = detectors.fit(
        kind, (), features, features[:20], logistic=lambda x, y: np.zeros(x.shape[1])
    )
    record = detectors.Record(blind.summary["fingerprints"]["network"], np.arange(0))
    for row in detection.judge(small, nothing, record, blind)[1:]:
        assert row["auc"] == 0.5 and row["detected"] == 0
        if row["attack"] == "adv2":
            assert row["evades"] > 0


def test_nobody_is_judged_on_what_it_knows(small, benign, blind, adaptive, fitted, tmp_path):
    detector, record = fitted
    # the images of the run were left out: 102 of 110
    assert len(record.seen) == 102
    known = attacked(small, benign.take(np.array([3, 50])), tmp_path / "known")
    with pytest.raises(ValueError, match=r"fitted on 1 of the 2 images of .*known"):
        detection.judge(small, detector, record, known)
    chosen, kind = detection.unseen(small, benign, [blind]), detectors.squeezing()
    taught = detection.fit_detector(small, kind, chosen, teacher=adaptive)
    with pytest.raises(ValueError, match=r"fitted on 8 of the 8 images of .*blind"):
        detection.judge(small, *taught, blind)
    with pytest.raises(ValueError, match=r"40 benign images are needed .* there are 39"):
        detection.fit_detector(small, kind, chosen.take(np.arange(39)))
    with pytest.raises(ValueError, match=r"benign images are \[8, 16, 3\], those of"):
        detection.unseen(small, ImageSet(benign.images[:, :8]), [blind])


def test_a_logistic_head_is_marked_where_it_knows_the_attack(small, benign, blind, tmp_path):
    teacher = attacked(small, benign.take(np.arange(100, 108)), tmp_path / "teacher")
    chosen = detection.unseen(small, benign, [blind, teacher])
    detector, record = detection.fit_detector(small, detectors.squeezing(), chosen, teacher=teacher)
    rows = detection.judge(small, detector, record, blind)
    marks = {(row["attack"], row.get("joint")): row.get("fitted") for row in rows}
    assert marks == {
        ("benign", None): None,
        ("noise", None): False,
        ("pgd", None): True,
        ("adv2", None): False,
        ("adv2", True): False,
    }
    assert rows[2]["head"] == "logistic" and "PGD (taught the head)" in [
        schema.row_name(row) + schema.detection_marks(row) for row in rows
    ]


def test_the_page_shows_them(small, fitted, blind, adaptive):
    rows = [
        row for finished in (blind, adaptive) for row in detection.judge(small, *fitted, finished)
    ]
    add(blind, publish=report.write, detection=rows)
    page = (blind.directory / "report.html").read_text()
    assert 'href="#detection"' in page and "ROC curves; area:" in page
    part = page[page.index('<h2 id="detection">') :].split("</section>")[0]
    table = part.split("</table>")[0]
    assert table.count("<tbody>") == 2 and table.count("<tr>") == 1 + len(rows)
    assert "ADV², joint (adaptive)" in table
    assert re.search(r"data:image/png;base64,", part)
    json.dumps(read_summary(blind.directory)["detection"], allow_nan=False)


@pytest.fixture(scope="module")
def commanded(brightness, tmp_path_factory):
    folder = tmp_path_factory.mktemp("commanded")
    words = ["attack", *brightness, "--limit", "6", "--interpreter", "cam", "--steps", "3"]
    words += ["--snapshots", "0", "--batch-size", "6", "--quiet"]
    assert cli.main([*words, "--out", str(folder / "run")]) == 0
    return folder, words


def test_commands_fit_evade_and_judge(commanded, brightness, capsys):
    folder, words = commanded
    source = ["--benign", brightness[-1]]
    names = ["--detector", "squeezing", "discrepancy", "--interpreter", "cam"]
    assert cli.main(["detect", f"{folder}/run", *names, *source]) == 0
    out = capsys.readouterr().out
    assert "squeezing" in out and "discrepancy" in out and "ROC-AUC" in out
    file = f"{folder}/run/squeezing.npz"
    detector, record = detectors.load(file)
    assert len(record.seen) == 58 and detector.kind == detectors.squeezing()
    both = [file, f"{folder}/run/discrepancy.npz"]
    assert cli.main([*words, "--evade", *both, "--out", f"{folder}/knowing"]) == 0
    summary = read_summary(folder / "knowing")
    assert summary["config"]["evade"] == both
    asked = ["detect", f"{folder}/run", f"{folder}/knowing", "--detector", *both, "--quiet"]
    assert cli.main(asked) == 0
    rows = read_summary(folder / "run")["detection"]
    assert [row["run"] for row in rows[::4]] == ["run", "knowing"] * 2 and len(rows) == 16
    # it knew of both
    assert [row["adaptive"] for row in rows[::4]] == [False, True] * 2
    # resumed, or gone on with, with that detector alone
    assert cli.main([*words, "--out", f"{folder}/knowing"]) == 2
    before = (
        (folder / "run" / "summary.json").read_bytes(),
        (folder / "run" / "squeezing.npz").read_bytes(),
    )
    assert cli.main(["detect", f"{folder}/run", "--detector", "squeezing", *source]) == 2
    assert "is there already: judge it" in capsys.readouterr().err
    again = ["detect", f"{folder}/run", "--detector", "squeezing", *source, "--overwrite"]
    assert cli.main([*again, "--quiet"]) == 0
    assert (folder / "run" / "squeezing.npz").read_bytes() == before[1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--detector squeezing", "give --benign SOURCE"),
        ("--detector cat", "invalid choice: 'cat'"),
        ("--detector missing.npz", "cannot read missing.npz: no such file"),
        ("--detector agreement --interpreter cam --benign IMAGES", "two interpreters or more"),
        ("--detector discrepancy --interpreter mask --benign IMAGES", "not 'mask'"),
        ("--detector squeezing --benign IMAGES --teacher RUN", "80 benign images are needed"),
    ],
)
def test_what_is_refused_leaves_nothing(commanded, brightness, words, reason, capsys):
    folder, _ = commanded
    given = [
        {"IMAGES": brightness[-1], "RUN": f"{folder}/run"}.get(word, word) for word in words.split()
    ]
    files = sorted((folder / "run").iterdir())
    summary = (folder / "run" / "summary.json").read_bytes()
    assert cli.main(["detect", f"{folder}/run", *given, "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1
    assert sorted((folder / "run").iterdir()) == files
    assert (folder / "run" / "summary.json").read_bytes() == summary


def test_an_attack_refuses_what_is_no_detector_of_the_network(
    commanded, small, fitted, tmp_path, capsys
):
    words = commanded[1]
    detectors.save(tmp_path / "other.npz", *fitted)
    (tmp_path / "bad.npz").write_bytes(b"PK")
    for name, reason in (("other", "the detector is of a network of"), ("bad", "cannot read")):
        asked = [*words, "--evade", f"{tmp_path}/{name}.npz", "--out", f"{tmp_path}/run"]
        assert cli.main(asked) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()
