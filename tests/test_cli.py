"""The command line: what it writes, and that it refuses bad input in one line, with exit code 2 and nothing left behind."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

import adv2_jax
from adv2_jax import cli, interpreters, models
from adv2_jax.cli.arguments import COMMANDS, parser
from adv2_jax.cli.entry import RUN
from adv2_jax.files import write_arrays, write_summary
from adv2_jax.interpreters import PAPER
from adv2_jax.runs import faithfulness
from adv2_jax.runs.schema import MEASURES
from adv2_jax.runs.tables import after_a_run

N, K = 6, 3
SHORT = ["--interpreter", "cam", "--steps", "2", "--limit", "2"]

pytestmark = pytest.mark.usefixtures("tiny_by_name")


@pytest.fixture(scope="module")
def network(tiny_by_name, tmp_path_factory):
    """Weights of a tiny network, and images it gets right because the labels are its predictions."""
    folder = tmp_path_factory.mktemp("network")
    model = models.build("tiny", width=2, num_classes=K)
    write_arrays(folder / "weights.npz", models.convert.to_state_dict(model))
    images = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
    logits = jax.jit(jax.vmap(lambda x: model.head(model.features(x))))(images / np.float32(255))
    labels = logits.argmax(-1)
    write_arrays(folder / "images.npz", {"images": images, "labels": np.asarray(labels, np.int32)})
    return folder


def attack(network, out, *words, images=None):
    base = [
        "attack",
        "--model",
        "tiny",
        "--weights",
        str(network / "weights.npz"),
        "--out",
        str(out),
    ]
    return cli.main(
        [
            *base,
            "--images",
            str(images or network / "images.npz"),
            "--warm-steps",
            "1",
            "--steps",
            "3",
            *words,
        ]
    )


@pytest.mark.slow
def test_a_mask_is_charged_for_the_steps_of_its_own_descents(network, tmp_path):
    assert attack(network, tmp_path / "out", "--interpreter", "mask", "--limit", "2") == 0
    _, *rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    solver = interpreters.mask_interpreter().solver
    # to start from, joint steps, scored once: a third of a gradient or so
    spent = 1 + solver.steps + 3 * 5 + solver.steps + 0.4
    # a tiny network: blurs count beside its convolutions
    assert spent <= rows[1]["gradient_evaluations"] <= 1.15 * spent
    # PGD's steps are whole
    assert rows[0]["gradient_evaluations"] == round(rows[1]["gradient_evaluations"])


def test_a_summary_fits_a_terminal_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "interpreter": "grad_cam",
        "attack": "adv2",
        "threat": "linf",
        "n": 10000,
        "gradient_evaluations": 19720,
        "seconds": 12345.678,
    } | {one.key: 0.123 for one in MEASURES}
    cli.console.print_sheet(after_a_run([row]))
    assert "…" not in capsys.readouterr().out


@pytest.mark.slow
def test_attack_writes_the_contract(network, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert attack(network, out, "--interpreter", "grad", "cam", "--limit", "4", "--seed", "3") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "log.jsonl",
        "report.html",
        "results.npz",
        "summary.json",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["config"]["command"].startswith("adv2 attack --model tiny")
    assert [(row["interpreter"], row["attack"]) for row in summary["rows"]] == [
        ("grad", "noise"),
        ("grad", "pgd"),
        ("grad", "adv2"),
        ("cam", "noise"),
        ("cam", "pgd"),
        ("cam", "adv2"),
    ]
    keys = {
        "threat",
        "n",
        "asr",
        "mc",
        "map_l1",
        "map_l2",
        "map_iou75",
        "map_iou50",
        "linf",
        "l2",
        "gradient_evaluations",
        "seconds",
    }
    assert all(row.keys() >= keys for row in summary["rows"])
    # a step of the warm start, and three: a gradient of a gradient is two
    cost = {"cam": 4, "grad": 7}
    for row in summary["rows"]:
        expected = 0 if row["attack"] == "noise" else cost[row["interpreter"]]
        assert row["n"] == 4 and row["gradient_evaluations"] == pytest.approx(expected, rel=0.05)
    with np.load(out / "results.npz") as results:
        assert results["images"].shape == results["grad/adv2/images"].shape == (4, 8, 8, 3)
        assert results["grad/adv2/images"].dtype == np.uint8
        assert results["cam/pgd/maps"].shape == results["cam/target_maps"].shape == (4, 2, 2)
        assert (results["targets"] != results["labels"]).all()
        assert results["cam/adv2/map_l1"].mean() == pytest.approx(
            summary["rows"][5]["map_l1"], rel=1e-6
        )
    printed = capsys.readouterr()
    assert "report.html" in printed.out
    assert printed.err == ""  # no terminal, no progress bar


def test_the_summary_has_every_option(network, tmp_path):
    """Those that were not given too, with the values that were used in their place."""
    words = ["attack", "--model", "tiny", "--weights", str(network / "weights.npz")]
    arguments = parser().parse_args(
        [*words, "--images", str(network / "images.npz"), "--out", str(tmp_path)]
    )
    before = dict(vars(arguments))
    config = cli.subject.subject_of(arguments).config
    assert vars(arguments) == before
    used = {"interpreter": [*PAPER], "epsilon": 8 / 255, "model": "tiny"}
    used["interpreter"].remove("rts")  # there is no masker
    for name in ("distributed", "coordinator", "processes", "process"):
        del before[name]  # how the work is shared changes no result
    assert config == before | used


@pytest.mark.slow
def test_a_table_tells_the_threat_and_the_target_map_that_it_is_of(coloured, tmp_path):
    words = ["table", "patch", *coloured, "--steps", "2", "--limit", "2", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    for folder in (tmp_path, tmp_path / "linf-patch"):
        config = json.loads((folder / "summary.json").read_text())["config"]
        options = vars(parser().parse_args(["table", "patch", "--out", "tables"])).keys()
        chosen = {"command", "threat", "target_map", "keep", "joint", "goal", "evade"}
        assert config.keys() == options - {"run"} | chosen
        assert (config["threat"], config["target_map"]) == ("linf", "patch")


def test_every_command_is_run_by_a_function():
    assert RUN.keys() == COMMANDS.keys()


@pytest.mark.slow
def test_same_seed_same_results_at_any_batch_size(coloured, tmp_path):
    words = ["attack", *coloured, "--interpreter", "cam", "--steps", "3", "--limit", "6"]
    for name, size in (("a", "6"), ("b", "2")):
        assert cli.main([*words, "--batch-size", size, "--out", str(tmp_path / name)]) == 0
    with np.load(tmp_path / "a" / "results.npz") as a, np.load(tmp_path / "b" / "results.npz") as b:
        assert a.files == b.files
        np.testing.assert_array_equal(a["cam/adv2/images"], b["cam/adv2/images"])


def test_own_targets_and_maps_are_used(coloured, tmp_path):
    with np.load(coloured[coloured.index("--images") + 1]) as archive:
        arrays = dict(archive)
    arrays["targets"] = (arrays["labels"] + 2) % K
    arrays["target_maps"] = np.random.default_rng(1).random((24, 4, 4), np.float32)
    write_arrays(tmp_path / "own.npz", arrays)
    words = ["--images", str(tmp_path / "own.npz"), "--interpreter", "cam", "--steps", "3"]
    assert cli.main(["attack", *coloured, *words, "--out", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out" / "results.npz") as results:
        np.testing.assert_array_equal(results["targets"], arrays["targets"])
        np.testing.assert_array_equal(results["cam/target_maps"], arrays["target_maps"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threat", "epsilon", "penalty"),
    [
        ("l2", 0.5, None),
        ("flow", None, 5e-4),
        ("linf+flow", 8 / 255, 5e-4),
        ("linf", 8 / 255, None),
    ],
)
def test_threat_models_and_their_defaults(coloured, tmp_path, threat, epsilon, penalty):
    words = [*coloured[: coloured.index("--epsilon")], "--interpreter", "cam", "--limit", "2"]
    steps = ["--warm-steps", "1", "--steps", "3", "--preset", "paper"]
    out = ["--threat", threat, "--out", str(tmp_path / "out")]
    assert cli.main(["attack", *words, *steps, *out]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["config"]["epsilon"], summary["config"]["penalty"]) == (epsilon, penalty)
    rows = summary["rows"]
    assert [row["threat"] for row in rows] == [threat] * 3
    with np.load(tmp_path / "out" / "results.npz") as results:
        for row in rows:
            key = f"cam/{row['attack']}/flow"
            assert (
                (key in results)
                == ("mean_displacement" in row)
                == ("flow_penalty" in row)
                == (penalty is not None)
            )
            if key in results:
                assert results[key].shape == (2, 4, 4, 2) and results[key].dtype == np.float32
                assert row["mean_displacement"] == pytest.approx(
                    np.hypot(*np.moveaxis(results[key], -1, 0)).mean(), rel=1e-5
                )
                # random flows are .2 pixels long; four steps of .01 in each direction
                longest = 0.201 if row["attack"] == "noise" else 0.04 * 2**0.5
                assert 0 < row["mean_displacement"] <= longest


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)
LABELS = np.zeros(2, np.int32)
BAD_FILES = {
    "lacks labels": {"images": IMAGES},
    "lacks images": {"labels": LABELS},
    "uint8 in 0..255, got float32": {"images": IMAGES.astype(np.float32), "labels": LABELS},
    "nan..nan": {"images": np.full(IMAGES.shape, np.nan, np.float32), "labels": LABELS},
    "0..300": {
        "images": np.linspace(0, 300, IMAGES.size).astype(int).reshape(IMAGES.shape),
        "labels": LABELS,
    },
    "empty": {"images": IMAGES[:0], "labels": LABELS[:0]},
    "[N, H, W, 3], got [2, 8, 8, 1]": {"images": IMAGES[..., :1], "labels": LABELS},
    "label 9 of image 1 is out of range: the network has 3 classes": {
        "images": IMAGES,
        "labels": np.array([0, 9]),
    },
    "got -1 at image 0": {"images": IMAGES, "labels": np.array([-1, 0])},
    "labels must be at least 0 and below 2**31, got 4294967296 at image 1": {
        "images": IMAGES,
        "labels": np.array([0, 2**32]),
    },
    "labels must be integers [2]": {"images": IMAGES, "labels": np.zeros(3, np.int32)},
    "target 3 of image 0 is out of range": {
        "images": IMAGES,
        "labels": LABELS,
        "targets": np.array([3, 1]),
    },
    "the target of image 1 is its label": {
        "images": IMAGES,
        "labels": LABELS,
        "targets": np.array([1, 0]),
    },
    "target_maps must be floats [2, h, w]": {
        "images": IMAGES,
        "labels": LABELS,
        "target_maps": np.zeros((2, 4)),
    },
    "target_maps must lie in [0, 1], got 0.0..2.0": {
        "images": IMAGES,
        "labels": LABELS,
        "target_maps": np.array([[[0.0]], [[2.0]]]),
    },
    "pickled objects": {"images": np.array([None, {}], object), "labels": LABELS},
}


@pytest.mark.parametrize("expected", BAD_FILES)
def test_bad_image_files_are_refused(network, tmp_path, capsys, expected):
    np.savez(tmp_path / "bad.npz", **BAD_FILES[expected])
    refused(
        attack(network, tmp_path / "out", images=tmp_path / "bad.npz"),
        capsys,
        expected,
        tmp_path / "out",
    )


@pytest.mark.parametrize("name", ["images.npz", "weights.npz"])
def test_truncated_files_are_refused(network, tmp_path, capsys, name):
    whole, cut = (network / name).read_bytes(), tmp_path / name
    cut.write_bytes(whole[: len(whole) // 2])
    words = ["--weights" if name == "weights.npz" else "--images", str(cut)]
    refused(
        attack(network, tmp_path / "out", *words), capsys, f"cannot read {cut}", tmp_path / "out"
    )


BAD_WORDS = {
    "invalid choice: 'rubbish' (choose from": ["--interpreter", "rubbish"],
    "model 'vgg' is not one of cifar_resnet20": ["--model", "vgg"],
    "'nan' is not a finite number": ["--mean", "0", "nan", "0"],
    "do not fit cifar_resnet56": ["--model", "cifar_resnet56"],
    "no such file": ["--weights", "/nowhere/w.npz"],
    "epsilon = 2.0 must lie in [1/255, 1]": ["--epsilon", "2"],
    "epsilon = nan must lie in [1/255, 1]": ["--epsilon", "nan"],
    "epsilon = 0.0 must be a finite number, 1/255 or more": ["--threat", "l2", "--epsilon", "0"],
    "penalty = -1.0 must be a finite number, 0 or more": [
        "--threat",
        "linf+flow",
        "--flow-penalty",
        "-1",
    ],
    "--epsilon is not for --threat flow": ["--threat", "flow", "--epsilon", "0.1"],
    "--flow-penalty is not for --threat l2": ["--threat", "l2", "--flow-penalty", "0.1"],
    "invalid choice: 'l1' (choose from": ["--threat", "l1"],
    "'-3' is not a whole number": ["--steps=-3"],
    "'0' is not a whole number above 0": ["--batch-size", "0"],
    "'x' is not a whole number above 0 and below 2**31, or auto": ["--batch-size", "x"],
    "is not a whole number, 0 or more and below 2**32": ["--seed", "99999999999999999999"],
    "unrecognized arguments: --stpes": ["--stpes"],
    "neither shapes, shapes:N nor an .npz file": ["--images", "cat.jpg"],
    "after 'shapes:' must be a whole number": ["--images", "shapes:many"],
    "cannot read two lines.npz: no such file": ["--images", "two\nlines.npz"],
}


@pytest.mark.parametrize("expected", BAD_WORDS)
def test_bad_words_are_refused(network, tmp_path, capsys, expected):
    refused(
        attack(network, tmp_path / "out", *BAD_WORDS[expected]), capsys, expected, tmp_path / "out"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_path_is_refused(name, capsys, tmp_path, monkeypatch):
    """It would be the current directory."""
    monkeypatch.chdir(tmp_path)
    arguments = COMMANDS[name].arguments
    words = [
        "effectiveness" if key == "table" else "some"
        for key in arguments
        if not key.startswith("-") and key != "run_directory"
    ]
    words += ["--model", "tiny"] if name == "convert" else []
    path = ["--out", ""] if "--out" in arguments else [""]
    refused(
        cli.main([*name.split(), *words, *path]),
        capsys,
        "'' names no file or directory",
        tmp_path / "summary.json",
    )
    assert not any(tmp_path.iterdir())


def test_model_without_weights_is_refused(tmp_path, capsys):
    code = cli.main(["attack", "--model", "resnet5", "--out", str(tmp_path / "out")])
    refused(code, capsys, "model 'resnet5' is not one of", tmp_path / "out")
    code = cli.main(["attack", "--model", "cifar_resnet20", "--out", str(tmp_path / "out")])
    refused(code, capsys, "--model and --weights go together", tmp_path / "out")


def train(network, out, *words):
    images = np.tile(
        np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8), (2, 1, 1, 1)
    )
    write_arrays(network / "train.npz", {"images": images, "labels": np.arange(20) % K})
    write_arrays(network / "one.npz", {"images": images, "labels": np.zeros(20, int)})
    base = [
        "train",
        "classifier",
        "--model",
        "tiny",
        "--images",
        str(network / "train.npz"),
        "--epochs",
        "2",
    ]
    return cli.main([*base, "--batch-size", "6", "--out", str(out), *words])


@pytest.mark.slow
def test_training_writes_weights_that_load(network, tmp_path, capsys):
    assert train(network, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "summary.json",
        "weights.npz",
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["counts"] == {"train": 18, "held_out": 2}
    assert len(summary["losses"]) == 6
    model = models.load("tiny", tmp_path / "out" / "weights.npz")
    assert model.head(model.features(np.zeros((8, 8, 3), np.float32))).shape == (K,)
    assert f"held-out accuracy {summary['accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_robust_training_measures_accuracy_under_attack(network, tmp_path, capsys):
    words = ["--robust", "pgd", "--attack-steps", "1", "--epsilon", "4/255", "--epochs", "1"]
    assert train(network, tmp_path / "out", *words) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 <= summary["robust_accuracy"] <= 1 and summary["robust_accuracy_before"] is None
    expected = f"under PGD at epsilon 0.01569: {summary['robust_accuracy']:.4f} on 2 images"
    assert expected in capsys.readouterr().out
    assert "Accuracy under PGD" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("kind", "plain"), [("classifier", "0.12"), ("rts", "0.0")])
def test_classifiers_train_on_plain_scenes_too(tmp_path, capsys, monkeypatch, kind, plain):
    def asked(source, **options):
        raise ValueError(f"plain {options['plain']} of {source}")

    monkeypatch.setattr(cli.training, "training_sets", asked)
    assert cli.main(["train", kind, "--images", "shapes", "--out", str(tmp_path / "out")]) == 2
    assert f"plain {plain} of shapes" in capsys.readouterr().err


BAD_TRAINING = {
    "only `adv2 attack` takes path/to/file.py:name": ["--model", "own.py:network"],
    "batch_size must lie in 1..18": ["--batch-size", "19"],
    "2 classes or more, got 1": ["--images", "one.npz"],
    "training diverged": ["--learning-rate", "1e38"],
    "scenes held out for attacks": ["--images", "shapes:50"],
    "penalty goes with robust gradient, curvature, ssr": ["--robust", "pgd", "--penalty", "1"],
    "epsilon must lie in [1/255, 1], got 8.0": ["--robust", "pgd", "--epsilon", "8"],
    "rts needs a masker": ["--robust", "adv2", "--interpreter", "rts"],
}


@pytest.mark.parametrize("expected", BAD_TRAINING)
def test_bad_training_is_refused(network, tmp_path, capsys, expected, monkeypatch):
    monkeypatch.chdir(network)
    refused(
        train(network, tmp_path / "out", *BAD_TRAINING[expected]),
        capsys,
        expected,
        tmp_path / "out",
    )


@contextlib.contextmanager
def interrupted_at(step):
    """Progress bars that are interrupted while they show a step."""
    done = 0

    def tick(steps):
        nonlocal done
        done += steps
        if done == step:
            raise KeyboardInterrupt

    yield lambda title, steps, **more: tick


@pytest.mark.slow
def test_interrupted_training_goes_on_to_the_same_weights(network, tmp_path, capsys, monkeypatch):
    words = ["--checkpoint-every", "2", "--no-mirror"]
    assert train(network, tmp_path / "whole", *words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(cli.training, "progress_bars", lambda: interrupted_at(5))
        assert train(network, tmp_path / "out", *words) == 130
    assert "--resume goes on from it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]
    assert train(network, tmp_path / "out", *words) == 2
    assert "--resume" in capsys.readouterr().err
    assert train(network, tmp_path / "out", *words, "--seed", "5", "--resume") == 2
    assert "seed was 0, is 5" in capsys.readouterr().err
    assert train(network, tmp_path / "out", *words, "--resume") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "summary.json",
        "weights.npz",
    ]
    assert (tmp_path / "out" / "weights.npz").read_bytes() == (
        tmp_path / "whole" / "weights.npz"
    ).read_bytes()


@pytest.mark.slow
def test_what_training_writes_needs_no_other_word(tmp_path, capsys):
    """Name, normalisation, size and classes are in the file of the weights."""
    image = pytest.importorskip("PIL.Image")
    drawn = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    for i, pixels in enumerate(drawn):
        (folder := tmp_path / "photos" / ("ant", "bee", "cow")[i % 3]).mkdir(
            exist_ok=True, parents=True
        )
        image.fromarray(pixels).save(folder / f"{i}.png")
    shutil.copytree(tmp_path / "photos" / "cow", tmp_path / "some" / "cow")
    colours = ["--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2"]
    words = f"--images {tmp_path}/photos --held-out {tmp_path}/photos --size 8 --epochs 1 --batch-size 6"
    out, weights = tmp_path / "out", str(tmp_path / "out" / "weights.npz")
    code = cli.main(
        ["train", "classifier", "--model", "tiny", *words.split(), *colours, "--out", str(out)]
    )
    assert code == 0
    asked = parser().parse_args(["attack", "--weights", weights, "--out", "run"])
    model = cli.subject.model_of(asked)
    assert (model.mean, model.std, model.image_size) == ((0.5,) * 3, (0.2,) * 3, 8)
    asked.images = str(tmp_path / "some")
    subject = cli.subject.subject_of(asked)
    # a folder of cows alone: the third class of the network, not the first of the folder
    assert subject.images.classes == ("ant", "bee", "cow") and set(subject.images.labels) == {2}
    assert subject.images.images.shape[1:] == (8, 8, 3) and subject.config["model"] == "tiny"
    capsys.readouterr()
    arrays = {"images": np.zeros((2, 12, 12, 3), np.uint8), "labels": np.zeros(2, np.int32)}
    write_arrays(tmp_path / "large.npz", arrays)
    words = (
        f"--images {tmp_path}/large.npz --steps 1 --interpreter cam --out {tmp_path}/run".split()
    )
    cli.main(["attack", "--weights", weights, *words])
    told = capsys.readouterr().err
    assert "trained at 8 x 8 pixels, the images of" in told and "--size 8 makes them alike" in told
    write_arrays(tmp_path / "bare.npz", models.convert.to_state_dict(model))
    code = cli.main(["attack", "--weights", str(tmp_path / "bare.npz"), "--out", f"{tmp_path}/no"])
    refused(code, capsys, "--model and --weights go together", tmp_path / "no")


def test_fine_tuning_starts_from_the_weights_given(network, tmp_path):
    start = ["--weights", str(network / "weights.npz"), "--head-only", "--learning-rate", "1e-9"]
    assert train(network, tmp_path / "same", *start) == 0
    old, new = (
        dict(np.load(path)) for path in (network / "weights.npz", tmp_path / "same" / "weights.npz")
    )
    # a rate of 1e-9 moves nothing
    assert all(np.allclose(old[key], new[key], atol=1e-6) for key in old)
    write_arrays(
        network / "five.npz",
        {"images": np.zeros((20, 8, 8, 3), np.uint8), "labels": np.arange(20) % 5},
    )
    assert train(network, tmp_path / "five", *start, "--images", str(network / "five.npz")) == 0
    with np.load(tmp_path / "five" / "weights.npz") as five:
        assert five["linear.weight"].shape == (5, 8)
        np.testing.assert_array_equal(five["layer2.0.conv1.weight"], old["layer2.0.conv1.weight"])


@pytest.fixture(scope="module")
def other_classes(tmp_path_factory):
    """Weights of a network of two classes more."""
    path = tmp_path_factory.mktemp("other") / "weights.npz"
    model = models.build("tiny", width=2, num_classes=K + 2)
    write_arrays(path, models.convert.to_state_dict(model))
    return path


@pytest.fixture(scope="module")
def train_rts(network):
    """`adv2 train rts` of the network on its own six images."""

    def call(out, *words):
        images, weights = (str(network / name) for name in ("images.npz", "weights.npz"))
        base = [
            "train",
            "rts",
            "--model",
            "tiny",
            "--weights",
            weights,
            "--images",
            images,
            "--held-out",
            images,
        ]
        return cli.main([*base, "--epochs", "3", "--batch-size", "3", "--out", str(out), *words])

    with pytest.MonkeyPatch.context() as patch:
        # sooner
        patch.setattr(faithfulness, "PAPER", ("cam", "rts"))
        yield call


@pytest.fixture(scope="module")
def rts(train_rts, tmp_path_factory):
    """The folder of a finished training of a masker."""
    out = tmp_path_factory.mktemp("rts") / "out"
    assert train_rts(out, "--checkpoint-every", "2") == 0
    return out


@pytest.mark.slow
def test_rts_training_writes_a_masker_that_loads(rts):
    assert sorted(path.name for path in rts.iterdir()) == [
        "masker.npz",
        "report.html",
        "summary.json",
    ]
    summary = json.loads((rts / "summary.json").read_text())
    assert summary["counts"] == {"train": 6, "held_out": 6} and len(summary["losses"]) == 6
    assert summary["config"]["model"] == "tiny" and summary["config"]["command"].startswith(
        "adv2 train rts --model tiny"
    )
    first, second = summary["quality"]
    assert (first["interpreter"], second["interpreter"], first["n"]) == ("rts", "cam", 6)
    assert (
        first["confidence_kept"] > 0
        and 0 < first["confidence_removed"] < 1
        and first["iou"] is None
    )
    masker = models.load_masker(rts / "masker.npz")
    assert masker(np.zeros((8, 8, 3), np.float32), 0).shape == (4, 4)


@pytest.mark.slow
def test_a_masker_is_trained_on_and_against_the_attack(train_rts, rts, tmp_path, capsys):
    start, out = ["--masker", str(rts / "masker.npz")], tmp_path / "out"
    words = ["--robust", "adv2", "--attack-steps", "2", "--epochs", "1", "--learning-rate", "1e-9"]
    assert train_rts(out, *start, *words) == 0
    with np.load(rts / "masker.npz") as old, np.load(out / "masker.npz") as new:
        assert old.files == new.files
        # a step of no length: what it started from is still there
        np.testing.assert_allclose(old["out.weight"], new["out.weight"], atol=1e-6)
    encoder = ["--encoder", "tiny", "--encoder-weights", "any.npz"]
    assert train_rts(tmp_path / "two", *start, *encoder) == 2
    assert "--masker brings its encoder" in capsys.readouterr().err


@pytest.mark.slow
def test_rts_is_attacked_with_its_masker(network, rts, tmp_path):
    words = [
        "--masker",
        str(rts / "masker.npz"),
        "--encoder-loss",
        "mean",
        "--encoder-weight",
        "0.5",
    ]
    assert attack(network, tmp_path / "rts", "--interpreter", "rts", *words) == 0
    summary = json.loads((tmp_path / "rts" / "summary.json").read_text())
    assert [(row["interpreter"], row["attack"], row["n"]) for row in summary["rows"]] == [
        ("rts", "noise", N),
        ("rts", "pgd", N),
        ("rts", "adv2", N),
    ]
    with np.load(tmp_path / "rts" / "results.npz") as results:
        assert results["rts/adv2/maps"].shape == (N, 4, 4)


@pytest.mark.slow
def test_interrupted_rts_training_goes_on_to_the_same_masker(
    train_rts, rts, tmp_path, capsys, monkeypatch
):
    out, words = tmp_path / "out", ["--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(cli.training, "progress_bars", lambda: interrupted_at(3))
        assert train_rts(out, *words) == 130
    assert "--resume goes on from it" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["checkpoints"]
    assert train_rts(out, *words, "--resume", "--area", "1.5") == 2
    assert "area was" in capsys.readouterr().err
    assert train_rts(out, *words, "--resume") == 0
    assert (out / "masker.npz").read_bytes() == (rts / "masker.npz").read_bytes()


def wrong_labels(network):
    """The file of the images with labels that the network gets wrong."""
    with np.load(network / "images.npz") as arrays:
        write_arrays(
            network / "wrong.npz",
            {"images": arrays["images"], "labels": (arrays["labels"] + 1) % K},
        )
    return str(network / "wrong.npz")


BAD_RTS_TRAINING = {
    "--encoder and --encoder-weights go together": lambda network, other: ["--encoder", "tiny"],
    "the masker draws maps of 5 classes, the network has 3": lambda network, other: [
        *("--encoder", "tiny", "--encoder-weights", str(other))
    ],
    "--model own.py:network needs --encoder and --encoder-weights": lambda network, other: [
        "--model",
        "own.py:network",
    ],
    "absent must lie in [0, 1), got 1.0": lambda network, other: ["--absent", "1"],
    "'-1' is not a number, 0 or more": lambda network, other: ["--area=-1"],
    "'inf' is not a number, 0 or more": lambda network, other: ["--power", "inf"],
    "batch_size must lie in 1..6": lambda network, other: ["--batch-size", "7"],
    "nothing to resume": lambda network, other: ["--resume"],
    "gets none of the 6 images right": lambda network, other: ["--held-out", wrong_labels(network)],
    "scenes held out for attacks": lambda network, other: ["--images", "shapes:50"],
}


@pytest.mark.parametrize("expected", BAD_RTS_TRAINING)
def test_bad_rts_training_is_refused(
    network, own, other_classes, train_rts, tmp_path, capsys, expected, monkeypatch
):
    monkeypatch.chdir(network)  # where own.py is
    refused(
        train_rts(tmp_path / "out", *BAD_RTS_TRAINING[expected](network, other_classes)),
        capsys,
        expected,
        tmp_path / "out",
    )


BAD_RTS = {
    "--interpreter rts needs --masker FILE": ["--interpreter", "cam", "rts"],
    "weights.npz holds no masker: it does not name its encoder": ["--masker", "weights.npz"],
    "cannot read nowhere.npz: no such file": ["--masker", "nowhere.npz"],
    "'-0.5' is not a number, 0 or more": ["--encoder-weight=-0.5"],
    "invalid choice: 'tail' (choose from": ["--encoder-loss", "tail"],
}


@pytest.mark.parametrize("expected", BAD_RTS)
def test_bad_attacks_on_rts_are_refused(network, tmp_path, capsys, expected, monkeypatch):
    monkeypatch.chdir(network)
    refused(
        attack(network, tmp_path / "out", *BAD_RTS[expected]), capsys, expected, tmp_path / "out"
    )


def test_a_masker_of_other_classes_is_refused(network, other_classes, tmp_path, capsys):
    masker = models.Masker(models.load("tiny", other_classes), rngs=nnx.Rngs(0))
    models.save_masker(masker, "tiny", tmp_path / "masker.npz")
    code = attack(
        network, tmp_path / "out", "--interpreter", "rts", "--masker", str(tmp_path / "masker.npz")
    )
    refused(code, capsys, "the masker draws maps of 5 classes, the network has 3", tmp_path / "out")


def test_rts_is_among_the_interpreters_only_where_there_is_a_masker(masker):
    classifier = masker.encoder
    embedded, named = (
        parser().parse_args(["attack", "--out", "run", *words])
        for words in ([], ["--model", "tiny"])
    )
    assert isinstance(cli.subject.with_masker(classifier, embedded).masker, models.Masker)
    assert cli.subject.with_masker(classifier, named) is classifier
    assert cli.subject._interpreters(None, models.ClassifierWithMasker(classifier, masker)) == list(
        PAPER
    )
    assert cli.subject._interpreters(None, classifier) == [name for name in PAPER if name != "rts"]


NETWORK = """
import jax.numpy as jnp
from adv2_jax import models

