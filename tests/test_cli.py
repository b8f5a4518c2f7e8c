"""The command line: what it writes, and that it refuses bad input in one line, with exit code 2 and nothing left behind."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from adv2_jax import cli, models
from adv2_jax.files import write_arrays

N, K = 6, 3


@pytest.fixture(scope="module", autouse=True)
def _tiny_network():
    """A network that compiles in seconds, known to the command line by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", models.resnet.cifar(1))
        yield


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Weights of a tiny network, and images it gets right because the labels are its predictions."""
    folder = tmp_path_factory.mktemp("network")
    model = models.build("tiny", width=2, num_classes=K)
    models.convert.save(model, folder / "weights.npz")
    images = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
    labels = jax.vmap(lambda x: model.head(model.features(x)))(images / np.float32(255)).argmax(-1)
    write_arrays(folder / "images.npz", {"images": images, "labels": np.asarray(labels, np.int32)})
    return folder


def attack(network, out, *words, images=None):
    base = ["attack", "--model", "tiny", "--weights", str(network / "weights.npz"), "--out", str(out)]
    return cli.main([*base, "--images", str(images or network / "images.npz"), "--warm-steps", "1", "--steps", "3", *words])


def test_attack_writes_the_contract(network, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert attack(network, out, "--interpreter", "grad", "cam", "--limit", "4", "--seed", "3") == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.npz", "summary.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["config"]["command"].startswith("adv2 attack --model tiny")
    assert [(row["interpreter"], row["attack"]) for row in summary["rows"]] == [
        ("grad", "pgd"),
        ("grad", "adv2"),
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
    assert all(row["n"] == 4 and row["gradient_evaluations"] == 4 for row in summary["rows"])
    with np.load(out / "results.npz") as results:
        assert results["images"].shape == results["grad/adv2/images"].shape == (4, 8, 8, 3)
        assert results["grad/adv2/images"].dtype == np.uint8
        assert results["cam/pgd/maps"].shape == results["cam/target_maps"].shape == (4, 2, 2)
        assert (results["targets"] != results["labels"]).all()
        assert results["cam/adv2/map_l1"].mean() == pytest.approx(summary["rows"][3]["map_l1"], rel=1e-6)
    printed = capsys.readouterr()
    assert "report.html" in printed.out
    assert printed.err == ""  # no terminal, no progress bar


def test_same_seed_same_results_at_any_batch_size(network, tmp_path):
    for name, size in (("a", "6"), ("b", "2")):
        assert attack(network, tmp_path / name, "--interpreter", "cam", "--batch-size", size) == 0
    with np.load(tmp_path / "a" / "results.npz") as a, np.load(tmp_path / "b" / "results.npz") as b:
        assert a.files == b.files
        np.testing.assert_array_equal(a["cam/adv2/images"], b["cam/adv2/images"])


def test_own_targets_and_maps_are_used(network, tmp_path):
    with np.load(network / "images.npz") as archive:
        arrays = dict(archive)
    arrays["targets"] = (arrays["labels"] + 2) % K
    arrays["target_maps"] = np.random.default_rng(1).random((N, 2, 2), np.float32)
    write_arrays(tmp_path / "own.npz", arrays)
    assert attack(network, tmp_path / "out", "--interpreter", "cam", images=tmp_path / "own.npz") == 0
    with np.load(tmp_path / "out" / "results.npz") as results:
        np.testing.assert_array_equal(results["targets"], arrays["targets"])
        np.testing.assert_array_equal(results["cam/target_maps"], arrays["target_maps"])


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)
LABELS = np.zeros(2, np.int32)
BAD_FILES = {
    "lacks labels": {"images": IMAGES},
    "lacks images": {"labels": LABELS},
    "uint8 in 0..255, got float32": {"images": IMAGES.astype(np.float32), "labels": LABELS},
    "not finite": {"images": np.full(IMAGES.shape, np.nan, np.float32), "labels": LABELS},
    "0..300": {"images": np.linspace(0, 300, IMAGES.size).astype(int).reshape(IMAGES.shape), "labels": LABELS},
    "empty": {"images": IMAGES[:0], "labels": LABELS[:0]},
    "[N, H, W, 3], got [2, 8, 8, 1]": {"images": IMAGES[..., :1], "labels": LABELS},
    "label 9 of image 1 is out of range: the network has 3 classes": {"images": IMAGES, "labels": np.array([0, 9])},
    "got -1 at image 0": {"images": IMAGES, "labels": np.array([-1, 0])},
    "labels must be below 2**31, got 4294967296 at image 1": {"images": IMAGES, "labels": np.array([0, 2**32])},
    "labels must be integers [2]": {"images": IMAGES, "labels": np.zeros(3, np.int32)},
    "target 3 of image 0 is out of range": {"images": IMAGES, "labels": LABELS, "targets": np.array([3, 1])},
    "the target of image 1 is its label": {"images": IMAGES, "labels": LABELS, "targets": np.array([1, 0])},
    "target_maps must be floats [2, h, w]": {"images": IMAGES, "labels": LABELS, "target_maps": np.zeros((2, 4))},
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
    refused(attack(network, tmp_path / "out", images=tmp_path / "bad.npz"), capsys, expected, tmp_path / "out")


@pytest.mark.parametrize("name", ["images.npz", "weights.npz"])
def test_truncated_files_are_refused(network, tmp_path, capsys, name):
    whole, cut = (network / name).read_bytes(), tmp_path / name
    cut.write_bytes(whole[: len(whole) // 2])
    words = ["--weights" if name == "weights.npz" else "--images", str(cut)]
    refused(attack(network, tmp_path / "out", *words), capsys, f"cannot read {cut}", tmp_path / "out")


BAD_WORDS = {
    "invalid choice: 'rubbish' (choose from": ["--interpreter", "rubbish"],
    "model 'vgg' is not one of cifar_resnet20": ["--model", "vgg"],
    "do not fit cifar_resnet56": ["--model", "cifar_resnet56"],
    "no such file": ["--weights", "/nowhere/w.npz"],
    "epsilon = 2.0 must lie in (0, 1]": ["--epsilon", "2"],
    "epsilon = nan must lie in (0, 1]": ["--epsilon", "nan"],
    "'-3' is not a whole number": ["--steps=-3"],
    "'0' is not a whole number above 0": ["--batch-size", "0"],
    "is not below 2**32": ["--seed", "99999999999999999999"],
    "unrecognized arguments: --stpes": ["--stpes"],
    "neither shapes, shapes:N nor an .npz file": ["--images", "cat.jpg"],
    "after 'shapes:' must be a whole number": ["--images", "shapes:many"],
}


@pytest.mark.parametrize("expected", BAD_WORDS)
def test_bad_words_are_refused(network, tmp_path, capsys, expected):
    refused(attack(network, tmp_path / "out", *BAD_WORDS[expected]), capsys, expected, tmp_path / "out")


def test_model_without_weights_is_refused(tmp_path, capsys):
    code = cli.main(["attack", "--model", "cifar_resnet20", "--out", str(tmp_path / "out")])
    refused(code, capsys, "--model and --weights go together", tmp_path / "out")


def train(network, out, *words):
    images = np.tile(np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8), (2, 1, 1, 1))
    write_arrays(network / "train.npz", {"images": images, "labels": np.arange(20) % K})
    write_arrays(network / "one.npz", {"images": images, "labels": np.zeros(20, int)})
    base = ["train", "classifier", "--model", "tiny", "--images", str(network / "train.npz"), "--epochs", "2"]
    return cli.main([*base, "--batch-size", "6", "--out", str(out), *words])


def test_training_writes_weights_that_load(network, tmp_path, capsys):
    assert train(network, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["summary.json", "weights.npz"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["counts"] == {"train": 18, "held_out": 2}
    assert len(summary["losses"]) == 6
    model = models.load("tiny", tmp_path / "out" / "weights.npz")
    assert model.head(model.features(np.zeros((8, 8, 3), np.float32))).shape == (K,)
    assert f"held-out accuracy {summary['accuracy']:.4f}" in capsys.readouterr().out


BAD_TRAINING = {
    "batch_size must lie in 1..18": ["--batch-size", "19"],
    "2 classes or more, got 1": ["--images", "one.npz"],
    "training diverged": ["--learning-rate", "1e38"],
    "scenes held out for attacks": ["--images", "shapes:50"],
}


@pytest.mark.parametrize("expected", BAD_TRAINING)
def test_bad_training_is_refused(network, tmp_path, capsys, expected, monkeypatch):
    monkeypatch.chdir(network)
    refused(train(network, tmp_path / "out", *BAD_TRAINING[expected]), capsys, expected, tmp_path / "out")


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

    monkeypatch.setattr(cli, "run", interrupt)
    assert attack(network, tmp_path / "new" / "out") == 130
    assert capsys.readouterr().err == "adv2: interrupted\n"
    assert not (tmp_path / "new").exists()


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "adv2_jax", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("adv2 ")


def refused(code, capsys, expected, out):
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("adv2: ") and message.count("\n") == 1, message
    assert expected in message
    assert not out.exists()
