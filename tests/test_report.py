"""The page, parsed as a browser would, shows the numbers and pictures it was made from."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from adv2_jax import report
from adv2_jax.report import charts, tables, words

VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """Collect tags and text, and fail on the first tag that does not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.unlabelled = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        wanted = {label.get("for") for label in self.attributes("label")}
        self.unlabelled = [
            control for control in self.unlabelled if control.get("id") not in wanted
        ]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("input", "select", "textarea") and "label" not in self.open:
            self.unlabelled.append(dict(attrs))
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
        """Return pairs of alternative text and pixels, but for those that only lie below others."""
        images = [img for img in self.attributes("img") if "base" not in img["class"].split()]
        return [(img["alt"], np.asarray(opened(img).convert("RGB"))) for img in images]


def opened(img):
    prefix = "data:image/png;base64,"
    assert img["src"].startswith(prefix)
    return Image.open(io.BytesIO(base64.b64decode(img["src"].removeprefix(prefix))))


def map_colours(values):
    """Return the colours of maps as the file has them, one of 256."""
    return report.colour_map(np.round(255 * np.asarray(values, float)) / 255)


def make_row(interpreter, attack, **changes):
    measures = {
        "asr": 0.9375,
        "mc": 0.8765,
        "map_l1": 0.1234,
        "map_l2": 0.2345,
        "map_iou75": 0.345,
        "map_iou50": 0.456,
    }
    cost = {"linf": 7.905 / 255, "l2": 1.5678, "gradient_evaluations": 1250, "seconds": 12.34}
    return {
        "interpreter": interpreter,
        "attack": attack,
        "threat": "linf",
        "n": 16,
        **measures,
        **cost,
        **changes,
    }


def make_summary(interpreters=("cam",), **changes):
    rows = [
        make_row(interpreter, attack) for interpreter in interpreters for attack in ("pgd", "adv2")
    ]
    config = {
        "command": "adv2 demo",
        "model": "tiny",
        "interpreters": list(interpreters),
        "threat": "linf",
    }
    return {
        "schema": 1,
        "config": config,
        "environment": {"python": "3.12"},
        "counts": {},
        "rows": rows,
        **changes,
    }


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


def with_everything(summary, results):
    """Return the run with all it may have: intervals, paired, transfer, curves, snapshots, flow."""
    rng = np.random.default_rng(2)
    (n, height, width, _), names = results["images"].shape, summary["config"]["interpreters"]
    results = dict(results)
    for key in [f"{name}/{attack}" for name in names for attack in ("pgd", "adv2")]:
        results[f"{key}/curve_steps"] = np.array([0, 10, 20, 40], np.int32)
        for curve in ("loss", "confidence", "map_l1"):
            results[f"{key}/curve_{curve}"] = rng.random((n, 4), dtype=np.float32)
        results[f"{key}/snapshot_steps"] = np.array([0, 20, 40], np.int32)
        results[f"{key}/snapshot_images"] = rng.integers(
            0, 256, (2, 3, height, width, 3), dtype=np.uint8
        )
        results[f"{key}/snapshot_maps"] = rng.random((2, 3, 4, 4), dtype=np.float32)
        results[f"{key}/snapshot_confidence"] = np.tile(
            np.array([0.01, 0.5, 0.98], np.float32), (2, 1)
        )
        results[f"{key}/flow"] = rng.normal(size=(n, height, width, 2)).astype(np.float32)
    rows = [
        row | {"ci": {"map_l1": [0.11, 0.14]}, "mean_displacement": 0.25, "flow_penalty": 3.5}
        for row in summary["rows"]
    ]
    paired = [
        {
            "interpreter": names[0],
            "threat": "flow",
            "measure": "map_l1",
            "n": n,
            "difference": -0.08,
            "ci": [-0.1, 0.05],
        }
    ]
    sources = ["benign", "pgd", *names]
    numbers = rng.random((len(sources), len(names))).tolist()
    transfer = {"interpreters": names, "sources": sources, "map_l1": numbers, "map_iou75": numbers}
    models = [
        {
            "model": "other",
            "source": "pgd",
            "n": n,
            "asr": 0.5,
            "interpreter": names[0],
            "map_l1": 0.1,
            "map_iou75": 0.7,
        }
    ]
    return summary | {
        "rows": rows,
        "paired": paired,
        "transfer": transfer,
        "models": models,
    }, results


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
    assert (
        "http:" not in html
        and "https:" not in html
        and "url(" not in html
        and "@import" not in html
    )
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert page.attributes("script") == [{}] and page.attributes("style") == [{}]
    assert not [
        name
        for _, attributes in page.tags
        for name in attributes
        if name.startswith("on") or name in ("srcset", "action")
    ]
    assert all(header.get("scope") for header in page.attributes("th"))


