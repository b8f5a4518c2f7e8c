"""`adv2 curvature`: its files against dense Hessians, that nothing finished is lost, and the report."""

import contextlib
import dataclasses
import errno
import shutil
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Small
from jax.tree_util import Partial
from test_report import Page

from adv2_jax import cli, curvature, report, show_curvature
from adv2_jax.activations import relu, relu_curved
from adv2_jax.cli.arguments import parser
from adv2_jax.data import ImageSet
from adv2_jax.files import read_arrays, read_summary, write_arrays
from adv2_jax.interpreters import Context, cam_interpreter, grad_interpreter
from adv2_jax.losses import cross_entropy, log_odds
from adv2_jax.presets import PRESETS
from adv2_jax.report import curvature as pictures
from adv2_jax.runs import curvature as laboratory
from adv2_jax.runs import schema
from adv2_jax.runs.curvature import Options, of_source, study
from adv2_jax.runs.schema import Compared, Examined, rank_correlation
from adv2_jax.runs.transfer import add, load_run

N, K, SIDE, DEPTH, PROBES = 3, 10, 8, 24, 8
TAU = 0.3  # wide: the tiny network has few neurons near a kink
SHORT = ["--interpreter", "cam", "--preset", "quick", "--steps", "8", "--snapshots", "0", "--quiet"]
SAMPLES = ["benign", "pgd", "adv2"]
OPTIONS = Options(cam_interpreter(), tau=TAU, depth=DEPTH, probes=PROBES)
NUMBERS = ["--tau", str(TAU), "--depth", str(DEPTH), "--probes", str(PROBES), "--compare", "1"]
NETWORK = """
import jax
import jax.numpy as jnp
from test_curvature_run import network

class Deaf:
    def logits(self, image):
        return jnp.maximum(2 * image.reshape(-1, 12), 0).sum(0)

class Smooth:
    def logits(self, image, act=None):
        return jnp.tanh(image.reshape(-1, 12)).sum(0)

jax.tree_util.register_static(Deaf)
jax.tree_util.register_static(Smooth)
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fragile(Small):
    """Two convolutions; the gradient is not a number at a black image, although the logits are."""

    def features(self, image, act=relu):
        return super().features(image, act) + 0 * jnp.sqrt(image.sum())


def network(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (3, 3, 3, 8), (3, 3, 8, 16), (16, K)
    *kernels, weights = (
        jnp.asarray(rng.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5, jnp.float32)
        for shape in shapes
    )
    return Fragile(tuple(kernels), 6 * weights)


@pytest.fixture(autouse=True, scope="module")
def coarse():
    """Pictures of few pixels, which take a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 20)
        yield


