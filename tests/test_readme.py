"""What README.md and docs/ show is run, and what they link to exists."""

import re
from pathlib import Path

import pytest

from adv2_jax.cli.arguments import parser
from adv2_jax.cli.entry import RUN

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
COMMANDS = [  # those of docs/cli.md are forms, not examples
    pytest.param(command, id=f"{page}-{command}")
    for page, text in PAGES.items()
    if page != "docs/cli.md"
    for command in re.findall(r"^    adv2 ([^#\n]*)", text, re.MULTILINE)
]
LINKS = [
    pytest.param(page, link, id=f"{page}-{link}")
    for page, text in PAGES.items()
    for link in re.findall(r"\]\(([^)\s]+)\)", text)
    if "://" not in link
]


@pytest.mark.parametrize(
    ("page", "count"),
    [pytest.param("README.md", 2, marks=pytest.mark.slow), ("docs/guide.md", 5)],
)
def test_the_python_examples_run_one_after_the_other(page, count, capsys):
    examples = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    names = {"__name__": "example"}
    for code in examples:
        exec(compile(code, page, "exec"), names)
        assert capsys.readouterr().out
    assert len(examples) == count


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_the_links_lead_somewhere(page, link):
    path, _, section = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if section:
        assert section in anchors(target.read_text(encoding="utf-8"))


def anchors(text):
    """What the headings of a page are called in addresses: small letters, hyphens for spaces, no other signs."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(PAGES["README.md"].split()) <= 1200


def rows(text):
    """The rows of a page's tables, by their first cells; bold or not."""
    lines = [
        line.replace("**", "").strip("|").split("|")
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def test_the_table_of_the_readme_is_that_of_the_results():
    _, results = PAGES["docs/results.md"].split("\n## ADV² hides from the map")
    readme, results = rows(PAGES["README.md"]), rows(results.split("\n## ")[0])
    for name in ("GRAD", "CAM", "Grad-CAM", "MASK"):
        work, n, asr, map_l1, iou = readme[name]
        plain, joint = results[f"{name}: PGD alone"], results[f"{name}: ADV², `default`"]
        assert [work, n, asr] == plain[:3] == joint[:3]
        assert [map_l1, iou] == [f"{plain[i]} → {joint[i]}" for i in (4, 5)]


def test_the_design_names_every_module():
    """As `folder/module.py`, or `module.py` after another of its folder."""
    named = set()
    for cell in rows(PAGES["docs/design.md"]):
        folder = ""
        for name in re.findall(r"`([\w/]+\.py)`", cell):
            folder = name.rpartition("/")[0] or folder
            named.add(f"{folder}/{name.rpartition('/')[2]}".strip("/"))
    package = ROOT / "adv2_jax"
    modules = {str(path.relative_to(package)) for path in package.rglob("[!_]*.py")}
    assert modules <= named


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command):
    assert parser().parse_args(command.split()).run in RUN


def said():
    """What the package may say: its source, with strings joined that it writes over several lines."""
    sources = (ROOT / "adv2_jax").rglob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_the_errors_that_are_explained_are_those_that_are_raised():
    table = PAGES["docs/questions.md"].partition("## What an error means")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]*)` \|", table, re.MULTILINE)
    parts = [part.strip() for line in quoted for part in re.split(r"…|\bn\b|\[N, h, w\]", line)]
    assert len(quoted) > 10
    assert [part for part in parts if part not in said()] == []