@pytest.mark.parametrize("extra", [False, True])
def test_page_can_be_used_without_seeing_it(extra):
    summary, results = (
        make_summary(("grad", "a b", "a-b")),
        make_results(interpreters=("grad", "a b", "a-b")),
    )
    page = Page(
        report.render(*(with_everything(summary, results) if extra else (summary, results)))
    )
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes.get("aria-labelledby", "").split() for _, attributes in page.tags]
    named += [
        [label["for"]]
        for label in page.attributes("label") + page.attributes("output")
        if "for" in label
    ]
    named += [[link["href"].removeprefix("#")] for link in page.attributes("a")]
    assert {name for names in named for name in names} <= set(ids)
    assert all(img["alt"] or "base" in img["class"].split() for img in page.attributes("img"))
    drawings = [svg for svg in page.attributes("svg") if svg.get("aria-hidden") != "true"]
    assert all(
        svg["role"] == "img" and (svg.get("aria-label") or svg.get("aria-labelledby"))
        for svg in drawings
    )
    assert page.unlabelled == []
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) <= 1


def test_pictures_are_those_of_the_run():
    results = make_results(n=1)
    pictures = Page(report.render(make_summary(), results)).pictures()
    expected = [results["images"][0], map_colours(results["cam/benign_maps"][0])]
    for attack in ("pgd", "adv2"):
        expected += [
            results[f"cam/{attack}/images"][0],
            map_colours(results[f"cam/{attack}/maps"][0]),
        ]
    expected += [report.amplified_difference(results["cam/adv2/images"][0], results["images"][0])]
    for (_, picture), pixels in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(picture, pixels)


def test_table_shows_the_numbers_of_every_row():
    summary = make_summary()
    summary["rows"][0] |= {"asr": 1.0, "mc": None, "map_l1": float("nan")}
    summary["rows"][1] |= {"pointing_game": 0.75}
    cells = Page(report.render(summary, make_results())).inside("td")
    plain = [
        "16",
        "1.000",
        "–",
        "–",
        "0.2345",
        "0.345",
        "0.456",
        "7.91",
        "1.568",
        "–",
        "1,250.0",
        "12.3",
    ]
    adv2 = [
        "16",
        "0.938",
        "0.876",
        "0.1234",
        "0.2345",
        "0.345",
        "0.456",
        "7.91",
        "1.568",
        "0.750",
        "1,250.0",
        "12.3",
    ]
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
    first, second = (
        ["✓ success", "p(ship) 0.62", "map L1 0.062"],
        ["✗ failed", "p(ship) 0.62", "map L1 0.062"],
    )
    spans = [
        text for text in page.inside("span") if text[0] in "✓✗" or text.startswith(("p(", "map"))
    ]
    assert spans == 2 * first + 2 * second


@pytest.mark.parametrize("classes", [None, ["cat"]])
def test_classes_without_a_name_are_numbers(classes):
    page = Page(report.render(make_summary(classes=classes), make_results(n=1)))
    assert any(text.endswith("→ class 1") for text in page.inside("h3"))


def test_images_are_called_by_their_files():
    results = make_results(n=2) | {"names": np.array(["a/1.png", "b <2>.png"])}
    page = Page(report.render(make_summary(), results))
    assert [text.split(":")[0] for text in page.inside("h3")[:2]] == [
        "Image 40 (a/1.png)",
        "Image 41 (b <2>.png)",
    ]


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
    assert len(page.attributes("script")) == 1 and "alert" not in "".join(page.inside("script"))
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
    extra = {
        "seed": np.array(0),
        "cam/adv2/history": np.zeros(2),
        "loss": np.zeros(0),
        "cam/adv2/steps": np.zeros(3),
    }
    assert report.render(make_summary(), make_results() | extra) == report.render(
        make_summary(), make_results()
    )


def test_no_image_left_gives_a_page_without_pictures():
    assert Page(report.render(make_summary(), make_results(n=0))).pictures() == []