def network(path=None):
    return models.load("tiny", path) if path else models.build("tiny", width=2, num_classes=3)

class Bare:
    pass

def not_finite(path):
    network = models.load("tiny", path)
    network.linear.bias[...] = jnp.full(3, jnp.nan)
    return network

def training(path):
    network = models.load("tiny", path)
    network.train()
    return network
"""


@pytest.fixture(scope="module")
def own(network):
    path = network / "own.py"
    path.write_text(NETWORK)
    return path


@pytest.mark.slow
def test_own_network_by_file_and_name(network, own, tmp_path):
    words = ["--interpreter", "cam", "--limit", "2"]
    assert attack(network, tmp_path / "named", *words) == 0
    assert attack(network, tmp_path / "own", *words, "--model", f"{own}:network") == 0
    with (
        np.load(tmp_path / "named" / "results.npz") as a,
        np.load(tmp_path / "own" / "results.npz") as b,
    ):
        np.testing.assert_array_equal(a["cam/adv2/images"], b["cam/adv2/images"])


BAD_NETWORKS = {
    "gives no network, which has features and head, or logits, but Bare": "Bare",
    "logits or gradients that are not finite": "not_finite",
    "is set to training: bn1 (BatchNorm) uses batch statistics": "training",
    "has no 'nothing'; it has network, Bare": "nothing",
}


@pytest.mark.parametrize("expected", BAD_NETWORKS)
def test_bad_networks_are_refused(network, own, tmp_path, capsys, expected):
    words = [
        "attack",
        "--model",
        f"{own}:{BAD_NETWORKS[expected]}",
        "--images",
        str(network / "images.npz"),
    ]
    weights = (
        [] if BAD_NETWORKS[expected] == "Bare" else ["--weights", str(network / "weights.npz")]
    )
    refused(
        cli.main([*words, *weights, "--out", str(tmp_path / "out")]),
        capsys,
        expected,
        tmp_path / "out",
    )


@pytest.fixture(scope="module")
def folders(network, tmp_path_factory):
    """The images of the network as PNG files: in numbered class folders, and flat."""
    image = pytest.importorskip("PIL.Image")
    nested, flat = (tmp_path_factory.mktemp(name) for name in ("nested", "flat"))
    with np.load(network / "images.npz") as arrays:
        for i, (pixels, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
            (nested / str(label)).mkdir(exist_ok=True)
            image.fromarray(pixels).save(nested / str(label) / f"{i}.png")
            image.fromarray(pixels).save(flat / f"{i}.png")
    return nested, flat


@pytest.mark.slow
def test_folders_are_attacked_like_arrays(network, folders, tmp_path):
    for name, images in (("arrays", None), ("nested", folders[0]), ("flat", folders[1])):
        size = [] if images is None else ["--size", "8"]
        assert attack(network, tmp_path / name, "--interpreter", "cam", *size, images=images) == 0
    results = {
        name: dict(np.load(tmp_path / name / "results.npz"))
        for name in ("arrays", "nested", "flat")
    }
    np.testing.assert_array_equal(
        results["flat"]["cam/adv2/images"], results["arrays"]["cam/adv2/images"]
    )
    np.testing.assert_array_equal(results["flat"]["names"], [f"{i}.png" for i in range(N)])
    assert sorted(results["nested"]["labels"]) == sorted(results["arrays"]["labels"])
    assert all(
        name.startswith(f"{label}/")
        for name, label in zip(results["nested"]["names"], results["nested"]["labels"], strict=True)
    )


def test_wrong_images_of_numbered_folders_come_with_advice(coloured, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    with np.load(coloured[coloured.index("--images") + 1]) as arrays:
        images, labels = arrays["images"][:N], arrays["labels"][:N]
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / str(max(label, 1))  # class 0 lies in the wrong folder
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(folder / f"{i}.png")
    words = ["--images", str(tmp_path / "photos"), "--size", "4", "--interpreter", "cam"]
    out = ["--steps", "3", "--out", str(tmp_path / "out")]
    assert cli.main(["attack", *coloured, *words, *out]) == 0
    assert (
        "images left out: the network gets them wrong\nthe class folders were taken by their numbers; "
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_folders_are_cropped_to_what_the_network_was_trained_on(network, folders, tmp_path):
    assert attack(network, tmp_path / "out", "--interpreter", "cam", images=folders[1]) == 0
    with np.load(tmp_path / "out" / "results.npz") as results:
        assert results["images"].shape[1:] == (32, 32, 3)


def test_normalisation_of_named_networks(network, own, tmp_path, capsys):
    colours = ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    words = ["attack", "--model", "tiny", "--weights", str(network / "weights.npz"), "--out", "run"]
    model = cli.subject.model_of(parser().parse_args([*words, *colours]))
    assert (model.mean, model.std) == ((0.5,) * 3, (0.25,) * 3)
    code = attack(network, tmp_path / "other", *colours, "--model", f"{own}:network")
    refused(code, capsys, "--mean is for the networks that come with adv2", tmp_path / "other")
    code = attack(network, tmp_path / "other", "--std", "1", "0", "1")
    refused(code, capsys, "'0' is not a number above 0", tmp_path / "other")


def test_weights_are_converted(network, tmp_path, capsys):
    with np.load(network / "weights.npz") as arrays:
        foreign = {f"module.{key}": value for key, value in arrays.items()}
    write_arrays(tmp_path / "foreign.npz", foreign)
    words = [
        "convert",
        str(tmp_path / "foreign.npz"),
        "--out",
        str(tmp_path / "mine.safetensors"),
        "--model",
    ]
    assert cli.main([*words, "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "37 of 37 keys fit tiny" in printed and "taken off every key: module." in printed
    loaded, known = (
        models.load("tiny", path)
        for path in (tmp_path / "mine.safetensors", network / "weights.npz")
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, known)
    (tmp_path / "mine.safetensors").unlink()
    refused(
        cli.main([*words, "resnet18"]), capsys, "do not fit resnet18", tmp_path / "mine.safetensors"
    )


def test_a_file_in_place_of_the_directory_is_refused(network, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert attack(network, tmp_path / "out" / "deeper") == 2
    assert "cannot write to --out" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(network, tmp_path, capsys):
    tmp_path.chmod(0o500)
    refused(attack(network, tmp_path / "out"), capsys, "cannot write to --out", tmp_path / "out")


def test_interrupt_leaves_nothing_behind(network, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands, "run", interrupt)
    assert attack(network, tmp_path / "new" / "out") == 130
    assert capsys.readouterr().err == "adv2: interrupted\n"
    assert not (tmp_path / "new").exists()


MEAN = """
class Mean:
    def features(self, image, act=None):
        return image

    def head(self, features):
        return 10 * features.mean(axis=(0, 1))