@pytest.fixture
def plain(monkeypatch):
    """No pictures."""
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A network in a file, and images that it gets right."""
    folder = tmp_path_factory.mktemp("laboratory")
    (folder / "own.py").write_text(NETWORK)
    images = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), np.uint8)
    logits = jax.vmap(lambda x: model.head(model.features(x)))(images / np.float32(255))
    arrays = {"images": images, "labels": np.asarray(logits.argmax(-1), np.int32)}
    write_arrays(folder / "images.npz", arrays)
    return folder


def of(folder, name="network"):
    """The words that name the network."""
    return ["--model", f"{folder}/own.py:{name}"]


@pytest.fixture(scope="module")
def attacked(folder, tmp_path_factory):
    """A finished run that was not measured yet."""
    out = tmp_path_factory.mktemp("attacked") / "run"
    words = [*of(folder), "--images", f"{folder}/images.npz", "--epsilon", "0.1"]
    words += [*SHORT]
    assert cli.main(["attack", *words, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def measured(folder, attacked, tmp_path_factory):
    """The same run, measured."""
    run = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(attacked, run)
    assert cli.main(["curvature", str(run), *of(folder), *NUMBERS, "--quiet"]) == 0
    return run


def arrays_of(directory):
    return read_arrays(directory / "curvature.npz")


def test_all_figures_of_a_run_are_one_call_away(measured):
    pytest.importorskip("matplotlib")
    figures = show_curvature(measured)
    titles = [figure.axes[0].get_title() for figure in figures]
    assert titles[:2] == ["Cosine with the secant", "benign"] and titles[2].startswith("images: ")
    assert len(show_curvature(report.curvature.read(measured))) == len(figures)


def test_files_of_a_run_hold_every_key(measured, attacked):
    summary, arrays = read_summary(measured, "curvature.json"), arrays_of(measured)
    assert [row["images"] for row in summary["rows"]] == SAMPLES
    keys = {one.key for one in schema.CURVATURE}
    for row in summary["rows"]:
        assert row.keys() == {"images", "n", "failed", "ci"} | keys
        assert (row["n"], row["failed"]) == (N, 0) and row["ci"].keys() == keys
        for key in keys:
            each = arrays[f"{row['images']}/{key}"]
            assert each.shape == (N,) and row[key] == pytest.approx(each.mean(), rel=1e-5)
            low, high = row["ci"][key]
            assert low <= row[key] <= high
    fidelity = summary["fidelity"]
    shape = len(fidelity["surrogates"]), len(fidelity["steps"])
    assert np.shape(fidelity["cosine"]) == np.shape(fidelity["ratio"]) == shape
    assert {0.25, 0.5, 1, 2, 4, 8} <= set(fidelity["steps"]) and fidelity["n"] == 1
    np.testing.assert_allclose(fidelity["cosine"], arrays["fidelity/cosine"][0], rtol=1e-6)
    assert fidelity["widths"][fidelity["surrogates"].index("relu_curved 0.01")] == 0.01
    assert summary["counts"] == {"images": N, "left_out": 0, "failed": 0}
    assert summary["config"]["interpreter"] == "cam" and summary["schema"] == 1
    names = {f"{name}/{entry.name}" for name in SAMPLES for entry in Examined.entries()}
    names -= {f"benign/{name}" for name in ("map_l1", *CHANGES)}
    names |= {f"fidelity/{entry.name}" for entry in Compared.entries()} | {"indices"}
    assert arrays.keys() == names
    size = (N, SIDE, SIDE, 3)
    for name, expected in {
        "images": size,
        "softmax_values": (N, K),
        "softmax_vector": size,
        "surrogate_vector": size,
        "density_nodes": (N, 1, DEPTH),
    }.items():
        assert arrays[f"adv2/{name}"].shape == expected
    run = read_arrays(attacked / "results.npz")
    np.testing.assert_array_equal(arrays["adv2/images"], run["cam/adv2/images"])
    np.testing.assert_array_equal(arrays["benign/classes"], run["labels"])
    np.testing.assert_array_equal(arrays["pgd/classes"], run["targets"])
    # everything of the run itself is as it was
    assert (measured / "summary.json").read_bytes() == (attacked / "summary.json").read_bytes()
    assert not (measured / "curvature").exists()


CHANGES = ("softmax_cosine_change", "surrogate_cosine_change")


@partial(jax.jit, static_argnames="act")
def dense(model, image, label, act=relu):
    """The Hessian of the log-odds as a matrix, and the gradient."""

    def score(x):
        return log_odds(model.head(model.features(x.reshape(SIDE, SIDE, 3), act)), label)

    return jax.hessian(score)(image.ravel()), jax.grad(score)(image.ravel())


def curved(z):
    return relu_curved(z, TAU)


def test_numbers_are_those_of_dense_hessians(measured, model):
    arrays = arrays_of(measured)
    for name in ("benign", "adv2"):
        sample, i = Examined(arrays, f"{name}/"), 1
        image = jnp.asarray(sample.images[i] / np.float32(255))
        exact, slope = map(np.asarray, dense(model, image, sample.classes[i]))
        surrogate = np.asarray(dense(model, image, sample.classes[i], curved)[0])
        values = np.linalg.eigvalsh(exact)
        largest = np.abs(values).max()
        # float32: six digits of the largest
        np.testing.assert_allclose(
            np.sort(np.abs(sample.softmax_values[i])),
            np.sort(np.abs(values))[-K:],
            atol=1e-4 * largest,
        )
        assert sample.softmax_top[i] == pytest.approx(largest, rel=1e-4)
        spectrum, vectors = np.linalg.eigh(surrogate)
        place = np.argmax(np.abs(spectrum))
        # an eigenvalue is nearer than its residual
        slack = sample.surrogate_residual[i] + 1e-4 * abs(spectrum[place])
        assert abs(spectrum[place] - sample.surrogate_value[i]) <= slack
        vector = sample.surrogate_vector[i].ravel()
        assert abs(vector @ vectors[:, place]) == pytest.approx(1, abs=0.02)
        gradient_norm = np.linalg.norm(slope)
        assert sample.gradient_norm[i] == pytest.approx(gradient_norm, rel=1e-4)
        assert sample.normalised[i] == pytest.approx(
            sample.surrogate_top[i] / gradient_norm, rel=1e-4
        )
        cosine = abs(vector @ slope) / gradient_norm
        assert sample.surrogate_cosine_gradient[i] == pytest.approx(cosine, abs=1e-4)
        # four standard errors of eight probes
        for key, true in {
            "trace": np.trace(surrogate),
            "frobenius": np.linalg.norm(surrogate),
        }.items():
            error = getattr(sample, f"{key}_error")[i]
            assert abs(getattr(sample, key)[i] - true) <= 4 * error
        weights = sample.density_weights[i]
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-4)
    change = (sample.images[i] - arrays["benign/images"][i].astype(float)).ravel()
    cosine = abs(vector @ change) / np.linalg.norm(change)
    assert sample.surrogate_cosine_change[i] == pytest.approx(cosine, abs=1e-4)


def test_map_jacobian_is_its_largest_singular_value(measured, model):
    sample, i = Examined(arrays_of(measured), "benign/"), 2
    context = Context(TAU, None)

    def draw(x):
        shaped = x.reshape(SIDE, SIDE, 3)
        label = int(sample.classes[i])
        return cam_interpreter().surrogate(model, shaped, label, context).map.ravel()

    image = jnp.asarray(sample.images[i] / np.float32(255)).ravel()
    true = np.linalg.norm(np.asarray(jax.jit(jax.jacfwd(draw))(image)), 2)
    assert abs(sample.map_jacobian[i] - true) <= sample.map_residual[i] + 1e-3 * true


def test_fidelity_is_that_of_direct_calls(measured, model):
    """A surrogate of one width, at one step, against central differences of the gradient."""
    arrays, summary = arrays_of(measured), read_summary(measured, "curvature.json")
    image, label = (
        jnp.asarray(arrays["benign/images"][0] / np.float32(255)),
        arrays["benign/classes"][0],
    )
    key = jax.random.fold_in(jax.random.key(0), arrays["indices"][0])
    v = jax.random.rademacher(jax.random.fold_in(key, 0), image.shape, image.dtype)
    h = 2 / 255
    slopes = [curvature.gradient(model, image + s * h * v, label) for s in (1, -1)]
    true = np.asarray(slopes[0] - slopes[1]).ravel() / (2 * h)
    seen = curvature.hessian(model, image, label, act=Partial(relu_curved, tau=1.0))(v)
    seen = np.asarray(seen).ravel()
    place = (
        summary["fidelity"]["surrogates"].index("relu_curved 1"),
        summary["fidelity"]["steps"].index(2),
    )
    cosine = seen @ true / np.linalg.norm(seen) / np.linalg.norm(true)
    assert arrays["fidelity/cosine"][0][place] == pytest.approx(cosine, abs=1e-4)
    ratio = np.linalg.norm(seen) / np.linalg.norm(true)
    assert arrays["fidelity/ratio"][0][place] == pytest.approx(ratio, rel=1e-3)


def test_correlation_is_spearmans(measured):
    from scipy.stats import spearmanr

    arrays = arrays_of(measured)
    rows = read_summary(measured, "curvature.json")["correlation"]
    assert [(row["measure"], row["attack"]) for row in rows] == [
        (key, attack) for key in ("normalised", "map_jacobian") for attack in ("pgd", "adv2")
    ]
    for row in rows:
        x, y = arrays[f"benign/{row['measure']}"], arrays[f"{row['attack']}/map_l1"]
        assert row["n"] == N and row["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 20, 40)  # with ties
    y = np.append(x[1:] + rng.standard_normal(39) * 5, np.nan)
    row = rank_correlation(x, y, seed=1)
    assert row["n"] == 39
    assert row["spearman"] == pytest.approx(spearmanr(x[:-1], y[:-1]).statistic)
    low, high = row["ci"]
    assert low < row["spearman"] < high and 0.3 < high - low < 0.8  # about 4 / √39
    assert rank_correlation(x[:2], y[:2])["spearman"] is None
    assert rank_correlation(np.ones(5), np.arange(5))["ci"] is None


@pytest.mark.slow
def test_batches_of_accelerators_give_the_same_numbers(measured, model):
    """There all images of a batch are one program."""
    sample = Examined(arrays_of(measured), "adv2/")
    images, benign = (
        jnp.asarray(values / np.float32(255))
        for values in (sample.images[:2], arrays_of(measured)["benign/images"][:2])
    )
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(2))
    together = laboratory._examine_together(
        model, images, jnp.asarray(sample.classes[:2]), images - benign, keys, options=OPTIONS
    )
    for name in {one.key for one in schema.CURVATURE} | {*CHANGES, "gradient_norm"}:
        # float32, summed in another order; the last digits of a Krylov space differ more
        expected = getattr(sample, name)[:2]
        np.testing.assert_allclose(together[name], expected, rtol=5e-3, atol=1e-4, err_msg=name)


def test_many_classes_are_iterated(measured, model, monkeypatch):
    sample = Examined(arrays_of(measured), "benign/")
    monkeypatch.setattr(laboratory, "DENSE", K - 1)
    pairs = laboratory._exact(
        model,
        jnp.asarray(sample.images[0] / np.float32(255)),
        jnp.asarray(sample.classes[0]),
        score=log_odds,
        depth=DEPTH,
        key=jax.random.key(0),
    )
    np.testing.assert_allclose(
        np.abs(pairs.values[:3]), np.abs(sample.softmax_values[0][:3]), rtol=1e-3
    )


def test_interrupted_measurement_goes_on_to_the_same_bytes(
    folder, attacked, measured, tmp_path, capsys, monkeypatch, plain
):
    run = tmp_path / "run"
    shutil.copytree(attacked, run)
    words = ["curvature", str(run), *of(folder), *NUMBERS]
    with monkeypatch.context() as patch:
        saved = laboratory.Parts.save

        def stop(self, part, arrays):
            saved(self, part, arrays)
            if part == ("pgd", 1):
                raise KeyboardInterrupt

        patch.setattr(laboratory.Parts, "save", stop)
        assert cli.main(words) == 130
    hint = "adv2: interrupted; 5 of 10 parts are kept, --resume goes on from them\n"
    assert capsys.readouterr().err == hint
    files = {path.name for path in attacked.iterdir()}
    assert {path.name for path in run.iterdir()} == files | {"curvature"}
    # the report and the transfer of a run that is being measured are those of the run
    assert (run / "report.html").read_bytes() == (attacked / "report.html").read_bytes()
    refused(cli.main(words), capsys, "holds an unfinished run: go on with it (--resume)")
    other = [*words, "--depth", "9", "--resume"]
    refused(cli.main(other), capsys, "other settings: depth was 24, is 9")
    seen = []

    def count(title, steps, done=0, images=None):
        seen.append((title, steps, done, images))
        return seen.append

    with monkeypatch.context() as patch:
        patch.setattr(cli.commands, "progress_bars", lambda quiet: contextlib.nullcontext(count))
        assert cli.main([*words, "--resume"]) == 0
    assert seen == [("curvature", 10, 5, 9), 1, 1, 1, 1, 1]
    assert (run / "curvature.npz").read_bytes() == (measured / "curvature.npz").read_bytes()
    one, other = (read_summary(directory, "curvature.json") for directory in (run, measured))
    for key in ("rows", "fidelity", "correlation", "fingerprints", "counts"):
        assert one[key] == other[key]
    printed = capsys.readouterr().out
    assert "Exact |λ|" in printed and "matched neuron box" in printed and "report: " in printed


def test_what_cannot_be_published_leaves_the_run_as_it_was(
    measured, tmp_path, folder, capsys, monkeypatch, plain
):
    run = tmp_path / "run"
    shutil.copytree(measured, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def full(directory):
        assert read_summary(directory, "curvature.json")["config"]["seed"] == 1
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["curvature", str(run), *of(folder), *NUMBERS, "--seed", "1", "--limit", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", full)
        code = cli.main([*words, "--overwrite", "--quiet"])
    refused(code, capsys, "No space left on device; 4 of 4 parts are kept")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert cli.main([*words, "--resume", "--quiet"]) == 0
    assert read_summary(run, "curvature.json")["counts"]["images"] == 1


def test_a_source_is_measured_into_a_folder_of_its_own(folder, tmp_path, capsys, plain):
    out = tmp_path / "out"
    words = ["curvature", *of(folder), "--images", f"{folder}/images.npz", *NUMBERS]
    assert cli.main([*words, "--label", "target", "--limit", "1", "--out", str(out)]) == 0
    files = ["curvature.json", "curvature.npz", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == files
    summary, arrays = read_summary(out, "curvature.json"), arrays_of(out)
    assert [row["images"] for row in summary["rows"]] == ["benign"] and "correlation" not in summary
    assert arrays["benign/classes"] != read_arrays(folder / "images.npz")["labels"][0]
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "Curvature" in page.inside("h1")
    assert "matched neuron box" in page.inside("th")
    if find_spec("matplotlib"):
        spectrum = pictures.spectra(pictures.read(out))
        assert [axis.get_title() for axis in spectrum.axes[:2]] == ["benign", "image"]
    capsys.readouterr()
    refused(cli.main([*words, "--out", str(out)]), capsys, "holds a finished run (curvature.json")
    assert sorted(path.name for path in out.iterdir()) == files


def test_options_of_the_command_are_those_of_the_measurement(folder, attacked):
    source = ["curvature", *of(folder), "--images", f"{folder}/images.npz", "--out", "out"]
    words = ["--score", "cross_entropy", "--depth", "5"]
    asked = cli.subject.measured_of(parser().parse_args([*source, *words]))
    assert asked.options == Options(grad_interpreter(), cross_entropy, depth=5)
    assert asked.config["interpreter"] == "grad" and asked.config["images"] == source[4]
    labels = read_arrays(folder / "images.npz")["labels"]
    np.testing.assert_array_equal(asked.images.samples[0].classes, labels)
    run = ["curvature", str(attacked), *of(folder), "--label", "true", "--limit", "2"]
    asked = cli.subject.measured_of(parser().parse_args(run))
    assert asked.options.interpreter.name == "cam"  # the first: there is no GRAD
    for sample in asked.images.samples:
        np.testing.assert_array_equal(sample.classes, labels[:2])


def refused(code, capsys, expected):
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("adv2: ") and message.count("\n") == 1, message
    assert expected in message


BAD = {
    "without a finished run, --out DIR says where to write": (False, []),
    "--out is not for a finished run": (True, ["--out", "elsewhere"]),
    "--images is not for a finished run": (True, ["--images", "shapes"]),
    "interpreter of {run} 'grad' is not one of cam": (
        True,
        ["--interpreter", "grad", "--overwrite"],
    ),
    "the map of mask is made in steps": (False, ["--interpreter", "mask", "--out", "out"]),
    "probes = 1 must be 2 or more": (False, ["--probes", "1", "--out", "out"]),
    "'0' is not a number above 0": (True, ["--tau", "0"]),
    "invalid choice: 'odds' (choose from": (True, ["--score", "odds"]),
    "nothing to resume": (True, ["--resume", "--overwrite"]),
    "holds a finished run (curvature.json, curvature.npz): --overwrite replaces it\n": (True, []),
    "the network holds": (True, ["--model", "own.py:Deaf", "--overwrite"]),
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_words_are_refused(folder, measured, tmp_path, capsys, monkeypatch, expected):
    monkeypatch.chdir(folder)
    of_run, words = BAD[expected]
    subject = [str(measured)] if of_run else []
    images = [] if of_run else ["--images", "images.npz"]
    before = sorted(folder.iterdir()), sorted(measured.iterdir())
    code = cli.main(["curvature", *subject, *of(folder), *images, *words])
    refused(code, capsys, expected.format(run=measured))
    assert (sorted(folder.iterdir()), sorted(measured.iterdir())) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Deaf", "^Deaf does not pass act on: 1 ReLUs stay"),
        ("Smooth", "^Smooth does not call the activation that it is given"),
    ],
)
def test_networks_without_relus_to_replace_are_refused(folder, tmp_path, name, expected):
    network = cli.subject.models.user.load(f"{folder}/own.py:{name}", None)
    source = of_source(network, ImageSet(np.zeros((1, SIDE, SIDE, 3), np.uint8)))
    with pytest.raises(ValueError, match=expected):
        study(network, source, OPTIONS, tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_image_that_fails_costs_itself_only(model, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    images[1] = 0
    source = of_source(model, ImageSet(images, names=np.array(["a.png", "black.png"])))
    summary = study(model, source, OPTIONS, tmp_path, compared=2)
    assert summary["failed"] == ["black.png"] and summary["counts"]["failed"] == 1
    (row,) = summary["rows"]
    assert (row["n"], row["failed"]) == (1, 1) and np.isfinite(row["trace"])
    arrays = arrays_of(tmp_path)
    assert arrays["benign/failed"].tolist() == [False, True]
    assert np.isnan(arrays["benign/softmax_top"][1]) and np.isnan(arrays["benign/trace"][1])
    assert np.isfinite(np.array(summary["fidelity"]["cosine"], float)).all()


def test_the_page_has_the_section_whoever_renders_it(folder, measured, attacked, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(measured, run)
    matrix = {
        "interpreters": ["cam"],
        "sources": ["benign"],
        "map_l1": [[0.0]],
        "map_iou75": [[1.0]],
    }
    add(load_run(run), publish=report.write, transfer=matrix)
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert {"Transfer", "Curvature"} <= set(page.inside("a"))
    alts = [img["alt"] for img in page.attributes("img") if img["class"] == "plot"]
    assert [alt.split()[0] for alt in alts] == ["Heat", "Spectra", "Scatter"]
    # what is measured of a run does not outlive it
    words = [*of(folder), "--images", f"{folder}/images.npz", "--epsilon", "0.1", *SHORT]
    assert cli.main(["attack", *words, "--overwrite", "--out", str(run)]) == 0
    assert not (run / "curvature.json").exists() and not (run / "curvature.npz").exists()
    assert "Curvature" not in (run / "report.html").read_text(encoding="utf-8")


def test_without_matplotlib_there_are_tables(measured, plain):
    html = pictures.content(pictures.read(measured))
    page = Page(html)
    assert page.attributes("img") == [] and html.count("<table") == 3
    assert "Pictures need matplotlib: pip install 'adv2_jax[plots]'" in page.inside("p")
    row = read_summary(measured, "curvature.json")["rows"][2]
    assert any("ADV²" in text for text in page.inside("th"))
    assert f"{float(f'{row['frobenius']:.3g}'):,g}" in page.inside("td")


def test_pictures_are_figures_of_the_numbers(measured, monkeypatch):
    pytest.importorskip("matplotlib")
    one = pictures.read(measured)
    fidelity = one.summary["fidelity"]
    figure = pictures.agreement(fidelity)
    heat = figure.axes[0]
    assert heat.get_title() == "Cosine with the secant"
    curved = [
        numbers for numbers, tau in zip(fidelity["cosine"], fidelity["widths"], strict=True) if tau
    ]
    np.testing.assert_allclose(heat.images[0].get_array(), np.array(curved, float))
    path = heat.lines[0].get_xydata()
    # the default preset begins at .35 pixel values and τ = .1: columns and rows are factors
    np.testing.assert_allclose(path[0], [np.log2(0.35 * 32), 3], atol=1e-5)
    narrow = replace(PRESETS["default"]["grad"], tau=lambda n: lambda i: 1e-4 + 0 * i)
    monkeypatch.setitem(PRESETS["default"], "grad", narrow)
    assert pictures.agreement(fidelity).axes[0].lines[0].get_ydata()[-1] == pytest.approx(
        0, abs=1e-5
    )
    spectra = pictures.spectra(one, image=0)
    titles = [axis.get_title() for axis in spectra.axes]
    assert [title for title in titles if title in ("benign", "PGD", "ADV²")] == titles[::4]
    scatter = pictures.fragility({"a": one, "b": one})
    assert scatter.axes[0].get_title().count("Spearman") == 2
    points = scatter.axes[2].collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], one.samples["benign"].normalised, rtol=1e-6)
    np.testing.assert_allclose(points[:, 1], one.samples["adv2"].map_l1, rtol=1e-6)