def test_plain_attack_by_flow_is_called_stadv():
    summary = make_summary()
    summary["rows"] = [row | {"threat": "flow"} for row in summary["rows"]]
    html = report.render(summary, make_results(n=1))
    page = Page(html)
    assert (
        "StAdv" in page.inside("th")
        and "StAdv" in page.inside("b")
        and "StAdv succeeds" in page.inside("option")
    )
    assert not [text for parent, text in page.text if "PGD" in text and parent != "script"]


def test_cut_pictures_are_announced():
    results = make_results(n=5)
    cut, whole = (
        report.render(make_summary(), results, limit=2),
        report.render(make_summary(), results),
    )
    assert len(Page(cut).pictures()) == 2 * 7 and len(Page(whole).pictures()) == 5 * 7
    assert "first 2 of 5 images" in cut and "images; the table" not in whole


def test_large_pictures_shrink_and_keep_their_mean():
    results = make_results(n=1, height=168, width=336)
    _, picture = Page(report.render(make_summary(), results)).pictures()[0]
    assert picture.shape == (56, 112, 3)
    assert abs(picture.mean() - results["images"].mean()) < 1
    assert len(np.unique(picture)) <= 64


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
    measured = {"classes": ["cat", "ship"], "accuracy": 0.91234, "accuracy_before": None}
    losses = [3.0, 2.0, 2.5, 1.0]
    return {
        "schema": 1,
        "config": config,
        "environment": {"python": "3.12"},
        "counts": counts,
        **measured,
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
    assert "http:" not in html and "https:" not in html and html.count("<script") == 1  # our own


def test_accuracy_before_fine_tuning_is_told_where_it_was_measured(tmp_path):
    page = training_page(tmp_path, accuracy_before=0.5)
    facts = dict(zip(page.inside("dt"), page.inside("dd"), strict=True))
    assert (facts["Held-out accuracy"], facts["Before"]) == ("0.9123", "0.5000")


def curve(page):
    """Points of the loss curve, and what is said of it."""
    (line,) = page.attributes("polyline")
    points = np.array([point.split(",") for point in line["points"].split()], float)
    return points, *page.inside("desc")


def test_curve_goes_through_every_loss_of_a_short_training(tmp_path):
    points, said = curve(training_page(tmp_path))
    # equally far apart, in tenths
    assert (np.diff(points[:, 0]) > 0).all() and np.allclose(np.diff(points[:, 0], 2), 0, atol=0.21)
    heights = points[:, 1].max() - points[:, 1]  # the picture grows downwards
    # tenths of 160
    np.testing.assert_allclose(heights / heights.max(), [1, 0.5, 0.75, 0], atol=2e-3)
    assert said == "loss from 3 to 1, over step 1 to 4."


@pytest.mark.parametrize("n", [201, 5000])
def test_curve_of_a_long_training_is_of_means(tmp_path, n):
    losses = np.linspace(2, 0, n)
    points, said = curve(training_page(tmp_path, losses=list(losses)))
    assert len(points) == 200
    heights = points[:, 1].max() - points[:, 1]
    np.testing.assert_allclose(heights / heights.max(), np.linspace(1, 0, 200), atol=5e-3)
    assert said.endswith(f" to {n}.")


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5]])
def test_curve_without_a_slope_has_finite_points(tmp_path, losses):
    points, *_ = curve(training_page(tmp_path, losses=losses))
    assert points.shape == (len(losses), 2) and np.isfinite(points).all()


def test_quality_is_a_table_of_interpreters(tmp_path):
    numbers = {
        "n": 200,
        "confidence_kept": 0.8765,
        "confidence_removed": 0.1234,
        "inside": 0.75,
        "outside": 0.0625,
        "pointing_game": 0.98,
        "iou": 0.5,
    }
    unknown = dict.fromkeys(("inside", "outside", "pointing_game", "iou"))
    quality = [{"interpreter": "rts", **numbers}, {"interpreter": "grad_cam", **numbers, **unknown}]
    page = training_page(tmp_path, quality=quality)
    heads = [
        "Interpreter",
        "N",
        "Confidence kept",
        "Confidence removed",
        "Inside",
        "Outside",
        "Pointing game",
        "IoU",
    ]
    assert page.inside("th") == [*heads, "RTS", "Grad-CAM"]
    first = ["200", "0.876", "0.123", "0.750", "0.062", "0.980", "0.500"]
    assert page.inside("td") == [*first, *first[:3], "–", "–", "–", "–"]
    assert "Do the maps explain?" in page.inside("h2")
    assert "Do the maps explain?" not in training_page(tmp_path).inside("h2")