import jax
jax.tree_util.register_static(Mean)
network = Mean()
"""


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A network that compiles in no time, the mean colour, and 24 images it gets right; the words that attack them."""
    folder = tmp_path_factory.mktemp("coloured")
    # a module of its own, which is imported once: JAX knows the network again in the next command
    (folder / "mean_colour.py").write_text(MEAN)
    (folder / "mean.py").write_text("from mean_colour import network")
    images = np.random.default_rng(0).integers(80, 120, (24, 4, 4, 3), np.uint8)
    labels = np.arange(24) % 3
    images[np.arange(24), :2, :2, labels] = 160
    write_arrays(folder / "images.npz", {"images": images, "labels": labels})
    words = [
        "--model",
        f"{folder}/mean.py:network",
        "--images",
        f"{folder}/images.npz",
        "--interpreter",
        "cam",
        "grad",
    ]
    return [*words, "--batch-size", "3", "--epsilon", "0.1", "--warm-steps", "0"]


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_bytes(coloured, tmp_path, capsys):
    words = ["attack", *coloured, "--steps", "30", "--interpreter", "cam"]
    assert cli.main([*words, "--out", str(tmp_path / "whole")]) == 0
    out, command = (
        tmp_path / "out",
        [sys.executable, "-m", "adv2_jax", *words, "--out", str(tmp_path / "out")],
    )
    same = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as tests/conftest.py has it
    with subprocess.Popen(
        command, env=same, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and (
            not (out / "log.jsonl").exists() or (out / "log.jsonl").stat().st_size < 300
        ):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert 0 < len(kept) < 24 and sorted(path.name for path in out.iterdir()) == [
        "batches",
        "log.jsonl",
    ]
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "holds an unfinished run: go on with it (--resume)" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(out), "--resume", "--steps", "31"]) == 2
    assert "with other settings: steps was 30, is 31" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(out), "--resume"]) == 0
    assert (out / "results.npz").read_bytes() == (tmp_path / "whole" / "results.npz").read_bytes()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (
        len({(line["batch"], line["interpreter"], line["attack"]) for line in lines})
        == len(lines)
        == 24
    )
    assert not (out / "batches").exists()


