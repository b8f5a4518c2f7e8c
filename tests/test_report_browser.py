"""The page in a browser: its script does what its controls say. Skipped without Chromium."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from adv2_jax import report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
QUIET = (
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)

ERRORS = """<script>const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));</script>"""

DRIVER = """<script>(async () => {
const one = (selector) => document.querySelector(selector);
const form = one(".controls").elements;
const set = (control, value) => { control.value = value; control.dispatchEvent(new Event("input", {bubbles: true})); };
const number = (title) => Number(title.textContent.match(/\\d+/)[0]);
const shown = () => [...document.querySelectorAll(".card:not([hidden]) h3")].map(number);
const said = () => one(".controls output").value;
const later = (wait = 0) => new Promise((done) => setTimeout(done, wait));
PROGRAM
})().catch((error) => { errors.push(String(error)); }).then((result) => {
  const outcome = document.createElement("output");
  outcome.id = "outcome";
  outcome.textContent = JSON.stringify({ result, errors });
  document.body.append(outcome);
});</script>"""


@pytest.fixture(scope="module")
def run_in_browser(tmp_path_factory):
    """Return a function that opens a page, runs a program in it and returns the result."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")

    def run(page, program, *flags):
        folder = tmp_path_factory.mktemp("browser")
        driver = DRIVER.replace("PROGRAM", program)
        page = page.replace("<head>", "<head>" + ERRORS, 1).replace("</body>", driver + "</body>")
        (folder / "page.html").write_text(page, encoding="utf-8")
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            *(f"--{flag}" for flag in (*QUIET, *flags)),
        ]
        command += [
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
        ]
        dump = subprocess.run(
            [*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120
        )
        outcome = re.search(r'<output id="outcome">(.*?)</output>', dump.stdout, re.DOTALL)
        assert outcome, dump.stderr
        outcome = json.loads(html.unescape(outcome[1]))
        assert outcome["errors"] == []
        return outcome["result"]

    return run


@pytest.fixture(scope="module")
def page():
    """Return the page of an attack with four snapshots."""
    return page_with_snapshots(confidences=[0.01, 0.25, 0.75, 0.98])


def page_with_snapshots(confidences):
    """Return a page of five images, two with a snapshot at every tenth step for each confidence.

    Their order by the map distance of ADV² is 3, 0, 4, 1; that of image 2 is not known.
    """
    rng = np.random.default_rng(0)
    pixels = lambda *shape: rng.integers(0, 256, (*shape, 16, 16, 3), dtype=np.uint8)  # noqa: E731
    results = {
        "images": pixels(5),
        "labels": np.zeros(5, np.int32),
        "targets": np.ones(5, np.int32),
        "indices": np.arange(5),
    }
    results["cam/benign_maps"] = results["cam/target_maps"] = rng.random((5, 4, 4))
    for attack in ("pgd", "adv2"):
        results |= {f"cam/{attack}/images": pixels(5), f"cam/{attack}/maps": rng.random((5, 4, 4))}
        results[f"cam/{attack}/confidence"] = np.array([0.5, 0.9, 0.1, 0.7, 0.3])
        results[f"cam/{attack}/success"] = np.array([True, True, False, True, False]) ^ (
            attack == "pgd"
        )
        results[f"cam/{attack}/map_l1"] = np.array([0.02, 0.2, np.nan, 0.01, 0.1])
        results[f"cam/{attack}/snapshot_steps"] = 10 * np.arange(len(confidences))
        results[f"cam/{attack}/snapshot_images"] = pixels(2, len(confidences))
        results[f"cam/{attack}/snapshot_maps"] = rng.random((2, len(confidences), 4, 4))
        results[f"cam/{attack}/snapshot_confidence"] = np.tile(confidences, (2, 1))
        results[f"cam/{attack}/flow"] = rng.normal(size=(5, 16, 16, 2))
        results[f"cam/{attack}/curve_steps"] = np.arange(3)
        results[f"cam/{attack}/curve_loss"] = rng.random((5, 3))
    rows = [
        {"interpreter": "cam", "attack": attack, "threat": "linf", "n": 5}
        for attack in ("pgd", "adv2")
    ]
    return report.render({"schema": 1, "rows": rows}, results)


def test_cards_are_filtered_and_sorted(run_in_browser, page):
    result = run_in_browser(
        page,
        """
        const result = {start: [shown(), said()]};
        set(form.success, "adv2 1"); result.success = [shown(), said()];
        set(form.distance, "0.05"); result.both = [shown(), said()];
        set(form.success, "pgd 1"); result.nothing = [shown(), said(), one(".none").hidden];
        one("button[type=reset]").click(); await later(); result.reset = [shown(), said(), one(".none").hidden];
        set(form.distance, "0.1"); result.distance = shown(); set(form.distance, "");
        set(form.order, "adv2L1 1"); result.rising = shown();
        set(form.order, "adv2L1 -1"); result.falling = shown();
        set(form.order, "adv2P -1"); result.confidence = shown();
        set(form.order, ""); result.back = shown();
        return result;
        """,
    )
    assert result["start"] == [[0, 1, 2, 3, 4], "5 of 5 cards shown"]
    assert result["success"] == [[0, 1, 3], "3 of 5 cards shown"]
    assert result["both"] == [[0, 3], "2 of 5 cards shown"]
    assert result["nothing"] == [[], "0 of 5 cards shown", False]
    assert result["reset"] == [[0, 1, 2, 3, 4], "5 of 5 cards shown", True]
    assert result["distance"] == [0, 3, 4]
    assert result["rising"] == [3, 0, 4, 1, 2] and result["falling"] == [1, 4, 0, 3, 2]
    assert result["confidence"] == [1, 3, 0, 4, 2] and result["back"] == [0, 1, 2, 3, 4]


def test_slider_goes_through_the_steps_and_back(run_in_browser, page):
    result = run_in_browser(
        page,
        """
        const slider = one(".slider input");
        const pictures = [...one("figure[data-attack=adv2]").querySelectorAll(".tile img")];
        const sheets = [...one(".film[data-attack=adv2]").querySelectorAll("img")];
        const delivered = pictures.map((picture) => picture.src);
        const state = () => [slider.value, one(".slider output").value, slider.getAttribute("aria-valuetext")];
        const result = {sliders: document.querySelectorAll(".slider:not([hidden])").length, start: state()};
        slider.focus(); result.focused = document.activeElement === slider;
        set(slider, 1); await later(100); result.one = state();
        result.playing = pictures.map((picture) => sheets.findIndex((sheet) => sheet.src === picture.src));
        const [tile, picture] = [pictures[0].parentElement, pictures[0]].map((element) => element.getBoundingClientRect());
        result.frame = [picture.width / tile.width, (tile.left - picture.left) / tile.width, picture.height / tile.height];
        set(slider, 3); result.end = state();
        result.same = pictures.every((picture, k) => picture.src === delivered[k] && !picture.classList.contains("frame"));
        return result;
        """,
    )
    told = [("PGD step {0}: p {1}", "ADV² step {0}: p {1}")] * 2

    def words(*at):
        return [mark.join(both).format(*at) for mark, both in zip((" · ", ", "), told, strict=True)]

    assert result["sliders"] == 2 and result["focused"] is True
    assert result["start"] == result["end"] == ["3", *words(30, "0.98")]
    assert result["one"] == ["1", *words(10, "0.25")]
    # image, the grey below, map; the picture below the arrows stays
    assert result["playing"] == [0, 0, 1, -1]
    assert result["frame"] == pytest.approx([4, 1, 1], abs=0.01)
    assert result["same"] is True


def test_slider_starts_at_the_last_of_more_than_101_steps(run_in_browser):
    page = page_with_snapshots(confidences=np.linspace(0, 1, 121))
    result = run_in_browser(
        page, 'const slider = one(".slider input"); return [slider.value, slider.max];'
    )
    assert result == ["120", "120"]


def test_maps_lie_over_their_image_or_alone_without_a_script(run_in_browser, page):
    program = """
        const style = (part) => getComputedStyle(one(part));
        const opacity = () => style(".base ~ .map").opacity;
        const over = opacity();
        one("#bare").checked = true;
        return [over, opacity(), ...[".scripted", ".slider"].map((part) => style(part).display === "none"), shown().length,
            scrollX];
        """
    for html_page, hidden in (
        (page, False),
        (re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL), True),
    ):
        assert run_in_browser(html_page, program) == ["0.65", "1", hidden, hidden, 5, 0]


@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_no_wider_than_its_window(run_in_browser, page, width):
    program = "return [innerWidth, document.documentElement.scrollWidth];"
    window, wide = run_in_browser(page, program, f"window-size={width},800")
    assert wide <= window <= max(width, 500)  # Chromium has no narrower window
    assert window < 600 or width > 600


def test_what_is_reached_by_the_keyboard_is_seen(run_in_browser, page):
    result = run_in_browser(
        page,
        """
        const controls = [...document.querySelectorAll("a, input, select, button, summary, [tabindex]")];
        return controls.filter((element) => !element.closest("[hidden]")).map((element) => {
          element.focus({focusVisible: true});
          return [document.activeElement === element, parseFloat(getComputedStyle(element).outlineWidth) >= 2];
        });
        """,
    )
    assert len(result) > 10 and all(focused and outlined for focused, outlined in result)
