"""A finished run as one HTML page, and the frame that it shares with the page of a training."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from adv2_jax.files import atomic, check_schema, read_summary
from adv2_jax.report import cards, curvature, detection, tables, words
from adv2_jax.report.pictures import INFERNO
from adv2_jax.runs.schema import JOINT, Arrays, Results, read_results
from adv2_jax.runs.store import CURVATURE_FILES

LIMIT = 64  # images shown for each interpreter


def write(directory: Path | str) -> Path:
    """Write `report.html` from `summary.json` and the results of a finished run.

    Args:
        directory: the folder of the run.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no summary, it has another schema, or the results cannot be read.
    """
    folder = Path(directory)
    summary = read_summary(folder)
    measured = (folder / CURVATURE_FILES[0]).exists()
    laboratory = curvature.read(folder, pictures=LIMIT) if measured else None
    # pictures beyond the limit are never shown: reading them would take the memory of the run
    arrays = read_results(folder, pictures=LIMIT)
    return write_page(folder, render(summary, arrays, laboratory=laboratory))


def write_curvature(directory: Path | str) -> Path:
    """Write `report.html` from `curvature.json` and `curvature.npz` of a source's images.

    Args:
        directory: the folder of the two files.

    Returns:
        The path of the page.

    Raises:
        ValueError: a file is missing, of another schema, or cannot be read.
    """
    folder = Path(directory)
    laboratory = curvature.read(folder, pictures=LIMIT)
    summary = laboratory.summary
    config, counts = summary["config"], summary["counts"]
    facts = {
        "Model": config.get("model"),
        "Images": counts["images"],
        "Left out, misclassified": counts["left_out"],
        "Score": config.get("score"),
        "Width τ": config.get("tau"),
        "Map": config.get("interpreter"),
    }
    body = template("plain.html").substitute(
        title="Curvature",
        facts=words.definitions(facts, "facts"),
        sections=_curvature(laboratory),
        reproduction=reproduction(summary),
    )
    size = laboratory.samples["benign"].images.shape[1:3]
    return write_page(folder, document("Curvature", body, size))


def _curvature(laboratory: curvature.Laboratory) -> str:
    return section("curvature", "Curvature of the class score", curvature.content(laboratory))


def render(
    summary: Mapping[str, Any],
    arrays: Arrays,
    *,
    limit: int = LIMIT,
    laboratory: curvature.Laboratory | None = None,
) -> str:
    """Return a run as one HTML page.

    Args:
        summary: the content of `summary.json`.
        arrays: the content of `results.npz`, with pictures of at least the first `limit` images;
            only what is there is shown.
        limit: number of images shown for each interpreter; the page says so when it cuts.
        laboratory: the curvature at its images, if it was measured.

    Raises:
        ValueError: the summary has another schema.
    """
    check_schema(summary)
    results, rows, config = Results(arrays), summary["rows"], summary.get("config", {})
    # reversed: of several rows of an interpreter the first one counts
    threats = {row["interpreter"]: row.get("threat") for row in reversed(rows)}
    subjects = [
        cards.Subject(name, threats[name], summary.get("classes"), results)
        # dict.fromkeys: each once, in the order of the rows
        for name in dict.fromkeys(row["interpreter"] for row in rows)
        if results.explained(name)
    ]
    # `arrays` may hold pictures of the first images only, but all labels
    total = len(arrays.get("labels", results.images))
    extras = [extra for extra in EXTRAS if summary.get(extra[0])]
    links = [
        ("summary", "Summary"),
        *((key, name) for key, name, *_ in extras),
        *([] if laboratory is None else [("curvature", "Curvature")]),
        *((subject.anchor, subject.title) for subject in subjects),
        ("reproduce", "Reproduce"),
    ]
    joint = bool(subjects) and JOINT in results.attacks(subjects[0].interpreter)
    if joint:
        links.insert(-1 - len(subjects), (JOINT, "All interpreters"))
    title = f"ADV² against {config.get('model') or 'a classifier'}"
    body = template("run.html").substitute(
        title=escape(title),
        verdict=escape(
            words.verdict(rows, goal=config.get("goal", "targeted"), epsilon=config.get("epsilon"))
        ),
        doubts="".join(f"<p>{escape(sentence)}</p>" for sentence in words.doubts(rows)),
        facts=words.definitions(_facts(summary, total), "facts"),
        navigation="".join(f'<a href="#{to}">{escape(name)}</a>' for to, name in links),
        table=tables.summary(rows),
        intervals=INTERVALS if any(row.get("ci") for row in rows) else "",
        extras="".join(
            section(key, heading, draw(summary[key]), note)
            for key, _, heading, draw, note in extras
        )
        + ("" if laboratory is None else _curvature(laboratory)),
        controls=template("controls.html").substitute(plain=subjects[0].name("pgd"))
        if subjects and total
        else "",
        sections=(cards.joint_section(subjects, total=total, limit=limit) if joint else "")
        + "".join(cards.section(one, total=total, limit=limit) for one in subjects),
        reproduction=reproduction(summary),
    )
    # one frame for all pictures: a map of any size fills it, and so lies over its image
    return document(title, body, results.images.shape[1:3])


def _facts(summary: Mapping[str, Any], attacked: int) -> dict[str, object]:
    """Return the facts of the head of the page; settings only where all rows agree."""
    rows, left_out = summary["rows"], summary.get("counts", {}).get("left_out")
    # the last row's, so those that differ are blanked in the next line
    common = {key: row.get(key) for row in rows for key in tables.SETTINGS}
    settings = common | dict.fromkeys(tables.differing(rows)) | summary.get("config", {})
    keys = ("model", "threat", "epsilon", "goal", "target_map", "preset")
    facts = {"Images attacked": attacked, "Left out, already misclassified": left_out}
    facts |= {words.heading(key): settings.get(key) for key in keys}
    if settings.get("threat") == "linf" and settings.get("epsilon") is not None:
        facts[words.heading("epsilon")] = words.levels(settings["epsilon"])
    if settings.get("keep") == "adversarial":
        facts["Pictures"] = "none: --keep adversarial keeps no maps"
    return {name: value for name, value in facts.items() if value is not None}


def write_page(folder: Path, html: str) -> Path:
    """Write `report.html` into a folder, and return its path."""
    page = folder / "report.html"
    with atomic(page, "w") as file:
        file.write(html)
    return page


def document(title: str, body: str, size: Sequence[int] = (1, 1)) -> str:
    """Return a whole page with style and script.

    Args:
        title: of the window.
        body: HTML.
        size: height and width of the pictures; maps of another size fill the same frame.
    """
    # from the palette of the pictures, so that scale and maps cannot disagree
    scale = ",".join(f"rgb({r},{g},{b})" for r, g, b in INFERNO)
    return template("page.html").substitute(
        title=escape(title),
        style=f"{asset('style.css')}:root{{--ratio:{size[1]}/{size[0]};--scale:{scale}}}",
        body=body,
        script=asset("script.js"),
    )


def section(anchor: str, heading: str, content: str, note: str = "") -> str:
    """Return a section of a page, with a note below its content where there is one."""
    below = f'<p class="note">{note}</p>\n' if note else ""
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{heading}</h2>\n{content}\n'
        f"{below}</section>\n"
    )


def reproduction(summary: Mapping[str, Any]) -> str:
    """Return the command, the settings and the versions of a run or training."""
    options = dict(summary.get("config", {}))
    command = options.pop("command", None)
    lists = [
        f"<div><h3>{name}</h3>{words.definitions(values, 'list')}</div>"
        for name, values in (
            ("Configuration", options),
            ("Environment", summary.get("environment")),
        )
        if values
    ]
    code = "" if command is None else f"<pre><code>{escape(command)}</code></pre>"
    return f'{code}<div class="columns">{"".join(lists)}</div>'


def asset(name: str) -> str:
    """Return the text of a file beside this module: style, script, or a piece of HTML."""
    # through the package, not a path: it may be installed as a zip file
    return (resources.files("adv2_jax.report") / name).read_text(encoding="utf-8")


def template(name: str) -> Template:
    """Return a piece of HTML that is to be filled in."""
    return Template(asset(name))


INTERVALS = " In small print: 95 % intervals, Wilson's of proportions, bootstrap of means."

# Sections of what a summary may have: its key, name in the navigation, heading, table, note.
EXTRAS = (
    (
        "paired",
        "Image by image",
        "Image by image",
        tables.paired,
        "The mean over the images of what ADV² has more or less than the plain attack on the same "
        "image (or the joint attack than that on the interpreter alone), with its 95 % bootstrap "
        "interval: where that leaves out 0, the difference is more than chance.",
    ),
    (
        "transfer",
        "Transfer",
        "From interpreter to interpreter",
        tables.transfer,
        "Images made against the interpreter of the row, explained by that of the column and "
        "compared with its own map of the benign image. A frame marks the interpreter that was "
        "attacked; its neighbours show what the attack gives away.",
    ),
    (
        "models",
        "Networks",
        "To other networks",
        tables.models,
        "The same images, classified and explained by networks they were not made against.",
    ),
    ("detection", "Detectors", "Detectors", detection.content, detection.NOTE),
)