@pytest.mark.slow
def test_interrupt_keeps_finished_batches(coloured, tmp_path, capsys, monkeypatch):
    words = ["attack", *coloured, "--steps", "5", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(cli.commands, "progress_bars", lambda quiet: interrupted_at(30))
        assert cli.main(words) == 130
    assert (
        capsys.readouterr().err
        == "adv2: interrupted; 9 of 48 parts are kept, --resume goes on from them\n"
    )
    assert cli.main([*words, "--resume", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_demo_can_be_resumed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.commands, "attack", lambda arguments: [seen.append(arguments)])
    monkeypatch.setattr(cli.commands, "_show_demo", lambda *shown: None)
    for words in ([], ["--resume"]):
        assert cli.main(["demo", "--out", str(tmp_path), *words]) == 0
    assert [(arguments.resume, arguments.limit) for arguments in seen] == [(False, 3), (True, 3)]
    assert seen[1].command == f"adv2 demo --out {tmp_path} --resume"


@pytest.mark.slow
def test_a_demo_shows_a_picture_and_says_what_it_shows(network, tmp_path, capsys, monkeypatch):
    """The tiny network and two interpreters: what is drawn and said, not how well it does."""
    attack_words = [
        "--model",
        "tiny",
        "--weights",
        str(network / "weights.npz"),
        "--images",
        str(network / "images.npz"),
    ]
    short = [
        "--interpreter",
        "cam",
        "grad",
        "--epsilon",
        "16/255",
        "--steps",
        "3",
        "--limit",
        "2",
        "--batch-size",
        "2",
    ]
    monkeypatch.setattr(cli.commands, "DEMO", [*attack_words, *short])
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith("2 images were attacked, each to be taken for another class")
    assert "no pixel value changed by more than 16/255. PGD alone succeeds on " in out
    assert out.count(". ") == 4 and "ADV² succeeds on " in out
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "demo" / "picture.png") as picture:
        assert picture.width > 850 and picture.height > 300
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == [30, 30, 30]).all(1).any()  # ink: there are words
    rows = json.loads((tmp_path / "demo" / "summary.json").read_text())["rows"]
    attacks = [row for row in rows if row["attack"] != "noise"]
    assert all(f"{100 * row['asr']:.0f}%" in out for row in attacks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["effectiveness", "maps", "iou", "patch", "stadv", "transfer"])