def test_what_comes_from_a_training_is_escaped(tmp_path):
    evil = '"><script>alert(1)</script>&amp;'
    config = {"command": evil, "model": evil}
    page = training_page(tmp_path, config=config, quality=[{"interpreter": evil, evil: evil}])
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<script") == 1  # our own
    assert (
        evil in page.inside("th") and page.inside("td") == [evil] and page.inside("code") == [evil]
    )


def test_a_training_of_another_schema_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"schema 2.*reads schema 1"):
        training_page(tmp_path, schema=2)
    assert not (tmp_path / "report.html").exists()


def test_what_lies_below_a_map_is_its_image_in_grey():
    results = make_results(n=1)
    page = Page(report.render(make_summary(), results))
    below = [opened(img) for img in page.attributes("img") if "base" in img["class"].split()]
    images = [results["images"][0], results["cam/pgd/images"][0], results["cam/adv2/images"][0]]
    for picture, image in zip(below, images, strict=True):
        assert picture.mode == "L"
        expected = np.asarray(Image.fromarray(image).convert("L"), int)
        assert np.abs(np.asarray(picture, int) - expected).max() <= 1  # one rounds, the other cuts


def test_a_map_with_a_palette_is_a_third_of_the_colours_of_it():
    values = report.colour_map(np.random.default_rng(3).random((64, 64)))
    levels = np.random.default_rng(3).integers(0, 256, (64, 64, 1), dtype=np.uint8)
    palette = report.colour_map(np.arange(256) / 255)
    file = report.png(levels, palette=palette)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(file)).convert("RGB")), palette[levels[..., 0]]
    )
    assert len(file) < len(report.png(values)) / 2


def test_intervals_stand_below_their_number():
    summary = make_summary()
    summary["rows"][0]["ci"] = {"map_l1": [0.1, 0.15], "asr": [None, 1.0]}
    html = report.render(summary, make_results())
    assert Page(html).inside("small") == ["– – 1.000", "0.1000 – 0.1500"] and "bootstrap" in html
    assert "bootstrap" not in report.render(make_summary(), make_results())


def test_settings_are_columns_only_where_rows_differ():
    summary = make_summary()
    summary["rows"] = [row | {"target_map": "patch", "model": "tiny"} for row in summary["rows"]]
    page = Page(report.render(summary, make_results()))
    assert "Target map" not in page.inside("th") and "patch" in page.inside("dd")
    summary["rows"][0]["target_map"] = "image"
    page = Page(report.render(summary, make_results()))
    assert (
        "Target map" in page.inside("th")
        and "patch" not in page.inside("dd")
        and "patch" in page.inside("td")
    )


def test_flow_rows_tell_shift_and_penalty():
    summary, results = with_everything(make_summary(), make_results())
    page = Page(report.render(summary, results))
    heads = page.inside("th")
    assert heads[heads.index("L2") + 1 :][:2] == ["Shift, px", "Flow penalty"]
    assert page.inside("td").count("0.250") == page.inside("td").count("3.50") == 2
    assert "Shift, px" not in Page(report.render(make_summary(), make_results())).inside("th")


def test_the_first_paragraph_says_what_the_rows_say():
    rows = [
        make_row("cam", "noise", asr=0.0, map_l1=0.4),
        make_row("cam", "pgd", asr=1.0, map_l1=0.2, gradient_evaluations=150.2),
        make_row("cam", "adv2", asr=0.9375, map_l1=0.01, gradient_evaluations=150.2),
        make_row("grad", "noise", asr=0.0, map_l1=0.1),
        make_row("grad", "pgd", asr=1.0, map_l1=0.12, gradient_evaluations=600.4),
        make_row("grad", "adv2", asr=1.0, map_l1=0.03, gradient_evaluations=600.4),
    ]
    summary = make_summary(("cam", "grad"), rows=rows)
    summary["config"]["epsilon"] = 8 / 255
    results = make_results(interpreters=("cam", "grad"))
    page = report.render(summary, results)
    assert "<dt>Epsilon</dt><dd>8/255</dd>" in page
    said = Page(page).inside("p")[0]
    assert said == (
        "16 images were attacked, each to be taken for another class, with no pixel value changed by "
        "more than 8/255. PGD alone succeeds on 100%; its maps are 0.120 to 0.200 (L1) away from what "
        "they should show. ADV² succeeds on 94% to 100%; its maps are 0.010 to 0.030 away. The "
        "farthest is that of GRAD, 25% of what PGD leaves; random changes as large leave 0.100. "
        "ADV² took 150 to 600 gradients an image, PGD as many."
    )
    joint = [make_row(name, "adv2", joint=True, asr=1.0, map_l1=0.05) for name in ("cam", "grad")]
    said = words.verdict([*rows, *joint], goal="keep")
    assert said.startswith("16 images were attacked, each to keep its class while its map changes.")
    assert "One image for all interpreters succeeds on 100%; its maps are 0.050 away." in said
    assert said.endswith("gradients an image, PGD 150 to 600.")
    # of a run that lacks numbers nothing is said
    assert words.verdict([make_row("cam", "pgd", map_l1=None), *rows[2:3]]) == ""
    assert words.verdict([]) == ""


