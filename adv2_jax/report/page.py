"""A finished run as one HTML page."""

from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from adv2_jax.files import atomic, check_schema, read_arrays, read_summary
from adv2_jax.report import cards, tables, words
from adv2_jax.report.pictures import INFERNO, Pixels
from adv2_jax.runs.schema import Arrays, Results

LIMIT = 64  # images shown


def write(directory: Path | str) -> Path:
    """Write `report.html` from `summary.json` and `results.npz` of a finished run.

    Args:
        directory: the folder of the run.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no summary, it has another schema, or the results cannot be read.
    """
    folder = Path(directory)
    summary = read_summary(folder)
    return write_page(folder, render(summary, read_arrays(folder / "results.npz", pictures=LIMIT)))


def render(summary: Mapping[str, Any], arrays: Arrays, *, limit: int = LIMIT) -> str:
    """Return a run as one HTML page.

    Args:
        summary: the content of `summary.json`.
        arrays: the content of `results.npz`, pictures of at least the first `limit` images; only
            what is there is shown.
        limit: number of images shown per interpreter; the page says so when it cuts.

    Raises:
        ValueError: the summary has another schema.
    """
    check_schema(summary)
    results, rows, config = Results(arrays), summary["rows"], summary.get("config", {})
    threats = {row["interpreter"]: row.get("threat") for row in reversed(rows)}
    subjects = [
        cards.Subject(name, threats[name], summary.get("classes"), results)
        for name in dict.fromkeys(row["interpreter"] for row in rows)
        if results.explained(name)
    ]
    # of pictures only the first may be here
    total = len(arrays.get("labels", results.images))
    extras = [extra for extra in EXTRAS if summary.get(extra[0])]
    sections = [cards.section(subject, total=total, limit=limit) for subject in subjects]
    plain = CONTROLS.substitute(plain=subjects[0].name("pgd")) if subjects and total else ""
    interval = any(row.get("ci") for row in rows)
    links = [("summary", "Summary"), *(extra[:2] for extra in extras)]
    links += [(subject.anchor, subject.title) for subject in subjects]
    links += [("reproduce", "Reproduce")]
    title = f"ADV² against {config.get('model') or 'a classifier'}"
    body = template("run.html").substitute(
        title=escape(title),
        facts=words.definitions(_facts(summary, total), "facts"),
        navigation="".join(f'<a href="#{to}">{escape(name)}</a>' for to, name in links),
        table=tables.summary(rows),
        intervals=" In small print: 95 % intervals, Wilson's of proportions, bootstrap of means."
        if interval
        else "",
        extras="".join(
            frame.substitute(table=draw(summary[key])) for key, _, draw, frame in extras
        ),
        controls=plain,
        sections="".join(sections),
        reproduction=reproduction(config, summary.get("environment", {})),
    )
    return document(title, body, style(results.images))


def write_page(folder: Path, html: str) -> Path:
    """Write `report.html` into a folder, and return its path."""
    page = folder / "report.html"
    with atomic(page, "w") as file:
        file.write(html)
    return page


def document(title: str, body: str, style: str) -> str:
    """Return a whole page: what stands in its body, with style and script."""
    frame, script = template("page.html"), asset("script.js")
    return frame.substitute(title=escape(title), style=style, body=body, script=script)


def style(images: Pixels | None = None) -> str:
    """Return the style sheet, with the shape of the pictures and the colours of the scale.

    Maps of another size fill the same frame.
    """
    height, width = (1, 1) if images is None else images.shape[1:3]
    colours = ",".join(f"rgb({r},{g},{b})" for r, g, b in INFERNO)
    scale = f"linear-gradient(90deg,{colours})"
    return f"{asset('style.css')}:root{{--ratio:{width}/{height};--scale:{scale}}}"