def test_tables(coloured, tmp_path, capsys, name):
    words = [
        "table",
        name,
        *coloured[: coloured.index("--epsilon")],
        "--steps",
        "3",
        "--limit",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(words) == 0
    assert "report.html" in capsys.readouterr().out
    run = {"patch": "linf-patch", "stadv": "flow-benign"}.get(name, "linf-benign")
    assert sorted(path.name for path in tmp_path.iterdir()) == [run, "summary.json", "table.md"]
    assert sorted(path.name for path in (tmp_path / run).iterdir()) == [
        "log.jsonl",
        "report.html",
        "results.npz",
        "summary.json",
    ]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    # title, headings, rule, blank, and a line for noise, PGD and ADV² each; benign in a transfer
    assert table.count("\n") == {"transfer": 9}.get(name, 10)
    assert cli.main([*words, "--resume", "--quiet"]) == 0
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table


def test_unknown_tables_list_the_valid_ones(tmp_path, capsys):
    code = cli.main(["table", "tabel", "--out", str(tmp_path / "out")])
    refused(code, capsys, "invalid choice: 'tabel' (choose from", tmp_path / "out")


@pytest.mark.slow
def test_transfer_adds_to_a_run(coloured, tmp_path, capsys):
    words = [*coloured[:2], "--batch-size", "5"]
    assert (
        cli.main(
            ["attack", *coloured, "--steps", "5", "--limit", "6", "--out", str(tmp_path / "out")]
        )
        == 0
    )
    report = (tmp_path / "out" / "report.html").stat().st_mtime_ns
    assert cli.main(["transfer", str(tmp_path / "out"), *words, "--to-model", coloured[1]]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["transfer"]["sources"] == ["benign", "noise", "pgd", "cam", "grad"]
    # the same network under another name
    same = {(row["source"], row["interpreter"]): row for row in summary["models"]}
    for row in summary["rows"]:
        source = row["interpreter"] if row["attack"] == "adv2" else row["attack"]
        seen = same[source, row["interpreter"]]
        assert (seen["n"], seen["asr"]) == (row["n"], row["asr"])
        assert seen["map_l1"] == pytest.approx(row["map_l1"], abs=1e-5)
    assert (tmp_path / "out" / "report.html").stat().st_mtime_ns > report
    capsys.readouterr()
    for other, expected in (
        (["--to-weights", "w.npz"], "--to-model and --to-weights go together"),
        (["--to-model", "tiny"], "--to-model and --to-weights go together"),
        (["--to-model", "resnet5"], "model 'resnet5' is not one of"),
        (["--model", "cifar_resnet20"], "--model and --weights go together"),
    ):
        code = cli.main(["transfer", str(tmp_path / "out"), *words, *other])
        refused(code, capsys, expected, tmp_path / "nowhere")
    code = cli.main(["transfer", str(tmp_path / "empty"), *words])
    refused(
        code, capsys, "empty holds no finished run: there is no summary.json", tmp_path / "empty"
    )
    # the network is that of the run, whose summary names it
    assert cli.main(["transfer", str(tmp_path / "out"), "--quiet"]) == 0
    again = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert again["transfer"] == summary["transfer"]
    path = tmp_path / "out" / "summary.json"
    summary["config"]["model"] = "gone.py:network"
    path.write_text(json.dumps(summary))
    code = cli.main(["transfer", str(tmp_path / "out")])
    refused(code, capsys, "gone.py", tmp_path / "nowhere")


@pytest.mark.parametrize("encoding", ["ascii", "cp936", "cp1252", "latin-1"])
def test_any_encoding_of_the_output_will_do(coloured, tmp_path, monkeypatch, encoding):
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    for command in ("", *COMMANDS, "train"):
        with pytest.raises(SystemExit) as end:
            cli.main([*command.split(), "--help"])
        assert end.value.code == 0
    out = tmp_path / "ο"  # a letter that only one of them has
    assert cli.main(["attack", *coloured, *SHORT, "--out", str(out)]) == 0
    for stream in (stdout, stderr):
        stream.flush()
    assert stderr.buffer.getvalue() == b""
    printed = stdout.buffer.getvalue().decode(encoding)
    assert printed.count("usage: adv2") == 2 + len(COMMANDS) and "report: " in printed
    assert "ADV²" in (out / "report.html").read_text(encoding="utf-8")


def test_names_that_are_no_characters_do_not_end_a_run(coloured, tmp_path):
    out = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9")
    try:
        os.mkdir(out)
    except OSError:
        pytest.skip("the file system takes characters only")
    assert cli.main(["attack", *coloured, *SHORT, "--out", out]) == 0
    assert "report.html" in os.listdir(out)


@pytest.mark.slow
def test_finished_runs_are_not_overwritten_unless_told_to(coloured, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["attack", *coloured, *SHORT, "--out", str(out)]
    assert cli.main(words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert cli.main([*words, "--seed", "5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"adv2: {out} holds a finished run (summary.json, results.npz, report.html): "
    )
    assert "--overwrite" in error and "another --out" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert cli.main([*words, "--seed", "5", "--overwrite"]) == 0
    assert json.loads((out / "summary.json").read_text())["config"]["seed"] == 5
    assert cli.main([*words, "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_overwriting_can_be_resumed(coloured, tmp_path, monkeypatch, capsys):
    words = ["attack", *coloured, "--steps", "5", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(cli.commands, "progress_bars", lambda quiet: interrupted_at(30))
        assert cli.main([*words, "--overwrite"]) == 130
    for word in ([], ["--overwrite"]):
        assert cli.main([*words, *word]) == 2
        assert "holds an unfinished run: go on with it (--resume)" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0


@pytest.mark.slow
def test_finished_trainings_and_files_are_not_overwritten_unless_told_to(
    network, rts, train_rts, tmp_path, capsys
):
    assert train(network, tmp_path / "out") == 0
    source, converted = str(network / "weights.npz"), tmp_path / "mine.npz"
    convert = ["convert", source, "--model", "tiny", "--out", str(converted)]
    assert cli.main(convert) == 0
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "weights.npz").write_bytes(b"the weights to start from")
    for again, named in (
        (lambda *words: train(network, tmp_path / "out", *words), "out"),
        (lambda *words: train(network, tmp_path / "started", *words), "started"),
        (lambda *words: cli.main([*convert, *words]), "mine.npz"),
    ):
        path = tmp_path / named
        before = (path / "weights.npz" if path.is_dir() else path).read_bytes()
        capsys.readouterr()
        assert again() == 2
        error = capsys.readouterr().err
        assert (
            str(path) in error
            and "--overwrite" in error
            and "another --out" in error
            and error.count("\n") == 1
        )
        assert (path / "weights.npz" if path.is_dir() else path).read_bytes() == before
        assert again("--overwrite") == 0
    assert train_rts(rts) == 2
    assert (
        f"{rts} holds a finished run (masker.npz, summary.json, report.html)"
        in capsys.readouterr().err
    )


def test_a_demo_may_be_made_anew(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cli.commands, "attack", lambda arguments: [seen.append(arguments.overwrite)]
    )
    monkeypatch.setattr(cli.commands, "_show_demo", lambda *shown: None)
    for command in (None, "adv2 demo --out here", "adv2 attack --out here"):
        if command is not None:
            write_summary(tmp_path, {"config": {"command": command}})
        assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert seen == [False, True, False]


NUMBERS = {"8/255": 8 / 255, "0.031": 0.031, "1e-3": 1e-3, "4.6/255": 4.6 / 255, "1/2": 0.5}


@pytest.mark.parametrize("text", NUMBERS)
def test_fractions_are_numbers(text):
    number = NUMBERS[text]
    words = [
        "--epsilon",
        text,
        "--flow-penalty",
        text,
        "--mean",
        text,
        "0",
        "1/3",
        "--std",
        text,
        "1",
        "1",
        "--encoder-weight",
        text,
    ]
    found = parser().parse_args(["attack", "--out", "run", *words])
    assert (found.epsilon, found.penalty, found.mean, found.encoder_weight) == (
        number,
        number,
        [number, 0, 1 / 3],
        number,
    )
    words = ["--learning-rate", text, "--absent", text, "--area", text, "--area-power", text]
    found = parser().parse_args(["train", "rts", "--out", "run", *words])
    assert (found.learning_rate, found.absent, found.area, found.area_power) == (number,) * 4


@pytest.mark.parametrize(
    "flag", ["--epsilon", "--flow-penalty", "--mean", "--std", "--encoder-weight"]
)
@pytest.mark.parametrize(
    "text",
    ["1/0", "0/0", "nan", "inf", "1/nan", "8/255/2", "", "/", "8/", "/255", "-1e999", "8 of 255"],
)
def test_what_is_no_number_is_refused(network, tmp_path, capsys, flag, text):
    more = ["0.5", "0.5"] if flag in ("--mean", "--std") else []
    words = ["--threat", "linf+flow", f"{flag}={text}"] if not more else [flag, *more, text]
    refused(attack(network, tmp_path / "out", *words), capsys, "", tmp_path / "out")


@pytest.mark.slow
def test_the_weights_of_a_file_can_be_chosen(network, own, tmp_path, capsys):
    with np.load(network / "weights.npz") as arrays:
        good = {f"ema.{key}": value for key, value in arrays.items()}
        copies = good | {f"raw.{key}": -value for key, value in arrays.items()}
    write_arrays(tmp_path / "copies.npz", copies)
    words = ["--weights", str(tmp_path / "copies.npz"), "--interpreter", "cam", "--limit", "2"]
    base = ["attack", "--model", "tiny", *words, "--out", "run", "--weights-key", "ema"]
    chosen = models.convert.to_state_dict(cli.subject.model_of(parser().parse_args(base)))
    assert all((array == good[f"ema.{key}"]).all() for key, array in chosen.items())
    assert attack(network, tmp_path / "out", *words) == 0
    error = capsys.readouterr().err
    assert (
        error.startswith(f"adv2: {tmp_path / 'copies.npz'}: left out, 37 in all: raw.")
        and error.count("\n") == 1
    )
    assert "as many keys fit under raw (--weights-key NAME" in error
    converted = [
        "convert",
        str(tmp_path / "copies.npz"),
        "--model",
        "tiny",
        "--out",
        str(tmp_path / "mine.npz"),
        "--weights-key",
        "ema",
    ]
    assert cli.main(converted) == 0
    with np.load(tmp_path / "mine.npz") as mine:
        assert all((mine[key] == good[f"ema.{key}"]).all() for key in mine.files)
    for bad, expected in (
        ([*words, "--weights-key", "best"], "it holds no weights called 'best', but ema, raw"),
        (
            ["--model", f"{own}:network", "--weights-key", "ema"],
            "--weights-key is for the networks that come with adv2",
        ),
    ):
        refused(attack(network, tmp_path / "bad", *bad), capsys, expected, tmp_path / "bad")
    refused(
        train(network, tmp_path / "bad", "--weights-key", "ema"),
        capsys,
        "--weights-key goes with --weights",
        tmp_path / "bad",
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
@pytest.mark.parametrize(
    "name", ["jax-cuda12-plugin", "jax_cuda13_plugin", "jax-rocm7-plugin", "libtpu", "numpy-plugin"]
)
def test_the_cpu_in_place_of_an_accelerator_is_told(tmp_path, capsys, monkeypatch, name):
    plugin = tmp_path / f"{name.replace('-', '_')}-0.7.2.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.7.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["attack", "--images", "nowhere.npz", "--out", str(tmp_path / "out")]
    refusal = "adv2: cannot read nowhere.npz: no such file\n"
    told = f"adv2: JAX {jax.__version__} runs on the CPU although {name} 0.7.2 is installed"
    assert cli.main(words) == 2
    warning = capsys.readouterr().err.removesuffix(refusal)
    assert warning.startswith(told) == ("numpy" not in name)
    assert warning.count("\n") == ("numpy" not in name)
    assert cli.main([*words, "--quiet"]) == 2
    assert capsys.readouterr().err == refusal


@pytest.mark.parametrize(
    ("platforms", "expected"),
    [
        ("cpu", "adv2: cannot read nowhere.npz: no such file\n"),
        ("cuda", "adv2: JAX has no device of JAX_PLATFORMS=cuda: "),
    ],
)
def test_the_platform_that_is_asked_for_is_taken_or_named(tmp_path, platforms, expected):
    plugin = tmp_path / "libtpu-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 1\n")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": platforms,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    command = [
        sys.executable,
        "-m",
        "adv2_jax",  # the module is the command
        "convert",
        "nowhere.npz",
        "--model",
        "resnet18",
        "--out",
        str(tmp_path / "a.npz"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.stderr.startswith("adv2: cannot read") and platforms == "cuda":
        pytest.skip("there is such a device")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(expected)


@pytest.mark.parametrize(
    "out", ["file", "file/deeper", "dangling", "long" * 100, "/dev/null/x", "holds_batches"]
)
def test_directories_that_cannot_be_written_are_refused(
    coloured, tmp_path, capsys, monkeypatch, out
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "holds_batches").mkdir()
    (tmp_path / "holds_batches" / "batches").touch()
    before = sorted(tmp_path.rglob("*"))
    assert (
        cli.main(
            [
                "attack",
                *coloured,
                "--interpreter",
                "cam",
                "--steps",
                "1",
                "--limit",
                "1",
                "--out",
                out,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("adv2: cannot write ") and error.count("\n") == 1 and out in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"adv2 {adv2_jax.__version__}\n"


def refused(code, capsys, expected, out):
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("adv2: ") and message.count("\n") == 1, message
    assert expected in message
    assert not out.exists()