def test_paired_differences_have_a_sign():
    cells = Page(report.render(*with_everything(make_summary(), make_results()))).inside("td")
    assert cells[cells.index("−0.0800") - 4 :][:6] == [
        "flow",
        "ADV² − plain",
        "Map L1 ↓",
        "3",
        "−0.0800",
        "−0.1000 to +0.0500",
    ]


def test_transfer_is_a_table_of_readable_numbers_with_the_attacked_marked():
    summary, results = with_everything(
        make_summary(("grad", "cam")), make_results(interpreters=("grad", "cam"))
    )
    summary["transfer"]["map_l1"][0][0] = None
    page = Page(report.render(summary, results))
    cells = [
        attributes for attributes in page.attributes("td") if "heat" in attributes.get("class", "")
    ]
    assert len(cells) == 2 * 4 * 2
    assert [k for k, cell in enumerate(cells[:8]) if "attacked" in cell["class"]] == [4, 7]
    numbers = [number for row in summary["transfer"]["map_l1"] for number in row]
    shown = [text for parent, text in page.text if parent == "td"]
    for number in numbers[1:]:
        assert f"{number:.4f}" in shown
    for cell in cells:
        background, ink = cell["style"].split(";")
        colour = np.array(
            background.removeprefix("background:rgb(").removesuffix(")").split(","), float
        )
        assert contrast(colour, np.full(3, 255.0 if ink == "color:#fff" else 0.0)) >= 4.5
    assert len({cell["style"] for cell in cells[:8]}) > 4


def contrast(one, other):
    """Contrast of two sRGB colours [3] in 0..255, from 1 to 21; text needs 4.5 (WCAG 2)."""

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in np.asarray(colour, float) / 255
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_numbers_read_on_every_colour_of_the_scale():
    assert contrast(np.full(3, 118), np.full(3, 255)) == pytest.approx(4.54, abs=0.01)
    for colour in report.colour_map(np.linspace(0, 1, 256)):
        ink = 0 if tables._paint(colour).endswith("#000") else 255
        assert contrast(colour, np.full(3, ink)) >= 4.5


def test_old_runs_have_no_curves_sliders_or_transfer():
    html = report.render(make_summary(), make_results())
    page = Page(html)
    inputs = [control["type"] for control in page.attributes("input")]
    assert (
        page.attributes("svg") == [] and page.attributes("details") == [] and "range" not in inputs
    )
    assert page.inside("h2") == ["Summary", "CAM", "Reproduce"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.073), (-3.2, 17), (5, 5), (0, 0), (0, 1250), (0.98, 0.99)]
)
def test_ticks_are_few_and_round_and_reach_both_ends(low, high):
    ticks = charts.ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 6 and ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    mantissa = step / 10 ** np.floor(np.log10(step) + 1e-9)
    assert min(abs(mantissa - np.array([1, 2, 5]))) < 1e-6
    np.testing.assert_allclose(np.diff(ticks), step)


def test_curves_are_means_with_quartiles_where_every_image_has_a_number():
    values = np.array([[0, np.nan, 4, 8], [1, 1, 5, 8], [2, 2, 9, 8], [9, 3, 10, 8]])
    line = charts.over_images("ADV²", "adv2", [0, 5, 10, 20], values)
    assert line.steps.tolist() == [0, 10, 20] and line.middle.tolist() == [3, 7, 8]
    assert line.low.tolist() == [0.75, 4.75, 8] and line.high.tolist() == [3.75, 9.25, 8]
    assert charts.over_images("PGD", "pgd", [0, 1], np.full((2, 2), np.nan)) is None
    assert charts.over_images("PGD", "pgd", [0, 1], np.zeros((0, 2))) is None


