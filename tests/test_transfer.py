"""Transfer against a plain loop over images, and the tables that are made of runs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import interpreters, threats
from adv2_jax.data import ImageSet
from adv2_jax.files import read_arrays, read_summary
from adv2_jax.runs import schema
from adv2_jax.runs.run import Settings, run
from adv2_jax.runs.schema import Results
from adv2_jax.runs.tables import TABLES, by_rows, make_table
from adv2_jax.runs.transfer import add, check_network, load_run, transfer_matrix, transfer_to

FACES = {"grad": interpreters.grad, "cam": interpreters.cam}


@pytest.fixture(scope="module")
def model(make_small):
    return make_small()


@pytest.fixture(scope="module")
def settings():
    return Settings(tuple(FACES), threats.linf(0.1), warm_steps=0, steps=12, batch_size=4)


@pytest.fixture(scope="module")
def image_set(images):
    return ImageSet(images)  # without labels: the network is right about all


@pytest.fixture(scope="module")
def finished(model, image_set, settings, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    run(model, image_set, settings, directory)
    return directory


def plain_means(model, name, images, classes, target_maps):
    """Return mean L1, and mean IoU above the 75th percentiles, an image after the other."""
    l1, iou = [], []
    for image, label, target_map in zip(images, classes, target_maps, strict=True):
        m = np.asarray(FACES[name](model, jnp.asarray(image / np.float32(255)), jnp.asarray(label)))
        l1.append(abs(m - target_map).mean())
        a, b = m > np.quantile(m, 0.75), target_map > np.quantile(target_map, 0.75)
        iou.append((a & b).sum() / (a | b).sum())
    return np.mean(l1), np.mean(iou)


@pytest.mark.slow
def test_matrix_against_a_plain_loop(finished, model):
    matrix = transfer_matrix(load_run(finished), model, batch_size=5)
    assert matrix["interpreters"] == ["grad", "cam"] and matrix["sources"] == [
        "benign",
        "noise",
        "pgd",
        "grad",
        "cam",
    ]
    arrays = read_arrays(finished / "results.npz")
    for j, name in enumerate(FACES):
        inputs = [
            arrays["images"],
            arrays[f"{name}/noise/images"],
            arrays[f"{name}/pgd/images"],
            arrays["grad/adv2/images"],
            arrays["cam/adv2/images"],
        ]
        for i, images in enumerate(inputs):
            classes = arrays["labels"] if i == 0 else arrays["targets"]
            l1, iou = plain_means(model, name, images, classes, arrays[f"{name}/benign_maps"])
            # GRAD in float32, in another batch
            assert matrix["map_l1"][i][j] == pytest.approx(l1, abs=1e-4)
            # a pixel at the percentile may change sides
            assert matrix["map_iou75"][i][j] == pytest.approx(iou, abs=0.02)
    own = {
        (row["interpreter"], row["attack"]): row["map_l1"] for row in read_summary(finished)["rows"]
    }
    for j, name in enumerate(FACES):
        assert matrix["map_l1"][0][j] == pytest.approx(0, abs=1e-4)
        assert matrix["map_l1"][1][j] == pytest.approx(own[name, "noise"], abs=1e-4)
        assert matrix["map_l1"][2][j] == pytest.approx(own[name, "pgd"], abs=1e-4)
        assert matrix["map_l1"][3 + j][j] == pytest.approx(own[name, "adv2"], abs=1e-4)


def test_another_network_against_a_plain_loop(finished, make_small):
    other, arrays = make_small(3), read_arrays(finished / "results.npz")
    logits = [
        other.head(other.features(jnp.asarray(image / np.float32(255))))
        for image in arrays["images"]
    ]
    arrays["labels"] = np.argmax(logits, -1).astype(np.int32)
    arrays["labels"][0] = (arrays["labels"][0] + 1) % 10  # it gets the first one wrong
    rows = transfer_to(
        load_run(finished)._replace(results=Results(arrays)),
        other,
        "other",
        interpreters=["cam"],
        batch_size=4,
    )
    assert [row["source"] for row in rows] == ["benign", "noise", "pgd", "grad", "cam"]
    benign_maps = [
        np.asarray(interpreters.cam(other, i / np.float32(255), c))
        for i, c in zip(arrays["images"], arrays["labels"], strict=True)
    ]
    inputs = [
        arrays["images"],
        arrays["cam/noise/images"],
        arrays["cam/pgd/images"],
        arrays["grad/adv2/images"],
        arrays["cam/adv2/images"],
    ]
    for row, images in zip(rows, inputs, strict=True):
        assert (row["model"], row["n"], row["interpreter"]) == ("other", 5, "cam")
        logits = [
            other.head(other.features(jnp.asarray(image / np.float32(255)))) for image in images[1:]
        ]
        assert row["asr"] == pytest.approx(np.mean(np.argmax(logits, -1) == arrays["targets"][1:]))
        classes = arrays["labels"] if row["source"] == "benign" else arrays["targets"]
        l1, iou = plain_means(other, "cam", images[1:], classes[1:], benign_maps[1:])
        assert row["map_l1"] == pytest.approx(l1, abs=1e-5) and row["map_iou75"] == pytest.approx(
            iou, abs=0.02
        )


def test_a_network_that_is_always_wrong_is_refused(finished, model):
    wrong = load_run(finished)
    arrays = dict(wrong.results.arrays)
    arrays["labels"] = (arrays["labels"] + 1) % 10
    wrong = wrong._replace(results=Results(arrays))
    with pytest.raises(
        ValueError, match=r"^bad gets none of the 6 images of .* right: nothing can transfer to it$"
    ):
        transfer_to(wrong, model, "bad", interpreters=["cam"])


def test_another_network_than_that_of_the_run_is_refused(finished, model, make_small):
    check_network(load_run(finished), model)
    with pytest.raises(
        ValueError,
        match=r"^the network holds \d+ numbers \w{16}, that of .* held \d+ numbers \w{16}: it was made with",
    ):
        check_network(load_run(finished), make_small(1))


def test_what_is_found_is_added_to_the_summary(finished):
    before = read_summary(finished)
    add(load_run(finished), transfer={"interpreters": []})
    assert read_summary(finished) == before | {"transfer": {"interpreters": []}}
    assert json.loads((finished / "summary.json").read_text())["schema"] == 1


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=rf"^{tmp_path} holds no finished run: there is no summary\.json$"
    ):
        load_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"holds no attack: its summary\.json has no rows$"):
        load_run(tmp_path)


def test_the_plain_attack_by_a_flow_goes_by_its_name():
    rows = [
        {"interpreter": "cam", "attack": attack, "threat": "flow", "n": 1, "asr": 1.0}
        for attack in ("pgd", "adv2")
    ]
    assert [line[:2] for line in by_rows("", {"asr": "ASR"}, rows, spread=False).lines] == [
        ["cam", "StAdv"],
        ["cam", "ADV²"],
    ]


def test_tables_share_their_runs(model, image_set, settings, tmp_path):
    published = []

    def make(name, **options):
        return make_table(
            name,
            model,
            image_set,
            settings,
            tmp_path,
            config={"seed": 0},
            publish=published.append,
            **options,
        )

    sheet = make("effectiveness")
    rows = read_summary(tmp_path / "linf-benign")["rows"]
    assert sheet.headings == ["interpreter", "attack", "n", "ASR", "MC"]
    assert [line[:3] for line in sheet.lines] == [
        [name, kind, "6"] for name in FACES for kind in ("noise", "PGD", "ADV²")
    ]
    low, high = rows[1]["ci"]["asr"]
    assert sheet.lines[1][3] == f"{rows[1]['asr']:.3f} [{low:.3f}, {high:.3f}]"
    assert read_summary(tmp_path)["rows"] == rows
    made = (tmp_path / "linf-benign" / "results.npz").stat().st_mtime_ns
    assert make("maps", resume=True).headings[3:] == ["Map L1", "Map L2"]
    matrix = make("transfer", resume=True)
    assert (
        tmp_path / "linf-benign" / "results.npz"
    ).stat().st_mtime_ns == made  # nothing was run again
    assert published == [tmp_path / "linf-benign"] * 2
    assert [line[0] for line in matrix.lines] == ["benign", "noise", "pgd", "grad", "cam"]
    assert matrix.lines[0][2] == "0.0000 (1.000)"
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == matrix.markdown()
    assert "| benign | 0.0000 (1.000) | 0.0000 (1.000) |" in matrix.markdown()
    with pytest.raises(
        ValueError, match=r"linf-benign holds a run with other settings: seed was 0, is 1$"
    ):
        make_table("maps", model, image_set, settings, tmp_path, config={"seed": 1}, resume=True)


def test_tables_name_what_runs_have():
    for table in TABLES.values():
        assert table.threat in threats.THREATS
        assert set(table.keys) <= {one.key for one in schema.MEASURES}


def test_a_run_that_cannot_be_published_stays_as_it_was(finished):
    before = (finished / "summary.json").read_bytes()

    def publish(directory):
        raise KeyError("measure")

    with pytest.raises(
        ValueError, match=r"cannot read .*: it is not as adv2 writes it \(KeyError: 'measure'\)"
    ):
        add(load_run(finished), publish=publish, transfer={"interpreters": []})
    assert (finished / "summary.json").read_bytes() == before
