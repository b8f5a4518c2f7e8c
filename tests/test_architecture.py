"""The shape of the package, read off its source: imports go downwards, everything public is explained, importing is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adv2_jax

ROOT = Path(adv2_jax.__file__).parent
LAYERS = [
    {"types", "options", "errors", "precision", "cost"},
    {"activations", "maps", "losses", "files", "identity"},
    {"capabilities", "blending", "state_dicts"},
    {"interpreters", "threats", "models", "data", "metrics"},
    {"descent"},
    {"presets"},
    {"crafting"},
    {"attacks"},
    {"runs", "training"},
    {"report"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
SOURCES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
}
MODULES = [path for path in SOURCES if path != Path("__init__.py")]


def module_of(path):
    """The first part of the name below adv2_jax: a file or a folder."""
    return path.parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of everything that a file imports, `from a import b` as a.b, wherever the import stands."""
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used(path):
    """The modules of the package that a file imports."""
    names = [name.split(".") for name in imports(path) if name.split(".")[0] == "adv2_jax"]
    assert ["adv2_jax"] not in names, f"{path} imports the whole package"
    return {name[1] for name in names if name[1] in LEVEL}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards(path):
    own = module_of(path)
    assert own in LEVEL, f"{path} has no place in the layers above"
    upward = {other for other in used(path) - {own} if LEVEL[other] >= LEVEL[own]}
    assert upward == set(), f"{own} must not import {upward}"


def test_the_imports_of_a_file_are_seen():
    assert used(Path("descent.py")) >= {"losses", "interpreters", "threats", "types"}


def test_the_report_computes_nothing_with_jax():
    files = [path for path in MODULES if module_of(path) == "report"]
    names = {name.split(".")[0] for path in files for name in imports(path)}
    assert names.isdisjoint({"jax", "flax", "optax"})


def public(body):
    """Functions and classes that others may call, methods included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from public(node.body) if isinstance(node, ast.ClassDef) else ()


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_everything_public_has_a_docstring(path):
    assert ast.get_docstring(SOURCES[path]), path
    assert [node.name for node in public(SOURCES[path].body) if not ast.get_docstring(node)] == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = [
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "orbax",
        "PIL",
        "matplotlib",
        "safetensors",
    ]
    program = f"import sys, adv2_jax; print(*(name for name in {heavy} if name in sys.modules))"
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == []
