"""Write the notebooks: `python tests/make_notebooks.py [NAME ...] [--out DIR]`.

The sources are the files of notebooks/ that begin with `# %% [markdown]`. What all notebooks have in
common is put in front of their cells: a badge, the installation, the device. Then they are run, in a
folder of their own, which needs adv2_jax[notebooks] and a minute or more each; `ADV2_SMOKE=1` makes
them small.
"""

import argparse
import base64
import io
import re
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = "OWNER/adv2_jax"  # on GitHub: badges, links and installation of all notebooks
FOLDER = Path(__file__).parents[1] / "notebooks"
BEGINNING = "# %% [markdown]\n"
SOURCES = {
    path.stem: path
    for path in sorted(FOLDER.glob("*.py"))
    if path.read_text(encoding="utf-8").startswith(BEGINNING)
}

BADGE = """\
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]\
(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb)
[guide](https://github.com/{repository}/blob/main/docs/guide.md) ·
[all notebooks](https://github.com/{repository}/blob/main/docs/guide.md#notebooks) ·
[this one as a script](https://github.com/{repository}/blob/main/notebooks/{name}.py)"""
INSTALLATION = """\
# @title Install
from importlib.metadata import distributions

installed = {{package.name: package.version for package in distributions()}}
# Colab's GPU works with Colab's own jax: what is there stays
there = " ".join(
    f"{{name}}=={{installed[name]}}" for name in ("jax", "jaxlib", "numpy") if name in installed
)
if "adv2_jax" not in installed:
    %pip install -q "adv2_jax[plots] @ git+https://github.com/{repository}" {{there}}"""
DEVICE = """\
# @title Device and versions
from importlib.metadata import version

import jax

print(*(f"{device.platform}: {device.device_kind}" for device in jax.devices()), sep="\\n")
print(*(f"{name} {version(name)}" for name in ("jax", "flax", "numpy", "adv2_jax")), sep=", ")"""

METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook(name: str) -> dict[str, Any]:
    """Return a notebook without outputs, in nbformat 4.5."""
    words = {"repository": REPOSITORY, "name": name}
    title, *rest = _cells(SOURCES[name].read_text(encoding="utf-8"))
    install = _code(INSTALLATION.format(**words)) | {"metadata": {"tags": ["skip-execution"]}}
    cells = [_markdown(BADGE.format(**words)), title, install, _code(DEVICE), *rest]
    return {
        # the same in each version of the file, so that versions can be compared
        "cells": [cell | {"id": f"cell-{i}"} for i, cell in enumerate(cells)],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cells(text: str) -> list[dict[str, Any]]:
    """Return the cells of a script in percent format."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        if kind == " [markdown]":
            cells.append(_markdown(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            cells.append(_code(body.strip()))
    return cells


def _markdown(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def _code(source: str) -> dict[str, Any]:
    empty = {"execution_count": None, "metadata": {}, "outputs": []}
    return {"cell_type": "code", "source": source} | empty


def write(name: str, directory: Path) -> None:
    """Run a notebook, and write it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    made = nbformat.from_dict(notebook(name))
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        client = NotebookClient(made, timeout=None, resources=where)
        client.coalesce_streams, client.record_timing = True, False
        client.execute()
    for output in (output for cell in made.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", ()):
            output.data["image/png"] = _smaller(output.data["image/png"])
    made.metadata = nbformat.from_dict(METADATA)  # nbclient writes the version of Python into it
    nbformat.write(made, directory / f"{name}.ipynb")


def _smaller(png: str) -> str:
    """Return a PNG in Base64 in 256 colours: half the size."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SOURCES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        write(name, arguments.out)
