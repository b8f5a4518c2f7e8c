"""The page is parsed as a browser would and held against the numbers and pictures it was made from."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from adv2_jax import report

VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Collects tags and text, and fails on the first tag that does not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def inside(self, tag):
        return [data for parent, data in self.text if parent == tag]

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self):
        """Pairs of alternative text and pixels, in the order of the page."""
        prefix = "data:image/png;base64,"
        pictures = []
        for img in self.attributes("img"):
            assert img["src"].startswith(prefix)
            file = io.BytesIO(base64.b64decode(img["src"].removeprefix(prefix)))
            pictures.append((img["alt"], np.asarray(Image.open(file))))
        return pictures


def make_row(interpreter, attack, **changes):
    measures = {"asr": 0.9375, "mc": 0.8765, "map_l1": 0.1234, "map_l2": 0.2345, "map_iou75": 0.345, "map_iou50": 0.456}
    cost = {"linf": 7.905 / 255, "l2": 1.5678, "gradient_evaluations": 1250, "seconds": 12.34}
    return {"interpreter": interpreter, "attack": attack, "threat": "linf", "n": 16, **measures, **cost, **changes}


def make_summary(interpreters=("cam",), **changes):
    rows = [make_row(interpreter, attack) for interpreter in interpreters for attack in ("pgd", "adv2")]
    config = {"command": "adv2 demo", "model": "tiny", "interpreters": list(interpreters), "threat": "linf"}
    return {"schema": 1, "config": config, "environment": {"python": "3.12"}, "counts": {}, "rows": rows, **changes}


def make_results(n=3, height=16, width=16, interpreters=("cam",)):
    rng = np.random.default_rng(0)
    pixels = lambda: rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)  # noqa: E731
    maps = lambda: rng.random((n, 4, 4), dtype=np.float32)  # noqa: E731
    results = {"images": pixels(), "labels": np.zeros(n, np.int32), "targets": np.ones(n, np.int32)}
    results["indices"] = np.arange(n, dtype=np.int32) + 40
    for interpreter in interpreters:
        results[f"{interpreter}/benign_maps"] = results[f"{interpreter}/target_maps"] = maps()
        for attack in ("pgd", "adv2"):
            results[f"{interpreter}/{attack}/images"] = pixels()
            results[f"{interpreter}/{attack}/maps"] = maps()
            results[f"{interpreter}/{attack}/confidence"] = np.full(n, 0.625, np.float32)
            results[f"{interpreter}/{attack}/success"] = np.arange(n) != 1
            results[f"{interpreter}/{attack}/map_l1"] = np.full(n, 0.0625, np.float32)
    return results


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (32, 32)])
def test_png_is_read_back_exactly(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(report.png(image)))), image)


def test_colours_grow_lighter_from_black_to_light_yellow():
    colours = report.colour_map(np.linspace(0, 1, 101))
    assert colours.dtype == np.uint8
    assert colours[0].max() < 10 and colours[-1].min() > 150
    assert (np.diff(colours @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_colours_keep_the_shape_and_clip():
    assert report.colour_map(np.zeros((2, 5, 7))).shape == (2, 5, 7, 3)
    np.testing.assert_array_equal(report.colour_map([-1.0, 2.0]), report.colour_map([0.0, 1.0]))


def test_difference_is_ten_times_around_grey_and_clips():
    benign = np.full((1, 4, 3), 100, np.uint8)
    image = benign + np.array([0, 8, 100, 0], np.uint8)[:, None]
    image[0, 3] = 92
    assert report.amplified_difference(image, benign)[0, :, 0].tolist() == [128, 208, 255, 48]


def test_page_is_balanced_and_needs_nothing_else():
    html = report.render(make_summary(("grad", "cam")), make_results(interpreters=("grad", "cam")))
    page = Page(html)
    assert page.attributes("html")[0]["lang"] == "en"
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in page.attributes("a")} <= anchors
    assert all(img["alt"] for img in page.attributes("img"))
    assert all(header.get("scope") for header in page.attributes("th"))


def test_pictures_are_those_of_the_run():
    results = make_results(n=1)
    pictures = Page(report.render(make_summary(), results)).pictures()
    expected = [results["images"][0], report.colour_map(results["cam/benign_maps"][0])]
    for attack in ("pgd", "adv2"):
        expected += [results[f"cam/{attack}/images"][0], report.colour_map(results[f"cam/{attack}/maps"][0])]
    expected += [report.amplified_difference(results["cam/adv2/images"][0], results["images"][0])]
    for (_, picture), pixels in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(picture, pixels)


def test_table_shows_the_numbers_of_every_row():
    summary = make_summary()
    summary["rows"][0] |= {"asr": 1.0, "mc": None, "map_l1": float("nan")}
    summary["rows"][1] |= {"pointing_game": 0.75}
    cells = Page(report.render(summary, make_results())).inside("td")
    plain = ["16", "1.000", "–", "–", "0.2345", "0.345", "0.456", "7.91", "1.568", "1,250", "12.3", "–"]
    adv2 = ["16", "0.938", "0.876", "0.1234", "0.2345", "0.345", "0.456", "7.91", "1.568", "1,250", "12.3", "0.7500"]
    assert cells == plain + adv2


def test_table_names_rows_and_columns():
    page = Page(report.render(make_summary(("grad_cam", "own")), make_results()))
    heads = page.inside("th")
    assert heads[:3] == ["Interpreter", "Attack", "Images"]
    assert heads[13:] == ["Grad-CAM", "PGD", "ADV²", "own", "PGD", "ADV²"]


def test_captions_tell_class_confidence_distance_and_success():
    page = Page(report.render(make_summary(classes=["cat", "ship"]), make_results(n=2)))
    assert [text for text in page.inside("h3") if text.startswith("Image")] == [
        "Image 40: cat → ship",
        "Image 41: cat → ship",
    ]
    first, second = ["✓ success", "p(ship) 0.62", "map L1 0.062"], ["✗ failed", "p(ship) 0.62", "map L1 0.062"]
    spans = [text for text in page.inside("span") if text[0] in "✓✗" or text.startswith(("p(", "map"))]
    assert spans == 2 * first + 2 * second


@pytest.mark.parametrize("classes", [None, ["cat"]])
def test_classes_without_a_name_are_numbers(classes):
    page = Page(report.render(make_summary(classes=classes), make_results(n=1)))
    assert any(text.endswith("→ class 1") for text in page.inside("h3"))


def test_images_are_called_by_their_files():
    results = make_results(n=2) | {"names": np.array(["a/1.png", "b <2>.png"])}
    page = Page(report.render(make_summary(), results))
    assert [text.split(":")[0] for text in page.inside("h3")[:2]] == ["Image 40 (a/1.png)", "Image 41 (b <2>.png)"]


def test_what_comes_from_files_is_escaped():
    evil = '"><script>alert(1)</script>&amp;'
    summary = make_summary(classes=[evil, evil], environment={evil: evil})
    summary["config"] |= {"command": evil, "model": evil}
    summary["counts"] = {"left_out": evil}
    summary["rows"][0][evil] = evil
    summary["rows"] += [make_row(evil, evil)]
    results = make_results()
    results |= {f"{evil}/benign_maps": results["cam/benign_maps"]}
    html = report.render(summary, results)
    page = Page(html)
    assert "<script" not in html
    assert page.inside("code") == [evil]
    assert any(evil in img["alt"] for img in page.attributes("img"))


def test_target_map_is_shown_only_where_it_is_another():
    results = make_results(n=2)
    results["cam/target_maps"] = results["cam/target_maps"].copy()
    results["cam/target_maps"][1] = 1.0
    pictures = Page(report.render(make_summary(), results)).pictures()
    targets = [(alt, picture) for alt, picture in pictures if alt.startswith("Target map")]
    assert [alt for alt, _ in targets] == ["Target map of image 41"]
    assert (targets[0][1] == report.colour_map(1.0)).all()


def test_true_object_is_shown_where_known():
    masks = np.zeros((3, 16, 16), bool)
    html = report.render(make_summary(), make_results() | {"masks": masks})
    assert sum(alt.startswith("True object") for alt, _ in Page(html).pictures()) == 3


def test_optional_parts_may_be_missing():
    summary = {"schema": 1, "rows": make_summary()["rows"]}
    results = make_results()
    unfinished = {name: array for name, array in results.items() if not name.startswith("cam/adv2")}
    del unfinished["cam/target_maps"]
    alts = [alt for alt, _ in Page(report.render(summary, unfinished)).pictures()]
    assert len(alts) == 3 * 4 and not any("ADV²" in alt for alt in alts)
    assert Page(report.render(summary, {"images": results["images"]})).pictures() == []


def test_arrays_that_are_not_per_image_are_ignored():
    extra = {"seed": np.array(0), "cam/adv2/history": np.zeros(2), "loss": np.zeros(0)}
    assert report.render(make_summary(), make_results() | extra) == report.render(make_summary(), make_results())


def test_no_image_left_gives_a_page_without_pictures():
    assert Page(report.render(make_summary(), make_results(n=0))).pictures() == []


def test_plain_attack_by_flow_is_called_stadv():
    summary = make_summary()
    summary["rows"] = [row | {"threat": "flow"} for row in summary["rows"]]
    html = report.render(summary, make_results(n=1))
    assert "StAdv" in Page(html).inside("th") and "StAdv" in Page(html).inside("b") and "PGD" not in html


def test_cut_pictures_are_announced():
    results = make_results(n=5)
    cut, whole = report.render(make_summary(), results, limit=2), report.render(make_summary(), results)
    assert len(Page(cut).pictures()) == 2 * 7 and len(Page(whole).pictures()) == 5 * 7
    assert "first 2 of 5 images" in cut and "images; the table" not in whole


def test_large_pictures_shrink_and_keep_their_mean():
    results = make_results(n=1, height=168, width=336)
    _, picture = Page(report.render(make_summary(), results)).pictures()[0]
    assert picture.shape == (56, 112, 3)
    assert abs(picture.mean() - results["images"].mean()) < 1


def test_overview_sets_the_tiles_side_by_side():
    results = make_results(n=3)
    picture = report.overview(results, "cam", [2, 0], side=32, gap=1)
    assert picture.dtype == np.uint8 and picture.shape == (2 * 34, 7 * 34 + 3 * 2, 3)
    np.testing.assert_array_equal(picture[1:33:2, 1:33:2], results["images"][2])
    np.testing.assert_array_equal(picture[35:67:2, 71:103:2], results["cam/pgd/images"][0])


def test_write_puts_the_page_beside_its_files(tmp_path):
    summary, results = make_summary(), make_results()
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    np.savez(tmp_path / "results.npz", **results)
    page = report.write(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text(encoding="utf-8") == report.render(summary, results)


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match=r"schema 2.*reads schema 1"):
        report.render({"schema": 2, "rows": []}, make_results())


def make_training(**changes):
    config = {"command": "adv2 train classifier", "model": "tiny", "epochs": 2}
    counts = {"train": 900, "held_out": 100}
    found = {"classes": ["cat", "ship"], "accuracy": 0.91234, "accuracy_before": None}
    losses = [3.0, 2.0, 2.5, 1.0]
    return {
        "schema": 1,
        "config": config,
        "environment": {"python": "3.12"},
        "counts": counts,
        **found,
        "losses": losses,
        **changes,
    }


def training_page(folder, **changes):
    (folder / "summary.json").write_text(json.dumps(make_training(**changes)), encoding="utf-8")
    path = report.write_training(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_training_page_tells_what_was_trained_and_measured(tmp_path):
    page = training_page(tmp_path)
    assert dict(zip(page.inside("dt"), page.inside("dd"), strict=True)) == {
        "Model": "tiny",
        "Images trained on": "900",
        "Held out": "100",
        "Held-out accuracy": "0.9123",
        "model": "tiny",
        "epochs": "2",
        "python": "3.12",
    }
    assert page.inside("code") == ["adv2 train classifier"]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html and "<script" not in html


def test_accuracy_before_fine_tuning_is_told_where_it_was_measured(tmp_path):
    page = training_page(tmp_path, accuracy_before=0.5)
    facts = dict(zip(page.inside("dt"), page.inside("dd"), strict=True))
    assert (facts["Held-out accuracy"], facts["Before"]) == ("0.9123", "0.5000")


def curve(page):
    """Points of the loss curve, and what is written beside it."""
    (line,) = page.attributes("polyline")
    points = np.array([point.split(",") for point in line["points"].split()], float)
    return points, page.attributes("svg")[0]["aria-label"], page.inside("text")


def test_curve_goes_through_every_loss_of_a_short_training(tmp_path):
    points, label, words = curve(training_page(tmp_path))
    assert (np.diff(points[:, 0]) > 0).all() and np.allclose(np.diff(points[:, 0], 2), 0)  # steps are equally far apart
    heights = points[:, 1].max() - points[:, 1]  # the picture grows downwards
    np.testing.assert_allclose(heights / heights.max(), [1, 0.5, 0.75, 0], atol=1e-3)
    assert label == "loss from 3 to 1 over 4 steps"
    assert words == ["step 1", "step 4, loss 1", "highest 3, lowest 1"]


@pytest.mark.parametrize("n", [201, 5000])
def test_curve_of_a_long_training_is_of_means(tmp_path, n):
    losses = np.linspace(2, 0, n)
    points, label, _ = curve(training_page(tmp_path, losses=list(losses)))
    assert len(points) == 200
    heights = points[:, 1].max() - points[:, 1]
    np.testing.assert_allclose(heights / heights.max(), np.linspace(1, 0, 200), atol=5e-3)
    assert label.endswith(f"over {n} steps")


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5]])
def test_curve_without_a_slope_has_finite_points(tmp_path, losses):
    points, *_ = curve(training_page(tmp_path, losses=losses))
    assert points.shape == (len(losses), 2) and np.isfinite(points).all()


def test_quality_is_a_table_of_interpreters(tmp_path):
    numbers = {"n": 200, "kept": 0.8765, "removed": 0.1234, "inside": 0.75, "outside": 0.0625, "pointing_game": 0.98, "iou": 0.5}
    unknown = dict.fromkeys(("inside", "outside", "pointing_game", "iou"))
    quality = [{"interpreter": "rts", **numbers}, {"interpreter": "grad_cam", **numbers, **unknown}]
    page = training_page(tmp_path, quality=quality)
    heads = page.inside("th")
    assert heads == ["Interpreter", "N", "Kept", "Removed", "Inside", "Outside", "Pointing game", "Iou"]
    first = ["RTS", "200", "0.876", "0.123", "0.750", "0.062", "0.980", "0.500"]
    assert page.inside("td") == [*first, "Grad-CAM", *first[1:4], "–", "–", "–", "–"]
    assert "Do the maps explain?" in page.inside("h2")
    assert "Do the maps explain?" not in training_page(tmp_path).inside("h2")


def test_what_comes_from_a_training_is_escaped(tmp_path):
    evil = '"><script>alert(1)</script>&amp;'
    config = {"command": evil, "model": evil}
    page = training_page(tmp_path, config=config, quality=[{"interpreter": evil, evil: evil}])
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.inside("td") == [evil, evil] and page.inside("code") == [evil]


def test_a_training_of_another_schema_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"schema 2.*reads schema 1"):
        training_page(tmp_path, schema=2)
    assert not (tmp_path / "report.html").exists()