def reproduction(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return the command, the settings and the versions."""
    options = dict(config)
    command = escape(words.text(options.pop("command", "")))
    lists = [
        f"<div><h3>{name}</h3>{words.definitions(values, 'list')}</div>"
        for name, values in (("Configuration", options), ("Environment", environment))
        if values
    ]
    code = f"<pre><code>{command}</code></pre>" if "command" in config else ""
    return f'{code}<div class="columns">{"".join(lists)}</div>'


def _facts(summary: Mapping[str, Any], attacked: int) -> dict[str, object]:
    facts: dict[str, object] = {"Images attacked": attacked}
    if "left_out" in summary.get("counts", {}):
        facts["Left out, already misclassified"] = summary["counts"]["left_out"]
    rows, config = summary["rows"], summary.get("config", {})
    for key in ("model", "threat", "epsilon", "target_map", "preset"):
        value = config.get(key, tables.common(rows, key) if key in tables.SETTINGS else None)
        if value is not None:
            facts[words.heading(key)] = value
    return facts


def asset(name: str) -> str:
    """Return a file that lies beside this module: style, script, or a frame."""
    return (resources.files("adv2_jax.report") / name).read_text(encoding="utf-8")


def template(name: str) -> Template:
    """Return a frame, to be filled in."""
    return Template(asset(name))


PAIRED = Template("""<section aria-labelledby="paired">
<h2 id="paired">Image by image</h2>
<div class="scroll" role="region" aria-label="Paired differences" tabindex="0">$table</div>
<p class="note">The mean over the images of what ADV² has more or less than the plain attack on the same image,
with its 95 % bootstrap interval: where that leaves out 0, the difference is more than chance.</p>
</section>
""")

TRANSFER = Template("""<section aria-labelledby="transfer">
<h2 id="transfer">From interpreter to interpreter</h2>
<div class="columns">$table</div>
<p class="note">Images made against the interpreter of the row, explained by that of the column and compared with its own
map of the benign image. A frame marks the interpreter that was attacked; its neighbours show what the attack gives away.</p>
</section>
""")

MODELS = Template("""<section aria-labelledby="models">
<h2 id="models">To other networks</h2>
<div class="scroll" role="region" aria-label="Transfer to other networks" tabindex="0">$table</div>
<p class="note">The same images, classified and explained by networks they were not made against.</p>
</section>
""")

EXTRAS = (  # of the summary, where it has them: key and anchor, name, table, frame
    ("paired", "Image by image", tables.paired, PAIRED),
    ("transfer", "Transfer", tables.transfer, TRANSFER),
    ("models", "Networks", tables.models, MODELS),
)

CONTROLS = Template("""<form class="controls" aria-label="The cards below" autocomplete="off">
<fieldset><legend>Maps</legend>
<label><input type="radio" name="maps" id="over" checked> over the image</label>
<label><input type="radio" name="maps" id="bare"> alone</label></fieldset>
<div class="scripted" hidden>
<label>Show <select name="success"><option value="">all images</option>
<option value="adv2 1">ADV² succeeds</option><option value="adv2 0">ADV² fails</option>
<option value="pgd 1">$plain succeeds</option><option value="pgd 0">$plain fails</option></select></label>
<label>ADV² map L1 at most <input type="number" name="distance" min="0" max="1" step="any" placeholder="any"></label>
<label>Sort by <select name="order"><option value="">order of the images</option>
<option value="adv2L1 1">ADV² map L1, low first</option><option value="adv2L1 -1">ADV² map L1, high first</option>
<option value="pgdL1 1">$plain map L1, low first</option><option value="pgdL1 -1">$plain map L1, high first</option>
<option value="adv2P 1">ADV² confidence, low first</option><option value="adv2P -1">ADV² confidence, high first</option>
</select></label>
<button type="reset">Reset</button>
<output aria-live="polite"></output></div>
</form>
<p class="note scale">Maps: 0 <i role="img" aria-label="colour scale from dark to light"></i> 1</p>
""")