def test_curves_are_drawn_where_their_axes_say():
    line = charts.over_images("ADV²", "adv2", [0, 50, 100], np.array([[0.0, 0.5, 2.0]]))
    page = Page(charts.chart([line], anchor="a", title="Loss"))
    (drawn,) = page.attributes("polyline")
    points = np.array([point.split(",") for point in drawn["points"].split()], float)
    numbers = {
        text["y"]: float(label)
        for text, label in zip(page.attributes("text"), page.inside("text"), strict=True)
        if label != "step"
    }
    levels = sorted((float(y) - 3.5, value) for y, value in numbers.items() if float(y) < 185)
    heights, values = zip(*levels, strict=True)
    # a tenth of a pixel
    np.testing.assert_allclose(np.interp(points[:, 1], heights, values), [0, 0.5, 2], atol=0.01)
    assert points[1, 0] - points[0, 0] == pytest.approx(points[2, 0] - points[1, 0], abs=0.11)
    assert page.inside("desc") == ["ADV² from 0 to 2, over step 0 to 100."]


@pytest.mark.parametrize("last", [400, 1000, 50000])
def test_numbers_of_steps_are_not_cut_off(last):
    line = charts.over_images("ADV²", "adv2", [0, last], np.array([[0.0, 1.0]]))
    page = Page(charts.chart([line], anchor="a", title="Loss"))
    ends = {
        label: float(text["x"])
        for text, label in zip(page.attributes("text"), page.inside("text"), strict=True)
    }
    # a digit of the page's 11 px is 7 wide
    assert ends[str(last)] + 7 * len(str(last)) / 2 <= charts.WIDTH


def test_curves_of_both_attacks_share_a_plot_and_one_may_be_missing():
    summary, results = with_everything(make_summary(), make_results())
    del results["cam/pgd/curve_map_l1"]
    page = Page(report.render(summary, results))
    assert [line["class"] for line in page.attributes("polyline")] == [
        "pgd",
        "adv2",
        "pgd",
        "adv2",
        "adv2",
    ]
    assert page.inside("figcaption") == [
        "Loss of the attack",
        "Confidence in the target class",
        "Map L1",
    ]


def test_arrows_point_along_the_flow():
    flow = np.zeros((28, 28, 2), np.float32)
    flow[:14] = (0, 3)
    flow[14:] = (-1.5, 0)
    (path,) = Page(charts.arrows(flow, "flow")).attributes("path")
    shafts = [
        tuple(map(int, shaft)) for shaft in re.findall(r"M[\d.]+ [\d.]+l(-?\d+) (-?\d+)", path["d"])
    ]
    assert len(shafts) == 14 * 14
    assert shafts[0] == (charts.CELL, 0) and shafts[-1] == (0, -charts.CELL // 2)
    (still,) = Page(charts.arrows(np.zeros((5, 3, 2)), "flow")).attributes("path")
    assert still["d"] == ""


def test_captions_tell_the_longest_shift():
    summary, results = with_everything(make_summary(), make_results(n=1))
    results["cam/adv2/flow"][:] = 0
    results["cam/adv2/flow"][0, 3, 5] = (3, -4)
    page = Page(report.render(summary, results))
    assert "shift up to 5.00 px" in page.inside("span")
    assert any(
        svg.get("aria-label") == "Flow of ADV² image 40, at most 5.00 px"
        for svg in page.attributes("svg")
    )


def test_films_hold_the_snapshots_side_by_side():
    summary, results = with_everything(make_summary(), make_results())
    page = Page(report.render(summary, results))
    films = [(alt, picture) for alt, picture in page.pictures() if "after steps" in alt]
    assert [alt for alt, _ in films[:2]] == [
        "PGD image 40 after steps 0, 20, 40",
        "CAM maps of PGD image 40 after steps 0, 20, 40",
    ]
    # images and maps, two attacks, the two images that have snapshots
    assert len(films) == 2 * 2 * 2
    np.testing.assert_array_equal(
        films[0][1], np.concatenate(results["cam/pgd/snapshot_images"][0], axis=1)
    )
    assert films[1][1].shape == films[0][1].shape
    told = [film for _, film in page.tags if film.get("class") == "film"]
    assert told[0]["data-steps"] == "0 20 40" and told[0]["data-confidence"] == "0.01 0.50 0.98"
    assert page.inside("li")[:6] == ["0", "0.01", "20", "0.50", "40", "0.98"]
